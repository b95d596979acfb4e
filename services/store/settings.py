"""Settings of the store daemon: `STOKER_STORE_*`."""

from __future__ import annotations

import tempfile
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator
from pydantic_settings import SettingsConfigDict

from services.store.reading.pace import PacedTier
from stoker.checkpoint.reading import DIRECT_ALIGNMENT_BYTES
from stoker.settings import ServiceSettings
from stoker.units import KIB, MIB


class FaultIn(StrEnum):
    """When the pool's pages are allocated."""

    EAGER = "eager"
    LAZY = "lazy"


class VerifyDisk(StrEnum):
    """When bytes that come from this host's disks are checked; what comes from outside always is."""

    ALWAYS = "always"
    FIRST = "first"
    NEVER = "never"


class HugeTmpfs(StrEnum):
    """Whether the daemon may make a tmpfs with huge pages for itself."""

    OFF = "off"
    PRIVATE = "private"


class StoreSettings(ServiceSettings):
    """What the store daemon is told."""

    model_config = SettingsConfigDict(env_prefix="STOKER_STORE_")

    address: str = "127.0.0.1:7072"
    """Where gRPC listens: `host:port` or `unix:path`."""

    run_dir: Path = Path(tempfile.gettempdir()) / "stoker"
    """Folder of the attach socket (`attach.sock`) and of the lock; one daemon per folder."""

    pool_bytes: int = Field(default=0, ge=0)
    """Host memory for checkpoints, in bytes; 0 = a quarter of what is available at start."""

    chunk_bytes: int = Field(default=16 * MIB, ge=4 * KIB)
    """Unit of reading and of allocation, in bytes; a multiple of 4096 (of 2 MiB for huge pages)."""

    fault_in: FaultIn = FaultIn.EAGER
    """`eager`: allocate the pool's pages in the background from the start; `lazy`: each at its first use."""

    fault_in_threads: int = Field(default=2, ge=1, le=64)
    """Threads that fault the pool in, at low priority."""

    huge_tmpfs_dir: Path | None = None
    """A folder on a tmpfs mounted `huge=always|within_size`, for the pool; unset = find one in /dev/shm."""

    huge_tmpfs: HugeTmpfs = HugeTmpfs.PRIVATE
    """`private`: make a detached tmpfs with huge pages (no mount point, gone with the process); needs
    CAP_SYS_ADMIN, goes on without it."""

    read_threads: int = Field(default=4, ge=1, le=64)
    """Threads that read from disk, for all loads together."""

    far_threads: int = Field(default=16, ge=1, le=256)
    """Threads that read from peers and origins, for all loads together; each has one range in flight."""

    landing_threads: int = Field(default=2, ge=1, le=64)
    """Threads that write what arrives from afar to the store's own disk cache."""

    probe_bytes: int = Field(default=64 * MIB, ge=0)
    """What is read of a checkpoint on this host to learn the disk's rate before the first load does, in bytes
    (and at most that much again past the page cache): once, for at most 0.2 s each, while nothing loads; 0 =
    never. Nothing is written for it: until a checkpoint lies here, the rate is unknown."""

    verify_disk: VerifyDisk = VerifyDisk.FIRST
    """When digests of converted checkpoints on disk are checked: `always`; `first`: at the first read of each
    part of a file, again when the file changes or `run_dir` was emptied; `never`."""

    allowed_roots: tuple[Path, ...] = ()
    """Folders that checkpoints may lie under; empty = anywhere this process can read."""

    cache_dir: Path | None = None
    """The store's own folder on a disk for copies of remote checkpoints; unset = they go to the pool only."""

    cache_bytes: int = Field(default=0, ge=0)
    """What the copies' weights may take, in bytes; 0 = nine tenths of what is free or theirs at start."""

    shared_roots: tuple[Path, ...] = ()
    """Folders on shared file systems: checkpoints in them are treated as far, and kept in `cache_dir`."""

    origin_timeout_seconds: float = Field(default=30.0, gt=0)
    """Of a connect to an origin, and of each wait for bytes from it."""

    origin_attempts: int = Field(default=5, ge=1, le=100)
    """Requests to an origin in a row that bring nothing, before a load fails."""

    peer_address: str = ""
    """Where other stores reach this one for chunks, over plain TCP: `host:port`; empty = nothing is shared
    with others nor fetched from them. Whoever reaches the port and knows a revision can have its bytes: bind
    it to the network of the hosts."""

    advertised_peer_address: str = ""
    """`host:port` under which other hosts reach `peer_address`; empty = the same. The cluster names it to the
    other stores; one that listens on all interfaces (0.0.0.0) has to say it here to be named."""

    peers: tuple[str, ...] = ()
    """`host:port` of other stores' `peer_address`, beside those that the cluster names; this one's may be
    among them, so that all hosts can have the same list."""

    paced_bytes_per_second: dict[PacedTier, Annotated[float, Field(ge=0, allow_inf_nan=False)]] = Field(
        default_factory=dict
    )
    """Tiers made slower on purpose, for tests and demos: a JSON object of `disk` (all of this host's file
    systems), `peer` and `remote` to bytes per second; 0 or not named = as fast as it goes."""

    max_attachments: int = Field(default=1024, ge=1)
    """Attach connections at a time."""

    @model_validator(mode="after")
    def _aligned(self) -> Self:
        if self.chunk_bytes % DIRECT_ALIGNMENT_BYTES:
            raise ValueError(f"chunk_bytes must be a multiple of {DIRECT_ALIGNMENT_BYTES}")
        return self
