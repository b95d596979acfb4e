"""Metrics of the gateway: our own, and the `vllm:` names that dashboards know."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

from stoker.metrics import START_STAGE_BUCKETS_SECONDS, TOKEN_BUCKETS_SECONDS
from stoker.v1 import start_pb2

_MODEL = ["model_name"]

REQUESTS = Counter("stoker_gateway_requests", "Finished requests.", ["model_name", "kind", "finish"])
START_STAGE_SECONDS = Histogram(
    "stoker_start_stage_seconds",
    "Stages of starts that requests waited for.",
    ["stage"],
    buckets=START_STAGE_BUCKETS_SECONDS,
)
ACQUIRE_SECONDS = Histogram(
    "stoker_gateway_acquire_seconds",
    "Waiting of cold requests for a ready replica.",
    _MODEL,
    buckets=START_STAGE_BUCKETS_SECONDS,
)
FIRST_TOKEN_SECONDS = Histogram(
    "vllm:time_to_first_token_seconds",
    "From a request's arrival to its first token.",
    _MODEL,
    buckets=TOKEN_BUCKETS_SECONDS,
)
REQUEST_SECONDS = Histogram(
    "vllm:e2e_request_latency_seconds",
    "From a request's arrival to its end.",
    _MODEL,
    buckets=START_STAGE_BUCKETS_SECONDS,
)
RUNNING = Gauge("vllm:num_requests_running", "Sessions with a first token.", _MODEL)
WAITING = Gauge("vllm:num_requests_waiting", "Sessions before their first token.", _MODEL)
PROMPT_TOKENS = Counter("vllm:prompt_tokens", "Prompt tokens of finished requests.", _MODEL)
GENERATION_TOKENS = Counter("vllm:generation_tokens", "Tokens generated.", _MODEL)

RESUMES = Counter(
    "stoker_gateway_resumes",
    "Sessions that went on at another replica after a failure.",
    ["model_name", "cause"],
)
RESUME_SECONDS = Histogram(
    "stoker_gateway_resume_seconds",
    "From a failure noticed to the session's next token, by stage: search (for a replica), replay.",
    ["model_name", "stage"],
    buckets=START_STAGE_BUCKETS_SECONDS,
)
RESUMED_TOKENS = Counter(
    "stoker_gateway_resumed_tokens", "Generated tokens computed again after a failure.", _MODEL
)
NUMERICS_CHANGES = Counter(
    "stoker_gateway_numerics_changes",
    "Streams that went on at a replica whose results may differ in their last bits, by way: resume, move.",
    ["model_name", "way"],
)
STREAMS_LOST = Counter("stoker_gateway_streams_lost", "Streams cut off after they had begun.", _MODEL)
FENCED_EVENTS = Counter(
    "stoker_gateway_fenced_events", "Events of earlier owners of a session, refused.", _MODEL
)

MOVES = Counter(
    "stoker_gateway_moves",
    "Planned moves of sessions, by outcome: moved, abandoned.",
    ["model_name", "outcome"],
)
MOVE_PAUSE_SECONDS = Histogram(
    "stoker_gateway_move_pause_seconds",
    "From the last token of a move's source to the first new one of its destination.",
    _MODEL,
    buckets=TOKEN_BUCKETS_SECONDS,
)
MOVE_GAP_SECONDS = Histogram(
    "stoker_gateway_move_gap_seconds",
    "Longest time between two tokens during a move that was made, by the phase it ended in.",
    ["model_name", "phase"],
    buckets=TOKEN_BUCKETS_SECONDS,
)
MOVE_SECONDS = Histogram(
    "stoker_gateway_move_seconds",
    "From the destination found to the switch.",
    _MODEL,
    buckets=START_STAGE_BUCKETS_SECONDS,
)
MOVE_TOKENS = Counter("stoker_gateway_move_recomputed_tokens", "Tokens computed again by moves.", _MODEL)
MOVE_BYTES = Counter("stoker_gateway_move_shipped_bytes", "Keys and values shipped by moves.", _MODEL)
MOVE_PATHS = Counter(
    "stoker_gateway_move_paths",
    "Moves by path (ship, replay), and the error for which a replay was not a shipment.",
    ["model_name", "path", "cause"],
)

_STAGES = ("placement", "worker", "attach", "weights", "skeleton", "assign", "first_forward", "total")


def observe_start(timings: start_pb2.StartTimings) -> None:
    """Count a start a request waited for, stage by stage."""
    for stage in _STAGES:
        START_STAGE_SECONDS.labels(stage).observe(getattr(timings, f"{stage}_seconds"))
