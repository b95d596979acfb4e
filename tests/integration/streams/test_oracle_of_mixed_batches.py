"""The oracle in mixed batches: a kill and a move after each of the first 64 tokens, and nobody's bits change.

Eight streams share a batch, greedy and sampled ones: each is compared, and each is what goes on beside the
others. Batches of one: `test_oracle` and `test_shipped_moves`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from services.gateway.text.model_text import ModelText
from services.worker.engine.transformers_engine import TransformersEngine
from tests.integration.streams.engines import LIMITS, NewEngine, engine_model
from tests.integration.streams.mixed_batch import POSITIONS, TOKENS, DyingReplicas, Stream, hopped, streams
from tests.integration.streams.test_oracle import GREEDY, SAMPLED
from tests.unit.services.worker.tiny_models import numbers, run

STREAMS = streams(GREEDY, SAMPLED)
EVERY_POSITION = list(range(1, POSITIONS + 1))


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def new_engine(folder: Path, request: pytest.FixtureRequest) -> NewEngine:
    """With room for all streams in one batch, in both dtypes."""
    model = engine_model(folder, getattr(torch, request.param))
    return lambda: TransformersEngine(model, replace(LIMITS, max_batch=len(STREAMS)))


def at_any(found: dict[str, list[int]], of: Sequence[Stream]) -> list[int]:
    """Return the positions of all faults of some streams, ascending, each as often as it occurred."""
    return sorted(position for stream in of for position in found[stream.name])


@pytest.fixture(params=["greedy", "sampled"])
def some(request: pytest.FixtureRequest) -> list[Stream]:
    """The streams of one sampling."""
    return [stream for stream in STREAMS if stream.is_greedy == (request.param == "greedy")]


def test_the_streams_of_a_sampling_have_a_fault_at_every_position(some: list[Stream]) -> None:
    planned = {stream.name: list(stream.positions) for stream in some}

    assert at_any(planned, some) == EVERY_POSITION
    assert all(list(stream.positions) == sorted(stream.positions) for stream in some)


async def test_a_kill_after_every_token_of_a_mixed_batch_changes_none_of_its_streams(
    new_engine: NewEngine, text: ModelText
) -> None:
    faultless = DyingReplicas(new_engine, {stream.name: () for stream in STREAMS})
    wanted = await asyncio.gather(*(stream.answer(faultless, text) for stream in STREAMS))
    replicas = DyingReplicas(new_engine, {stream.name: stream.positions for stream in STREAMS})

    found = await asyncio.gather(*(stream.answer(replicas, text) for stream in STREAMS))

    assert found == wanted
    assert {len(each.token_ids) for each in found} == {TOKENS}
    for is_greedy in (True, False):
        some = [stream for stream in STREAMS if stream.is_greedy == is_greedy]
        assert at_any(replicas.resumed, some) == EVERY_POSITION
    assert min(replicas.batch_sizes) == len(STREAMS)


def test_a_hop_after_every_token_between_mixed_batches_changes_none_of_their_streams(
    new_engine: NewEngine,
) -> None:
    wanted, _ = run(new_engine(), [stream.submit() for stream in STREAMS])

    found = hopped(new_engine, STREAMS)

    for name, made in found.made.items():
        assert numbers(made) == numbers(wanted[name])
    for is_greedy in (True, False):
        some = [stream for stream in STREAMS if stream.is_greedy == is_greedy]
        assert at_any(found.positions, some) == EVERY_POSITION
    assert min(min(mates) for mates in found.mates) >= 1
    assert found.computed_tokens == sum(len(stream.prompt) for stream in STREAMS)
