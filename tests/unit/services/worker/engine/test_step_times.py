"""A step that takes much longer than those before is late."""

from __future__ import annotations

from services.worker.engine.step_times import FEWEST_STEPS, StepTimes


def after(*durations: float) -> StepTimes:
    """Return the times of steps that took so long, one after the other, the last ending at 100."""
    times, now_seconds = StepTimes(), 100 - sum(durations)
    for duration in durations:
        times.begin(now_seconds)
        now_seconds += duration
        times.end(now_seconds)
    return times


def test_a_step_is_late_once_it_takes_longer_than_steps_do() -> None:
    times = after(*[0.2] * FEWEST_STEPS)
    times.begin(100.0)

    assert not times.is_late(100.2)
    assert times.is_late(100.3)


def test_a_single_long_step_does_not_make_long_steps_usual() -> None:
    times = after(0.2, 0.2, 9.0, 0.2, 0.2, 0.2)
    times.begin(100.0)

    assert times.is_late(100.3)


def test_no_step_is_late_before_some_are_known_or_between_steps() -> None:
    unknown = after(*[0.2] * (FEWEST_STEPS - 1))
    unknown.begin(100.0)
    between = after(*[0.2] * FEWEST_STEPS)

    assert not unknown.is_late(999.0)
    assert not between.is_late(999.0)
    assert unknown.is_stepping
    assert not between.is_stepping


def test_what_is_usual_follows_the_latest_steps() -> None:
    times = after(*[0.1] * 20, *[0.4] * 15)
    times.begin(100.0)

    assert not times.is_late(100.45)
