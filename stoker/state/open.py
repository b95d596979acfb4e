"""Choose the backend by URL."""

from __future__ import annotations

import re
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from stoker.errors import ConfigError
from stoker.state.embedded import MEMORY, open_embedded

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from stoker.clock import Clock
    from stoker.state.protocol import StateStore

EMBEDDED = "embedded://"
ETCD = "etcd://"
ENDPOINT = re.compile(r"(\[[0-9a-fA-F:]+\]|[^:/@\[\]\s]+):\d{1,5}")


@asynccontextmanager
async def open_state(url: str, *, clock: Clock | None = None) -> AsyncGenerator[StateStore, None]:
    """Open the state a URL names, and close it when the block ends.

    Args:
        url: `embedded:///absolute/path/state.db`, `embedded://:memory:` for a state that ends with the block,
            or `etcd://host:port,host:port/prefix`, where all keys lie below `/prefix/`.
        clock: What leases live by; the host's clock where None.

    Raises:
        ConfigError: The URL is no such, the file is in use, or the etcd client library is not installed.
    """
    path = url.removeprefix(EMBEDDED)
    store: StateStore
    if url.startswith(EMBEDDED) and (path == MEMORY or path.startswith("/")):
        async with open_embedded(path, clock=clock) as store:
            yield store
    elif url.startswith(ETCD) and (where := _etcd(url.removeprefix(ETCD))):
        endpoints, prefix = where
        try:
            from stoker.state.etcd import open_etcd  # noqa: PLC0415 - only who uses etcd needs its client
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"state URL {url} needs the etcd client ({error.name} is missing): pip install 'stoker[etcd]'"
            ) from error
        async with open_etcd(endpoints, prefix=prefix, clock=clock) as store:
            yield store
    else:
        raise ConfigError(
            f"state URL {url!r} is none of embedded:///absolute/path/state.db, embedded://:memory: "
            "and etcd://host:port,host:port/prefix"
        )


def _etcd(location: str) -> tuple[list[str], str] | None:
    """Return endpoints and key prefix of `host:port,host:port/prefix`; None where it isn't that."""
    hosts, _, prefix = location.partition("/")
    endpoints = hosts.split(",")
    if not all(ENDPOINT.fullmatch(endpoint) for endpoint in endpoints):
        return None
    prefix = prefix.strip("/")
    return endpoints, f"{prefix}/" if prefix else ""
