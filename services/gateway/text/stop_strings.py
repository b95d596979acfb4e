"""Stop strings: end a text before them, also where they lie across the borders of tokens.

Text that may turn out to be the beginning of a stop string is held back until it is certain. What comes out
does not depend on how the text was cut into pieces: the stop string that is complete first wins, the longest
of those.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopFilter:
    """Filters one session's text.

    Args:
        stops: Strings that end the text; empty ones are not allowed.

    Attributes:
        matched: The stop string that was found; None until then.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(dict.fromkeys(stops))
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """Take the next piece; return what may be shown. After a match nothing is shown any more."""
        if not self._stops:
            return text
        if self.matched is not None:
            return ""
        self._held += text
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            _, start, self.matched = min(found)
            shown, self._held = self._held[:start], ""
            return shown
        keep = self._undecided_characters()
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown

    def flush(self) -> str:
        """Return what was held back; the text ends here."""
        shown, self._held = self._held, ""
        return shown

    def _undecided_characters(self) -> int:
        """Return the length of the longest end of the held text that begins a stop string."""
        for length in range(min(self._longest - 1, len(self._held)), 0, -1):
            end = self._held[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0
