"""Which owner of a session this node has seen last: earlier ones are refused, whichever worker they ask."""

from __future__ import annotations

from collections import OrderedDict

from stoker.errors import Fenced

REMEMBERED_SESSIONS = 65_536
"""The oldest gives way: about 10 MB, hours of sessions for one host. Beyond it, the gateway still refuses."""


class EpochFence:
    """The highest epoch of each session that owned it here."""

    def __init__(self, remembered: int = REMEMBERED_SESSIONS) -> None:
        self._remembered = remembered
        self._highest: OrderedDict[str, int] = OrderedDict()

    def highest(self, session_id: str) -> int:
        """Return the highest epoch of an owner that a session has had here; -1 = none is remembered."""
        return self._highest.get(session_id, -1)

    def admit(self, session_id: str, epoch: int, *, follows: bool) -> None:
        """Take note of a request for a session.

        Args:
            session_id: The session.
            epoch: The request's.
            follows: It only prepares to own the session: the present owner stays.

        Raises:
            Fenced: A later owner has been here.
        """
        highest = self._highest.get(session_id, -1)
        if epoch <= highest:
            raise Fenced(
                f"session {session_id} has had an owner of epoch {highest} here; "
                f"a request of epoch {epoch} is late",
                details={"highest_epoch": highest},
            )
        if follows:
            return
        self._highest[session_id] = epoch
        self._highest.move_to_end(session_id)
        while len(self._highest) > self._remembered:
            self._highest.popitem(last=False)
