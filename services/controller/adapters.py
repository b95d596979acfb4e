"""Are a model's adapters soundly named, and what do stores say of them? Checks are pure."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable

from stoker.errors import InvalidRequest
from stoker.v1 import model_pb2

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
MAX_ADAPTERS = 256
"""Of one model: all of them travel in its route."""
MAX_URI_CHARACTERS = 1_024


def check_adapters(spec: model_pb2.ModelSpec) -> None:
    """Refuse adapters that can't be told apart or found.

    Raises:
        InvalidRequest: A name or uri is missing, too long or there twice, or there are too many.
    """
    if len(spec.adapters) > MAX_ADAPTERS:
        raise InvalidRequest(
            f"model {spec.name}: {len(spec.adapters)} adapters, at most {MAX_ADAPTERS} are served",
            param="adapters",
        )
    names: set[str] = set()
    for adapter in spec.adapters:
        if not NAME.fullmatch(adapter.name):
            raise InvalidRequest(
                f"model {spec.name}: adapter name {adapter.name[:80]!r} is not of the form {NAME.pattern}: "
                "letters, digits and . _ -, beginning with a letter or digit",
                param="adapters",
            )
        if adapter.name in names:
            raise InvalidRequest(
                f"model {spec.name}: adapter {adapter.name} is named twice; give each its own name",
                param="adapters",
            )
        if not adapter.uri or len(adapter.uri) > MAX_URI_CHARACTERS:
            raise InvalidRequest(
                f"model {spec.name}: adapter {adapter.name} must name a folder or a uri in "
                f"{MAX_URI_CHARACTERS} characters",
                param="adapters",
            )
        names.add(adapter.name)


async def described(
    spec: model_pb2.ModelSpec, ask: Callable[[str], Awaitable[model_pb2.AdapterSpec]]
) -> model_pb2.ModelSpec:
    """Return the spec with what a store says of each adapter, in the order of their names.

    Args:
        spec: Checked.
        ask: Describes the adapter at a uri.

    Raises:
        StokerError: As `ask`.
    """
    full = model_pb2.ModelSpec()
    full.CopyFrom(spec)
    del full.adapters[:]
    for adapter in sorted(spec.adapters, key=lambda one: one.name):
        found = await ask(adapter.uri)
        full.adapters.add(name=adapter.name).MergeFrom(found)
    return full
