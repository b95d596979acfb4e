"""Which calls of `from_pretrained` Stoker answers itself, and which it hands on. Pure.

Numbered, first match wins:

1. `trust_remote_code`: refused. Stoker never runs code that a checkpoint brings.
2. An argument that Stoker's path does not know, or a device map over several devices: transformers' own path,
   with a warning that names the argument. The result is right, only not faster.
3. Else: Stoker's path.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stoker.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Mapping

HUB_ARGUMENTS = frozenset({"cache_dir", "force_download", "local_files_only", "revision", "token"})
"""What says how a hub id becomes a folder."""

_IGNORED = frozenset({"low_cpu_mem_usage", "use_safetensors", "weights_only"})
"""What changes nothing here: Stoker never makes a second copy and never unpickles."""

_OFF = {"use_safetensors": (False,), "weights_only": (False,)}
"""Values of ignored arguments that ask for what Stoker doesn't do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ours:
    """Load through Stoker.

    Attributes:
        device: None = the CPU, as transformers does.
        dtype: As `from_pretrained` takes it; None where the caller said nothing.
        attn_implementation: None lets transformers choose.
        config: Instead of the checkpoint's own.
        hub: How to fetch a hub id.
    """

    device: Any
    dtype: Any
    attn_implementation: str | None
    config: Any
    hub: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Theirs:
    """Load through transformers, and say why."""

    reason: str


def plan_call(arguments: Mapping[str, Any]) -> Ours | Theirs:
    """Decide who answers a call with these keyword arguments.

    Raises:
        InvalidRequest: It asks to run the checkpoint's own code.
    """
    left = {name: value for name, value in arguments.items() if value is not None}
    if left.pop("trust_remote_code", False):
        raise InvalidRequest(
            "stoker.transformers never runs code that a checkpoint brings: drop trust_remote_code, or import "
            "the class from transformers",
            param="trust_remote_code",
        )
    hub = {name: left.pop(name) for name in HUB_ARGUMENTS & left.keys()}
    for name in _IGNORED & left.keys():
        if left[name] in _OFF.get(name, ()):
            return Theirs(reason=f"of {name}={left[name]}")
        del left[name]
    dtype, old = left.pop("dtype", None), left.pop("torch_dtype", None)
    device_map = left.pop("device_map", None)
    device = _single_device(device_map)
    if device_map is not None and device is None:
        return Theirs(reason=f"of device_map={device_map!r}, which may name several devices")
    attention = left.pop("attn_implementation", None)
    config = left.pop("config", None)
    if isinstance(dtype or old, dict) or not isinstance(attention, str | None) or isinstance(config, str):
        return Theirs(reason="of a kind of dtype, attn_implementation or config that it alone knows")
    if left:
        return Theirs(reason=f"of {', '.join(sorted(left))}")
    return Ours(
        device=device,
        dtype=old if dtype is None else dtype,
        attn_implementation=attention,
        config=config,
        hub=hub,
    )


def _single_device(device_map: Any) -> Any:
    """Return the one device that a map names, or None."""
    if isinstance(device_map, dict):
        return next(iter(device_map.values())) if list(device_map) == [""] else None
    if isinstance(device_map, str) and device_map in {"auto", "balanced", "balanced_low_0", "sequential"}:
        return None
    return device_map
