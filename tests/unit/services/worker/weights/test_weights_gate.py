from __future__ import annotations

import threading

import pytest

from services.worker.weights.weights_gate import PassInterrupted, WeightsGate
from stoker.errors import LoadFailed

PATIENCE_SECONDS = 60


def waiting(gate: WeightsGate, stage: int) -> tuple[threading.Thread, list[BaseException | None]]:
    """Start a thread that waits at the gate; its outcome comes into the list."""
    outcome: list[BaseException | None] = []

    def wait() -> None:
        try:
            gate.wait(stage)
        except BaseException as error:  # noqa: BLE001 - the test looks at it
            outcome.append(error)
        else:
            outcome.append(None)

    thread = threading.Thread(target=wait)
    thread.start()
    return thread, outcome


def test_a_stage_that_is_open_is_not_waited_for() -> None:
    gate = WeightsGate(3)
    gate.open(2)

    gate.wait(1)

    assert not gate.is_open
    assert gate.has_opened(2)
    assert not gate.has_opened(3)


def test_a_pass_waits_until_its_stage_opens() -> None:
    gate = WeightsGate(3)
    thread, outcome = waiting(gate, 1)
    gate.open(1)
    gate.open(2)
    thread.join(PATIENCE_SECONDS)

    assert outcome == [None]


def test_a_gate_never_closes_again() -> None:
    gate = WeightsGate(2)
    gate.open(2)
    gate.open(1)

    assert gate.is_open


def test_a_failed_load_ends_every_wait_with_its_reason_for_ever() -> None:
    gate = WeightsGate(2)
    thread, outcome = waiting(gate, 1)
    lost = LoadFailed("disk broke")
    gate.fail(lost)
    gate.fail(LoadFailed("later reasons don't count"))
    thread.join(PATIENCE_SECONDS)

    assert outcome == [lost]
    with pytest.raises(LoadFailed, match="disk broke"):
        gate.wait(0)


def test_stages_that_opened_before_a_failure_can_still_be_used() -> None:
    gate = WeightsGate(2)
    gate.open(2)
    gate.fail(LoadFailed("too late to matter"))

    gate.wait(1)


def test_an_interrupt_ends_one_wait_and_the_next_one_waits_again() -> None:
    gate = WeightsGate(1)
    thread, outcome = waiting(gate, 0)
    gate.interrupt()
    thread.join(PATIENCE_SECONDS)
    again, second = waiting(gate, 0)
    gate.open(1)
    again.join(PATIENCE_SECONDS)

    assert isinstance(outcome[0], PassInterrupted)
    assert second == [None]


def test_an_interrupt_before_the_wait_is_not_lost() -> None:
    gate = WeightsGate(1)
    gate.interrupt()

    with pytest.raises(PassInterrupted):
        gate.wait(0)


def test_an_open_gate_cannot_be_interrupted() -> None:
    gate = WeightsGate(1)
    gate.open(1)
    gate.interrupt()

    gate.wait(0)


def test_overlap_counts_from_the_first_wait_and_stalls_only_while_waiting() -> None:
    now = [10.0]
    gate = WeightsGate(2, clock=lambda: now[0])
    assert (gate.overlap_seconds(), gate.stall_seconds()) == (0.0, 0.0)
    gate.open(1)
    gate.wait(0)
    now[0] = 14.0

    assert (gate.overlap_seconds(), gate.stall_seconds()) == (4.0, 0.0)
