"""Settings of the gateway: `STOKER_GATEWAY_*`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from stoker.settings import ServiceSettings
from stoker.units import GIB, MIB


class GatewaySettings(ServiceSettings):
    """What an operator can choose; lists in the environment are JSON, e.g. `["10.0.0.1:7070"]`."""

    model_config = SettingsConfigDict(
        env_prefix="STOKER_GATEWAY_", extra="forbid", frozen=True, use_attribute_docstrings=True
    )

    gateway_id: str = ""
    """Name of this gateway in logs of controllers; empty = a random one."""

    address: str = "127.0.0.1:8000"
    """`host:port` of REST; port 0 = any free one."""

    grpc_address: str = "127.0.0.1:8001"
    """`host:port` of gRPC `stoker.v1.Inference`; port 0 = any free one."""

    controllers: Annotated[tuple[str, ...], Field(min_length=1)] = ("127.0.0.1:7070",)
    """`host:port` of the controllers; the first that answers is used."""

    cache_dir: Path = Path("~/.cache/stoker/gateway")
    """Folder of the models' small files (tokenizers); created when missing."""

    cache_disk_bytes: Annotated[int, Field(ge=0)] = GIB
    """Most bytes kept in `cache_dir`; least recently used files go first."""

    cache_models: Annotated[int, Field(ge=1)] = 64
    """Tokenizers kept in memory, at most."""

    max_body_bytes: Annotated[int, Field(ge=1024)] = 8 * MIB
    """Largest request body; larger ones get 413."""

    max_requests: Annotated[int, Field(ge=1)] = 4096
    """HTTP requests open at a time, over all models; more get 503."""

    request_timeout_seconds: Annotated[float, Field(gt=0)] = 600.0
    """Longest life of a request, from arrival to last token."""

    cold_timeout_seconds: Annotated[float, Field(gt=0)] = 300.0
    """Longest wait of a request for a replica that is being started."""

    controller_patience_seconds: Annotated[float, Field(ge=0)] = 10.0
    """How long a cold request keeps trying while no controller can be reached."""

    keepalive_seconds: Annotated[float, Field(gt=0)] = 1.0
    """A silent stream gets an SSE comment this often."""

    max_attempts: Annotated[int, Field(ge=1, le=100)] = 6
    """Replicas in a row that may die under a session without giving it a token: it may be what kills them."""

    max_hops: Annotated[int, Field(ge=0, le=10_000)] = 64
    """Replicas that one session may lose before its stream ends with an error; 0 = none."""

    resume_timeout_seconds: Annotated[float, Field(gt=0)] = 120.0
    """How long a stream that has begun looks for a replica that goes on with it."""

    ship_kv: bool = True
    """A session that moves to another replica takes its keys and values along; False: they are computed there
    from its tokens, as they are where they can't be shipped."""

    reattach_seconds: Annotated[float, Field(ge=0, le=3600)] = 60.0
    """How long an answer asked for with an `Idempotency-Key` goes on without its gateway or its client, and
    its tokens are kept, for whoever sends the key again; 0 = not at all. Node agents have their own limit."""

    kept_traces: Annotated[int, Field(ge=1)] = 1024
    """Requests remembered for `/api/v1/requests/{id}`."""

    api_keys: tuple[str, ...] = ()
    """When not empty: every request needs one of them as `Authorization: Bearer`."""
