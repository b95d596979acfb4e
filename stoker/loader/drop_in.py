"""`from_pretrained` through Stoker: see `stoker.transformers`. Imports transformers."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stoker.checkpoint.layout import CONFIG_NAME
from stoker.errors import CheckpointInvalid
from stoker.loader.daemon import AUTO
from stoker.loader.devices import device_named
from stoker.loader.drop_in_plan import Ours, Theirs, plan_call
from stoker.loader.load import model_from
from stoker.loader.sources import Source, open_source
from stoker.models.architecture import config_of

if TYPE_CHECKING:
    from collections.abc import Mapping

_WANTED_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
"""What Stoker reads of a hub repository."""


def through_stoker(auto_class: Any) -> Any:
    """Return a subclass of one of transformers' auto classes of models, loading through Stoker."""

    def from_pretrained(
        _cls: Any, pretrained_model_name_or_path: str | os.PathLike[str], *model_args: Any, **kwargs: Any
    ) -> Any:
        """Load a model as transformers' class of this name does, through Stoker."""
        return load(auto_class, pretrained_model_name_or_path, model_args, kwargs)

    return type(
        auto_class.__name__,
        (auto_class,),
        {
            "from_pretrained": classmethod(from_pretrained),
            "__doc__": auto_class.__doc__,
            "__module__": "stoker.transformers",
        },
    )


def load(
    auto_class: Any, name: str | os.PathLike[str], model_args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """Answer one call of `from_pretrained`.

    Raises:
        InvalidRequest: It asks to run the checkpoint's own code, or names no device of this host.
        StokerError: See `stoker.load_model`.
    """
    plan = plan_call(kwargs)
    if isinstance(plan, Ours) and model_args:
        plan = Theirs(reason="of positional arguments for the model")
    if isinstance(plan, Ours):
        answer = _ours(auto_class, os.fspath(name), plan)
        if not isinstance(answer, Theirs):
            return answer
        plan = answer
    warnings.warn(
        f"{os.fspath(name)} is loaded by transformers itself, not through Stoker, because {plan.reason}",
        stacklevel=3,
    )
    return auto_class.from_pretrained(name, *model_args, **kwargs)


def _ours(auto_class: Any, name: str, plan: Ours) -> Any:
    """Return the model, or `Theirs` where only transformers loads a checkpoint of this kind."""
    folder = _folder(name, plan.hub)
    if folder is None:
        return Theirs(reason="it is neither a folder nor a hub id that could be fetched")
    try:
        source = open_source(folder, daemon=AUTO)
    except CheckpointInvalid as error:
        if _has_safetensors(folder):
            raise
        return Theirs(reason=f"it holds no safetensors ({error.message})")
    taken = False
    try:
        config = plan.config or config_of(source.small_file(CONFIG_NAME), source.location)
        model_class = _model_class(auto_class, config)
        reason = _why_theirs(config, model_class)
        if reason:
            return Theirs(reason=reason)
        taken = True
        return _load(source, plan, config=plan.config, model_class=model_class, name=name)
    finally:
        if not taken:
            source.close()


def _load(source: Source, plan: Ours, *, config: Any, model_class: Any, name: str) -> Any:
    return model_from(
        source,
        device_named("cpu" if plan.device is None else plan.device),
        dtype="auto" if plan.dtype is None else plan.dtype,
        attn_implementation=plan.attn_implementation,
        config=config,
        model_class=model_class,
        name=name,
    )


def _folder(name: str, hub: Mapping[str, Any]) -> Path | None:
    """Return the local folder that a folder's name or a hub id stands for, fetching it where it must."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import errors, snapshot_download  # noqa: PLC0415 - hub ids only

    try:
        return Path(snapshot_download(name, allow_patterns=_WANTED_FILES, **hub))
    except (errors.HfHubHTTPError, errors.HFValidationError, errors.LocalEntryNotFoundError):
        return None  # transformers says what is wrong, as its users know it


def _model_class(auto_class: Any, config: Any) -> Any:
    mapping = auto_class._model_mapping  # noqa: SLF001 - how the auto classes themselves choose
    if type(config) not in mapping:
        return None
    found = mapping[type(config)]
    if isinstance(found, (list, tuple)):
        names = list(config.architectures or ())
        return next((each for each in found if each.__name__ in names), None)
    return found


def _why_theirs(config: Any, model_class: Any) -> str:
    if getattr(config, "quantization_config", None) is not None:
        return "it is quantised"
    if model_class is None:
        return f"no class of this kind is known for {type(config).__name__}"
    if model_class.__name__ not in (config.architectures or ()):
        return (
            f"it was saved as {config.architectures}, not as {model_class.__name__}: weights may be missing"
        )
    return ""


def _has_safetensors(folder: Path) -> bool:
    return any(folder.glob("*.safetensors"))
