"""A session that stands still for the last round of its move, while others go on."""

from __future__ import annotations

import pytest

from services.worker.engine.protocol import EngineLimits, TokenOut
from services.worker.engine.transformers_engine import TransformersEngine
from stoker.errors import NotFound
from stoker.ids import SessionId
from tests.unit.services.worker.tiny_models import numbers, request, run


class ManualClock:
    """Goes on when the test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        """Return the time."""
        return self.now


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def engine(models, clock: ManualClock) -> TransformersEngine:
    return TransformersEngine(models(), EngineLimits(prefill_chunk_tokens=32), clock=clock)


def test_a_held_session_makes_no_token_until_its_time_is_over(
    engine: TransformersEngine, clock: ManualClock
) -> None:
    wanted, other = request("s", max_tokens=9), request("other", max_tokens=9)
    whole, _ = run(engine, [wanted, other])
    for each in (wanted, other):
        engine.submit(each)
    outputs = [out for _ in range(3) for out in engine.step()]

    tokens = engine.hold(SessionId("s"), 2.0)
    meanwhile = [out for _ in range(4) for out in engine.step()]
    clock.now += 2.0
    rest, _ = run(engine)

    made = [out for out in outputs if isinstance(out, TokenOut) and out.session_id == "s"]
    assert tokens == len(wanted.prompt_token_ids) + len(made)
    assert {out.session_id for out in meanwhile} == {"other"}
    assert numbers(made + rest["s"]) == numbers(whole["s"])


def test_an_engine_whose_sessions_are_all_held_has_no_work_until_one_goes_on(
    engine: TransformersEngine, clock: ManualClock
) -> None:
    engine.submit(request("s", max_tokens=9))
    engine.step()
    assert engine.held_seconds() == 0.0

    engine.hold(SessionId("s"), 2.0)

    assert not engine.has_work()
    assert engine.held_seconds() == 2.0
    clock.now += 2.0
    assert engine.has_work()
    engine.hold(SessionId("s"), 2.0)
    engine.hold(SessionId("s"), 0.0)
    assert engine.has_work()
    engine.hold(SessionId("s"), 2.0)
    engine.cancel(SessionId("s"))
    assert engine.has_work()
    engine.step()
    assert engine.held_seconds() is None


def test_who_does_not_run_cannot_be_held(engine: TransformersEngine) -> None:
    with pytest.raises(NotFound):
        engine.hold(SessionId("s"), 1.0)
