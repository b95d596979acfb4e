"""What is to happen in the simulated time happens in order, what follows at once before what is later."""

from __future__ import annotations

from services.controller.simulation.clock import VirtualClock


def test_what_happens_then_comes_after_all_that_happens_now_and_before_what_is_later() -> None:
    clock = VirtualClock()
    happened: list[str] = []

    def first() -> None:
        happened.append("first")
        clock.then(lambda: happened.append("then"))
        clock.after(0.0, lambda: happened.append("asked for later, now"))

    clock.at(1.0, first)
    clock.at(1.0, lambda: happened.append("second"))
    clock.at(2.0, lambda: happened.append("later"))
    while clock.step():
        pass

    assert happened == ["first", "second", "then", "asked for later, now", "later"]


def test_what_happens_then_needs_nothing_else_to_happen() -> None:
    clock = VirtualClock()
    happened: list[float] = []

    clock.then(lambda: happened.append(clock.now_seconds))
    clock.then(lambda: happened.append(clock.now_seconds))

    assert clock.step()
    assert clock.step()
    assert not clock.step()
    assert happened == [0.0, 0.0]
