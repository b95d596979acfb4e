"""Choose the backend by URL."""

from __future__ import annotations

import re
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl

import grpc

from stoker.errors import ConfigError
from stoker.state.embedded import MEMORY, open_embedded

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping

    from stoker.clock import Clock
    from stoker.state.protocol import StateStore

EMBEDDED = "embedded://"
ETCD = re.compile(r"(?P<scheme>etcds?)://(?P<hosts>[^/?]+)(?:/(?P<prefix>[^?]*))?(?:\?(?P<query>.*))?")
ENDPOINT = re.compile(r"(\[[0-9a-fA-F:]+\]|[^:/@\[\]\s]+):\d{1,5}")
TLS_FILES = ("ca", "cert", "key")


@dataclass(frozen=True, slots=True, kw_only=True)
class EtcdAddress:
    """What an etcd URL says.

    Attributes:
        endpoints: `host:port` each.
        prefix: In front of every key; empty, or ends with `/`.
        tls: Files by name (`ca`, `cert`, `key`); None for plain HTTP/2.
    """

    endpoints: tuple[str, ...]
    prefix: str = ""
    tls: Mapping[str, Path] | None = None


@asynccontextmanager
async def open_state(url: str, *, clock: Clock | None = None) -> AsyncGenerator[StateStore, None]:
    """Open the state a URL names, and close it when the block ends.

    Args:
        url: `embedded:///absolute/path/state.db`; `embedded://:memory:` for a state that ends with the block;
            `etcd://host:port,host:port/prefix`, where all keys lie below `prefix/`; or the same with `etcds`
            and `?ca=FILE&cert=FILE&key=FILE` for TLS (without `ca` the host's roots, `cert` and `key` for
            mutual TLS).
        clock: What leases live by; the host's clock where None.

    Raises:
        ConfigError: The URL is no such, the file is in use, or the etcd client library is not installed.
    """
    path = url.removeprefix(EMBEDDED)
    store: StateStore
    if url.startswith(EMBEDDED) and (path == MEMORY or path.startswith("/")):
        async with open_embedded(path, clock=clock) as store:
            yield store
    elif address := etcd_address(url):
        try:
            from stoker.state.etcd import open_etcd  # noqa: PLC0415 - only who uses etcd needs its client
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"state URL {url} needs the etcd client ({error.name} is missing): pip install 'stoker[etcd]'"
            ) from error
        async with open_etcd(
            address.endpoints,
            prefix=address.prefix,
            credentials=None if address.tls is None else _credentials(address.tls),
            clock=clock,
        ) as store:
            yield store
    else:
        raise ConfigError(
            f"state URL {url!r} is none of embedded:///absolute/path/state.db, embedded://:memory:, "
            "etcd://host:port,host:port/prefix and etcds://host:port/prefix?ca=FILE&cert=FILE&key=FILE"
        )


def etcd_address(url: str) -> EtcdAddress | None:
    """Return what an etcd URL says; None where it is none."""
    match = ETCD.fullmatch(url)
    if match is None:
        return None
    endpoints = tuple(match["hosts"].split(","))
    prefix = (match["prefix"] or "").strip("/")
    files = dict(parse_qsl(match["query"] or "", keep_blank_values=True))
    secure = match["scheme"] == "etcds"
    if (
        not all(ENDPOINT.fullmatch(endpoint) for endpoint in endpoints)
        or not set(files) <= set(TLS_FILES)
        or (files and not secure)
        or ("cert" in files) != ("key" in files)
    ):
        return None
    return EtcdAddress(
        endpoints=endpoints,
        prefix=f"{prefix}/" if prefix else "",
        tls={name: Path(file) for name, file in files.items()} if secure else None,
    )


def _credentials(files: Mapping[str, Path]) -> grpc.ChannelCredentials:
    try:
        ca, cert, key = (files[name].read_bytes() if name in files else None for name in TLS_FILES)
    except OSError as error:
        raise ConfigError(
            f"{error.filename} of the state URL cannot be read ({error.strerror}): check path and access"
        ) from error
    return grpc.ssl_channel_credentials(root_certificates=ca, private_key=key, certificate_chain=cert)
