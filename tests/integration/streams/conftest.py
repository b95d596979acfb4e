"""The tiny model that streams of this folder come from, and makers of engines over it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from services.gateway.text.model_text import ModelText
from services.worker.engine.transformers_engine import TransformersEngine
from tests.integration.streams.engines import LIMITS, NewEngine, engine_model, text_of
from tests.integration.tiny_model import make_tiny_model


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("streams") / "tiny", layers=2)


@pytest.fixture(scope="session")
def text(folder: Path) -> ModelText:
    return text_of(folder)


@pytest.fixture(scope="session")
def new_engine(folder: Path) -> NewEngine:
    """In the dtype whose rounding is the coarsest."""
    model = engine_model(folder, torch.bfloat16)
    return lambda: TransformersEngine(model, LIMITS)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def each_engine(folder: Path, request: pytest.FixtureRequest) -> NewEngine:
    """In both dtypes, one after the other."""
    model = engine_model(folder, getattr(torch, request.param))
    return lambda: TransformersEngine(model, LIMITS)
