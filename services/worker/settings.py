"""What a worker is told by the node agent that starts it: arguments, and `STOKER_WORKER_*` for the rest."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from stoker.settings import ServiceSettings
from stoker.units import MIB


class WorkerSettings(ServiceSettings):
    """Settings of one worker process."""

    model_config = SettingsConfigDict(env_prefix="STOKER_WORKER_")

    socket: Path
    """Unix socket to listen on."""

    worker_id: str
    """The id the node agent gave it."""

    threads: int = Field(default=0, ge=0, le=1024)
    """Threads of arithmetic on the processor; 0 = as torch chooses."""

    warm_up_niceness: int = Field(default=0, ge=0, le=19)
    """How much the imports give way to other processes, as nice(1)."""

    execute_while_loading: bool = True
    """Take sessions before all weights are there; their first passes wait layer by layer."""

    attach_socket: Path | None = None
    """Attach socket of this host's store: on a host with CUDA devices its pool is page-locked before there is
    a model. Unset: loads go through page-locked buffers."""

    lock_device: int = Field(default=0, ge=0)
    """CUDA device in whose context the pool is locked; what is locked serves all devices of the process."""

    drain_seconds: float = 0.0
    """The node agent drains sessions; its worker ends at once."""

    default_kv_cache_bytes: int = Field(default=256 * MIB, ge=1)
    """Key/value cache of a replica on the processor whose model does not say; the batch's pool comes on top,
    as large at most."""

    default_cuda_kv_fraction: float = Field(default=0.8, gt=0, le=1)
    """Of the device memory left beside the weights: key/value cache of a replica whose model does not say."""

    max_batch: int = Field(default=8, ge=1, le=1024)
    """Sessions per step, unless the model's concurrency is higher."""

    max_waiting: int = Field(default=256, ge=0)
    """Sessions accepted beyond the batch."""

    max_adapters: int = Field(default=64, ge=1)
    """LoRA adapters kept in memory beside the model; those that no session uses make room for others."""

    max_adapter_bytes: int = Field(default=1024 * MIB, ge=1)
    """Bytes of these adapters, in the model's dtype."""


def parse(arguments: Sequence[str]) -> dict[str, Any]:
    """Return the settings that the command line gives; ends the process with a message when it is wrong."""
    parser = argparse.ArgumentParser(prog="python -m services.worker", description=__doc__)
    parser.add_argument("--socket", required=True, help="unix socket to listen on")
    parser.add_argument("--worker-id", required=True, help="id given by the node agent")
    parser.add_argument("--parent-pid", type=int, default=0, help="die with this process; 0 = don't")
    parser.add_argument("--threads", type=int, default=0, help="threads of arithmetic; 0 = torch's choice")
    parser.add_argument("--warm-up-niceness", type=int, default=0, help="of the imports; as nice(1)")
    parser.add_argument("--log-level", default="INFO", help="lowest level logged")
    return vars(parser.parse_args(arguments))
