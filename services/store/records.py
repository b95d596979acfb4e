"""What is told about loads: one canonical log line each, and metrics."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from services.store import metrics
from services.store.catalog import CatalogEntry
from services.store.pool.resident import Resident
from services.store.reading.bandwidth import Moved
from stoker import log
from stoker.errors import StokerError


def record_loaded(resident: Resident, *, read_seconds: float) -> None:
    """Tell that all of a checkpoint is there.

    Args:
        resident: Just loaded.
        read_seconds: From its first read to the end of its last.
    """
    metrics.LOAD_SECONDS.observe(resident.seconds)
    tiers: dict[str, float] = {}
    for moved in resident.moved:
        metrics.READ_BYTES.labels(tier=moved.tier).inc(moved.byte_count)
        metrics.READ_SECONDS.labels(tier=moved.tier).inc(moved.seconds)
        tiers[f"{moved.tier}_bytes"] = moved.byte_count
        tiers[f"{moved.tier}_seconds"] = round(moved.seconds, 4)
    byte_count = sum(file.size_bytes for file in resident.files)
    log.get().info(
        "checkpoint.loaded",
        uri=resident.entry.uri,
        revision=resident.entry.index.revision,
        bytes=byte_count,
        seconds=round(resident.seconds, 4),
        queue_seconds=round(max(0.0, resident.seconds - read_seconds), 4),
        read_seconds=round(read_seconds, 4),
        bytes_per_second=round(byte_count / resident.seconds) if resident.seconds > 0 else 0,
        urgency=resident.urgency.name.lower(),
        leases=resident.leases,
        **tiers,
    )


def record_dropped(resident: Resident, *, reason: str, pool_bytes: int) -> None:
    """Tell that a checkpoint gives up its room of `pool_bytes`."""
    metrics.EVICTIONS.labels(reason=reason).inc()
    log.get().info(
        "checkpoint.evicted",
        uri=resident.entry.uri,
        revision=resident.entry.index.revision,
        bytes=pool_bytes,
        phase=resident.phase.value,
        reason=reason,
    )


def record_failed(resident: Resident, error: StokerError, *, seconds: float) -> None:
    """Tell that a load failed after so many seconds."""
    metrics.LOAD_FAILURES.labels(code=error.code).inc()
    log.get().warning(
        "checkpoint.load_failed",
        uri=resident.entry.uri,
        revision=resident.entry.index.revision,
        seconds=round(seconds, 4),
        ready_bytes=resident.ready_bytes,
        error_code=error.code,
        message=error.message,
    )


def show_pool(
    *,
    free_bytes: Callable[[], int],
    leased_bytes: Callable[[], int],
    cached_bytes: Callable[[], int],
    leases: Callable[[], int],
) -> None:
    """Have the pool's gauges made when somebody looks, in any thread: each step of a load changes them."""
    metrics.POOL_FREE_BYTES.set_function(free_bytes)
    metrics.POOL_LEASED_BYTES.set_function(leased_bytes)
    metrics.POOL_CACHED_BYTES.set_function(cached_bytes)
    metrics.LEASES.set_function(leases)


def record_probed(entry: CatalogEntry, moved: Sequence[Moved], *, gave_way: bool, error: str) -> None:
    """Tell what the probe of a disk came to.

    Args:
        entry: The checkpoint that was read.
        moved: By tier; empty = it told nothing.
        gave_way: A load began while it ran.
        error: Why reading ended early; empty = it did not.
    """
    tiers: dict[str, float] = {}
    for each in moved:
        tiers[f"{each.tier}_bytes"] = each.byte_count
        tiers[f"{each.tier}_seconds"] = round(each.seconds, 4)
        tiers[f"{each.tier}_bytes_per_second"] = round(each.byte_count / each.seconds)
    log.get().info("disk.probed", uri=entry.uri, gave_way=gave_way, message=error, **tiers)


def record_rates(rates: dict[str, float]) -> None:
    """Set the learnt rate of each tier, bytes per second."""
    for tier, bytes_per_second in rates.items():
        metrics.BANDWIDTH.labels(tier=tier).set(bytes_per_second)
