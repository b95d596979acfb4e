"""Metrics: Prometheus conventions shared by all services, and the endpoint that shows them.

Every metric is `stoker_<thing>_<unit>`; the `vllm:` names that dashboards know are set by the gateway beside
ours.
"""

from __future__ import annotations

from prometheus_client import REGISTRY, start_http_server

from stoker.errors import ConfigError

START_STAGE_BUCKETS_SECONDS = (
    0.001,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1,
    2.5,
    5,
    10,
    30,
    60,
    120,
    300,
)
"""For stages of a start: from a warm hand-over to a download."""

TOKEN_BUCKETS_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)
"""For times to and between tokens: the bounds vLLM's dashboards use."""


def serve_metrics(port: int) -> None:
    """Serve `/metrics` on all interfaces from a thread of its own; 0 = don't.

    Raises:
        ConfigError: The port is taken.
    """
    if port == 0:
        return
    try:
        start_http_server(port, registry=REGISTRY)
    except OSError as error:
        raise ConfigError(f"cannot serve metrics on port {port}: {error.strerror}; set another") from error
