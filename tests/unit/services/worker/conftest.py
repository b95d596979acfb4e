"""Engines over tiny models."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from services.worker.engine.protocol import EngineLimits
from services.worker.engine.transformers_engine import TransformersEngine
from tests.unit.services.worker.tiny_models import reference, served

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture(scope="session")
def models() -> Callable[..., torch.nn.Module]:
    """Give a served model by name and dtype; each is built once."""
    built: dict[tuple[str, torch.dtype], torch.nn.Module] = {}

    def get(name: str = "llama", dtype: torch.dtype = torch.float32) -> torch.nn.Module:
        if (name, dtype) not in built:
            built[name, dtype] = served(reference(name, dtype))
        return built[name, dtype]

    return get


@pytest.fixture
def engine_of(models) -> Callable[..., TransformersEngine]:
    """Give an engine over a tiny model; keywords are `EngineLimits`."""

    def make(name: str = "llama", dtype: torch.dtype = torch.float32, **limits: int) -> TransformersEngine:
        return TransformersEngine(models(name, dtype), EngineLimits(**{"prefill_chunk_tokens": 32, **limits}))

    return make
