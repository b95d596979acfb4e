"""One running cluster for the tests that don't break it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.end_to_end.stoker_up import StokerUp, stoker_up
from tests.integration.tiny_model import make_tiny_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random model, as `save_pretrained` writes it: served in place."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StokerUp]:
    """A cluster shared by a module's tests; its pool holds eight chunks, and it rebalances soon."""
    soon = ("rebalance_crowded_seconds=0.2", "rebalance_look_seconds=0.2", "rebalance_hysteresis_ratio=1")
    settings = [part for each in soon for part in ("--set", f"controller.{each}")]
    with stoker_up(tmp_path_factory.mktemp("up"), "--pool", "0.125", *settings) as running:
        yield running
