"""Prometheus metrics of what stores do for each other."""

from __future__ import annotations

from prometheus_client import Counter, Gauge

LINKS = Gauge("stoker_store_peer_links", "Stores that can be asked for chunks.")
CHUNKS = Counter(
    "stoker_store_swarm_chunks_total",
    "Chunks fetched together with other stores, by source: rival (loads it too), seed (has it), origin.",
    ["source"],
)
SENT_BYTES = Counter("stoker_store_peer_sent_bytes_total", "Bytes of chunks sent to other stores.")
DROPPED = Counter(
    "stoker_store_peer_dropped_total", "Peers that were given up for a file, by reason.", ["reason"]
)
REFUSED = Counter(
    "stoker_store_peer_refused_total",
    "Connections and requests of peers that were refused, by reason.",
    ["reason"],
)
