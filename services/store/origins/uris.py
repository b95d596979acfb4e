"""Which origin a uri names. Pure parsing, and the one place where origins are made."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from services.store.origins.http_origin import HttpOrigin
from services.store.origins.hub import HubOrigin
from services.store.origins.object_store import ObjectStoreOrigin, cloud_store, folder_store
from services.store.origins.origin import Origin
from stoker.errors import InvalidRequest

MAX_URI_CHARACTERS = 2048
CLOUD_SCHEMES = frozenset({"s3", "gs", "az"})
HTTP_SCHEMES = frozenset({"http", "https"})
HUB_SCHEME = "hf"
REMOTE_SCHEMES = CLOUD_SCHEMES | HTTP_SCHEMES | {HUB_SCHEME}
_HUB_NAME = re.compile(r"([A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(?:@([\w./-]{1,200}))?", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteUri:
    """A uri that names a checkpoint's folder elsewhere.

    Attributes:
        text: Normalised; holds no credentials.
        scheme: One of `REMOTE_SCHEMES`.
    """

    text: str
    scheme: str


def remote_uri(uri: str) -> RemoteUri | None:
    """Return what a uri of a remote kind names, None for one of another kind; pure.

    Raises:
        InvalidRequest: It is of a remote kind and malformed, or carries credentials.
    """
    scheme, separator, rest = uri.partition("://")
    if not separator or scheme.lower() not in REMOTE_SCHEMES:
        return None
    if len(uri) > MAX_URI_CHARACTERS or not uri.isprintable() or " " in uri:
        raise InvalidRequest(f"{uri[:100]!r} is no uri of a checkpoint", param="checkpoint_uri")
    scheme = scheme.lower()
    if scheme == HUB_SCHEME:
        if not _HUB_NAME.fullmatch(rest) or ".." in rest:
            raise InvalidRequest(
                f"{uri!r} names no model of the hub; write hf://owner/name or hf://owner/name@revision",
                param="checkpoint_uri",
            )
        return RemoteUri(text=f"{scheme}://{rest}", scheme=scheme)
    parts = urlsplit(uri)
    if parts.query or parts.fragment or "@" in parts.netloc:
        raise InvalidRequest(
            f"{scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}: a checkpoint's uri carries no "
            "credentials and no query; give the store credentials in its environment",
            param="checkpoint_uri",
        )
    if not parts.netloc or any(piece in {".", ".."} for piece in parts.path.split("/")):
        raise InvalidRequest(f"{uri!r} names no folder: no host or bucket, or a path with dots")
    return RemoteUri(text=f"{scheme}://{parts.netloc}{parts.path.rstrip('/')}", scheme=scheme)


def open_origin(uri: RemoteUri, *, timeout_seconds: float) -> Origin:
    """Return the origin that a uri names; asks it nothing yet.

    Raises:
        ConfigError: What it needs is not installed or not configured.
    """
    if uri.scheme in HTTP_SCHEMES:
        return HttpOrigin(uri.text, timeout_seconds=timeout_seconds)
    if uri.scheme == HUB_SCHEME:
        match = _HUB_NAME.fullmatch(uri.text.partition("://")[2])
        repo, revision = (match[1], match[2] or "main") if match else ("", "")
        return HubOrigin(uri.text, repo=repo, revision=revision, timeout_seconds=timeout_seconds)
    return ObjectStoreOrigin(uri.text, lambda: cloud_store(uri.text, timeout_seconds=timeout_seconds))


def shared_folder(folder: Path) -> Origin:
    """Return the origin for a folder on a shared file system, which is slow enough to be cached.

    Raises:
        ConfigError: What it needs is not installed.
        NotFound: There is no such folder.
    """
    return ObjectStoreOrigin(str(folder), lambda: folder_store(folder))
