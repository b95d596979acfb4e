"""Tests of the moves an agent measures."""

from __future__ import annotations

from services.controller.cluster_view.events import NodeReported
from services.controller.cluster_view.fold import fold
from services.controller.cluster_view.moves import move_seconds
from services.controller.cluster_view.view import Policy, View
from services.controller.wire import node_of
from services.node_agent.sessions.move_watch import MAX_MEASURED, SETTLED_EVENTS, MoveWatch
from stoker.clock import ManualClock
from stoker.ids import ModelName
from stoker.v1.node_agent_pb2 import NodeReport
from stoker.v1.session_pb2 import FINISH_REASON_LENGTH, GenerateEvent, GenerateRequest


def request(session: str = "s", *, tokens: int = 10, follows: bool = True) -> GenerateRequest:
    return GenerateRequest(
        session_id=session,
        model="m",
        prompt_token_ids=range(6),
        generated_token_ids=range(tokens - 6),
        follows=follows,
    )


def move(watch: MoveWatch, clock: ManualClock, tokens: int, seconds: float, session: str = "s") -> None:
    """Have a session come in two rounds."""
    first = watch.round(request(session, tokens=tokens - 2))
    clock.advance(seconds)
    first.saw(GenerateEvent())
    last = watch.round(request(session, tokens=tokens))
    last.saw(GenerateEvent())
    clock.advance(9)
    last.saw(GenerateEvent(finish_reason=FINISH_REASON_LENGTH))


def test_a_move_lasts_from_its_first_round_to_the_first_token_of_its_last() -> None:
    clock = ManualClock()
    watch = MoveWatch(clock.now_seconds)

    move(watch, clock, tokens=12, seconds=3)

    (measured,) = watch.measured
    assert (measured.model, measured.path, measured.tokens, measured.seconds) == ("m", "replay", 12, 3)


def test_a_round_that_goes_on_was_the_last_before_its_session_ends() -> None:
    watch = MoveWatch(lambda: 0.0)
    arriving = watch.round(request())
    for _ in range(SETTLED_EVENTS):
        arriving.saw(GenerateEvent())

    assert not watch.measured
    arriving.saw(GenerateEvent())
    assert len(watch.measured) == 1


def test_a_session_that_only_begins_here_and_a_move_given_up_are_not_measured() -> None:
    watch = MoveWatch(lambda: 0.0)

    watch.round(request("new", follows=False)).saw(GenerateEvent(finish_reason=FINISH_REASON_LENGTH))
    watch.round(request("given up")).saw(GenerateEvent())

    assert not watch.measured


def test_the_last_moves_are_kept_each_under_its_own_id() -> None:
    clock = ManualClock()
    watch = MoveWatch(clock.now_seconds)

    for number in range(MAX_MEASURED + 1):
        move(watch, clock, tokens=10 + number, seconds=1, session=f"s{number}")

    assert len({measured.migration_id for measured in watch.measured}) == MAX_MEASURED
    assert watch.measured[0].tokens == 11


def test_placement_learns_the_line_through_the_moves_an_agent_reports() -> None:
    clock = ManualClock()
    watch = MoveWatch(clock.now_seconds)
    for number, tokens in enumerate((100, 200, 300)):
        move(watch, clock, tokens=tokens, seconds=0.5 + 0.01 * tokens, session=f"s{number}")

    report = NodeReport(node_id="n", migrations=watch.measured)
    view = fold(View(), NodeReported(node=node_of(report, 0.0)))

    assert abs(move_seconds(view, ModelName("m"), 1_000, Policy()) - 10.5) < 0.01
