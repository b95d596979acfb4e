"""The tiers behind the pool, as the settings have them: the disk cache and the origins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from services.store.chain import OpenFile
from services.store.disk_cache.cache import DiskCache
from services.store.integrity.digests import Damage
from services.store.origins.ranges import Retry
from services.store.remote.checkpoints import RemoteCheckpoints, RemotePlan
from services.store.settings import StoreSettings

SKELETONS_FOLDER_NAME = "skeletons"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiers:
    """What lies behind the pool.

    Attributes:
        cache: This host's disk; None = it keeps nothing.
        remote: Peers and origins.
    """

    cache: DiskCache | None
    remote: RemoteCheckpoints

    @property
    def forget(self) -> Callable[[Path, tuple[Damage, ...]], None]:
        """What is told of damaged parts of the disk cache's files."""

        def forget(path: Path, damages: tuple[Damage, ...]) -> None:
            if self.cache is not None:
                self.cache.forget_bytes(path, [(damage.begin, damage.end) for damage in damages])

        return forget

    def close(self) -> None:
        """Let go of origins and of the cache's folder."""
        self.remote.close()
        if self.cache is not None:
            self.cache.close()


def open_tiers(settings: StoreSettings, *, peers: OpenFile | None = None) -> Tiers:
    """Take the disk cache over and get ready to ask origins; blocks for a scan of the cache.

    Args:
        settings: Of the store.
        peers: The tier of other stores, if there is one.

    Raises:
        ConfigError: The cache's folder cannot be used.
    """
    cache = None
    if settings.cache_dir is not None:
        cache = DiskCache(settings.cache_dir, quota_bytes=settings.cache_bytes)
    plan = RemotePlan(
        timeout_seconds=settings.origin_timeout_seconds,
        retry=Retry(attempts=settings.origin_attempts),
        shared_roots=settings.shared_roots,
        skeletons=settings.run_dir / SKELETONS_FOLDER_NAME,
    )
    return Tiers(cache=cache, remote=RemoteCheckpoints(plan, cache=cache, peers=peers))
