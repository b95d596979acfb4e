"""Prometheus metrics of the store."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

from stoker.metrics import START_STAGE_BUCKETS_SECONDS

READ_BYTES = Counter("stoker_store_read_bytes_total", "Bytes brought into the pool, by tier.", ["tier"])
READ_SECONDS = Counter(
    "stoker_store_read_seconds_total", "Seconds in which a load was moving bytes from a tier.", ["tier"]
)
LOAD_SECONDS = Histogram(
    "stoker_store_load_seconds",
    "From the request to the last chunk of a checkpoint.",
    buckets=START_STAGE_BUCKETS_SECONDS,
)
LOAD_FAILURES = Counter("stoker_store_load_failures_total", "Loads that failed, by error code.", ["code"])
EVICTIONS = Counter(
    "stoker_store_evictions_total", "Checkpoints dropped from the pool, by reason.", ["reason"]
)
POOL_BYTES = Gauge("stoker_store_pool_bytes", "Memory of the pool, by what it is.", ["state"])
POOL_FREE_BYTES = POOL_BYTES.labels(state="free")
POOL_LEASED_BYTES = POOL_BYTES.labels(state="leased")
POOL_CACHED_BYTES = POOL_BYTES.labels(state="cached")
PAGE_BYTES = Gauge("stoker_store_page_bytes", "Page size of the pool that the kernel really gave.")
FAULTED_IN_BYTES = Gauge(
    "stoker_store_faulted_in_bytes", "Bytes of the pool whose pages were faulted in ahead."
)
FAULT_IN_SECONDS = Gauge("stoker_store_fault_in_seconds", "What faulting the pool in took.")
LEASES = Gauge("stoker_store_leases", "Attach connections that hold a checkpoint.")
ATTACH_SECONDS = Histogram(
    "stoker_store_attach_seconds",
    "From the attach request to the answer with the chunk map.",
    buckets=START_STAGE_BUCKETS_SECONDS,
)
BANDWIDTH = Gauge("stoker_store_bandwidth_bytes_per_second", "Learnt rate of a tier.", ["tier"])
DAMAGED_PARTS = Counter(
    "stoker_store_damaged_parts_total",
    "Parts of files on this host's disks whose digest was wrong, by owner of the file.",
    ["owner"],
)
LANDED_BYTES = Counter("stoker_store_landed_bytes_total", "Bytes from afar written to the disk cache.")
LANDED_SECONDS = Counter(
    "stoker_store_landed_seconds_total", "Seconds of threads that wrote bytes from afar to the disk cache."
)
LANDING_FAILURES = Counter(
    "stoker_store_landing_failures_total", "Copies given up because the disk is full or fails.", ["reason"]
)
CACHE_EVICTIONS = Counter(
    "stoker_store_cache_evictions_total", "Copies deleted from the disk cache, by reason.", ["reason"]
)
CACHE_COMPLETED = Counter("stoker_store_cache_completed_total", "Copies that became whole in the disk cache.")
CACHE_BYTES = Gauge(
    "stoker_store_cache_bytes", "Room in the disk cache set aside for weights that are there or under way."
)
REFUSED_SOURCES = Counter(
    "stoker_store_refused_sources_total",
    "Runs of chunks that a source could not give, or gave wrong, by its tier.",
    ["tier", "reason"],
)
ORIGIN_ATTEMPTS_FAILED = Counter(
    "stoker_store_origin_attempts_failed_total", "Requests to origins that failed and may be tried again."
)
PULLED_BYTES = Counter(
    "stoker_store_pulled_bytes_total", "Bytes brought to the disk cache past the pool, by tier.", ["tier"]
)
