"""The longest time between tokens, phase by phase."""

from __future__ import annotations

from services.gateway.sessions.move_gaps import MoveGaps, Phase


def test_each_phase_keeps_its_longest_gap_and_the_worst_of_all_is_named() -> None:
    gaps = MoveGaps()
    for phase, seconds in ((Phase.SHIP, 0.2), (Phase.SHIP, 0.3), (Phase.SHIP, 0.1), (Phase.SWITCH, 0.25)):
        gaps.note(phase, seconds)

    assert gaps.longest_seconds[Phase.SHIP] == 0.3
    assert gaps.longest_seconds[Phase.FIND] == 0.0
    assert gaps.worst == (Phase.SHIP, 0.3)
