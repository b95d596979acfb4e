"""What a client feels of a move: its longest time between two tokens, phase by phase. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum


class Phase(StrEnum):
    """What a move does, in order."""

    FIND = "find"
    """Looks for a destination; the model may have to be started there."""
    SHIP = "ship"
    """Keys and values go to the destination."""
    COMPUTE = "compute"
    """The destination computes what is missing."""
    SWITCH = "switch"
    """From the source's last token to the destination's first new one."""


@dataclass(slots=True)
class MoveGaps:
    """Times between tokens while a move is under way."""

    longest_seconds: dict[Phase, float] = field(default_factory=lambda: dict.fromkeys(Phase, 0.0))
    """0 where a phase saw no two tokens."""

    def note(self, phase: Phase, gap_seconds: float) -> None:
        """Take the time between two tokens, the second of which came in this phase."""
        self.longest_seconds[phase] = max(self.longest_seconds[phase], gap_seconds)

    @property
    def worst(self) -> tuple[Phase, float]:
        """Return the longest of all, and the phase it ended in."""
        phase = max(Phase, key=lambda phase: self.longest_seconds[phase])
        return phase, self.longest_seconds[phase]
