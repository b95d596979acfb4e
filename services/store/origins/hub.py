"""A model on the Hugging Face hub: `hf://owner/name[@revision]`.

The hub's own library says which commit a revision is, which files it has and how to authenticate (HF_TOKEN,
HF_ENDPOINT, HF_HUB_OFFLINE: its conventions); ranges come over HTTP from where the hub redirects to.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from services.store.origins.http_origin import HttpOrigin
from services.store.origins.origin import Broken, OriginRefused, RemoteFile, Told
from stoker.errors import ConfigError, NotFound, StokerError

_TOO_MANY, _SERVER_FAULT = 429, 500


class HubOrigin:
    """See `Origin`; a revision is a commit from the first question on."""

    def __init__(self, uri: str, *, repo: str, revision: str, timeout_seconds: float) -> None:
        """Ask nothing yet.

        Args:
            uri: As it was given.
            repo: `owner/name`.
            revision: A branch, tag or commit.
            timeout_seconds: Of a connect, and of each wait for bytes.

        Raises:
            ConfigError: The hub's library is not installed.
        """
        self._hub = _import_hub()
        self._uri = uri
        self._repo = repo
        self._revision = revision
        self._timeout_seconds = timeout_seconds
        self._commit = ""
        self._http = HttpOrigin(
            uri,
            timeout_seconds=timeout_seconds,
            url_of=lambda name: str(self._hub.hf_hub_url(repo, name, revision=self._commit or revision)),
            headers=dict(self._hub.utils.build_hf_headers()),
        )

    @property
    def uri(self) -> str:
        """See `Origin`."""
        return self._uri

    def find(self, names: Collection[str]) -> dict[str, RemoteFile]:
        """See `Origin`; pins the commit that the revision is now."""
        wanted = set(names)
        try:
            info = self._hub.HfApi().model_info(
                self._repo, revision=self._revision, files_metadata=True, timeout=self._timeout_seconds
            )
        except Exception as error:
            raise self._fault(error) from error
        self._commit = str(info.sha)
        return {
            sibling.rfilename: RemoteFile(
                name=sibling.rfilename,
                size_bytes=int(sibling.size),
                version=sibling.lfs.sha256 if sibling.lfs else sibling.blob_id,
            )
            for sibling in info.siblings or ()
            if sibling.rfilename in wanted and sibling.size is not None
        }

    def read_into(self, file: RemoteFile, into: memoryview, *, offset: int, told: Told | None = None) -> None:
        """See `Origin`; a commit never changes, so no version is compared."""
        fixed = RemoteFile(name=file.name, size_bytes=file.size_bytes, version="")
        self._http.read_into(fixed, into, offset=offset, told=told)

    def close(self) -> None:
        """See `Origin`."""
        self._http.close()

    def _fault(self, error: Exception) -> StokerError:
        errors = self._hub.errors
        if isinstance(error, errors.GatedRepoError):
            return OriginRefused(
                f"{self._uri}: the model is gated; accept its terms on the hub and set HF_TOKEN for the store"
            )
        if isinstance(error, errors.RepositoryNotFoundError | errors.RevisionNotFoundError):
            return NotFound(
                f"{self._uri}: the hub knows no such model or revision, or hides it; set HF_TOKEN"
            )
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is not None and status != _TOO_MANY and status < _SERVER_FAULT:
            return OriginRefused(f"{self._uri}: the hub answers {status}")
        if isinstance(error, errors.OfflineModeIsEnabled):
            return OriginRefused(f"{self._uri}: HF_HUB_OFFLINE is set for the store")
        endpoint = self._hub.constants.ENDPOINT
        return Broken(f"{self._uri}: the hub at {endpoint} cannot be asked: {type(error).__name__}: {error}")


def _import_hub() -> Any:
    try:
        import huggingface_hub  # noqa: PLC0415 - an optional dependency, and slow to import
        import huggingface_hub.errors  # noqa: PLC0415 - as above
        import huggingface_hub.utils  # noqa: PLC0415 - as above
    except ImportError as error:
        raise ConfigError(
            "hf:// needs the hub's library: pip install 'stoker[remote]' on the store's host"
        ) from error
    return huggingface_hub
