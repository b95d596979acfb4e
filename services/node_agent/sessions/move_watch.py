"""Sessions that moved to this node, as its agent measures them: estimates of later moves learn from it. Pure.

The rounds of a move are shipments of keys and values (`FetchKv`), then `Generate` calls that follow
(`GenerateRequest.follows`). Its seconds are those from the first round's begin to the first token of the
last: the one that is neither followed by another nor given up, which is known once it has gone on for a
while, or finished.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from stoker.ids import new_id
from stoker.v1.node_agent_pb2 import MigrationMeasured
from stoker.v1.session_pb2 import GenerateEvent, GenerateRequest

MAX_MEASURED = 64
"""Moves kept for the reports, the last ones."""
MAX_ARRIVING = 4096
"""Moves watched at once; of more, the oldest are not measured."""
SETTLED_EVENTS = 16
"""Events after which a round was the last: the gateway asks for the next one at the first, or leaves."""
ROUND_GAP_SECONDS = 60.0
"""A round that comes later than this after the last begins another move: the earlier one was given up."""


@dataclass(slots=True)
class _Arriving:
    """A session whose rounds come in."""

    began_seconds: float
    round_seconds: float
    """When the latest round came."""
    shipped_bytes: int = 0
    """Of keys and values; 0 = it is computed from its tokens."""


class Round:
    """One round, or a session that isn't moving: fed with its events. Made by `MoveWatch.round`."""

    __slots__ = ("_events", "_first_seconds", "_request", "_watch")

    def __init__(self, watch: MoveWatch, request: GenerateRequest) -> None:
        self._watch = watch if request.follows else None
        self._request = request
        self._events = 0
        self._first_seconds = 0.0

    def saw(self, event: GenerateEvent) -> None:
        """Take one of its events."""
        watch = self._watch
        if watch is None or event.HasField("leave"):
            return
        self._events += 1
        if self._events == 1:
            self._first_seconds = watch.now_seconds()
        if event.finish_reason or self._events > SETTLED_EVENTS:
            self._watch = None
            watch.settle(self._request, self._first_seconds)


class MoveWatch:
    """Measures the moves to this node.

    Args:
        now_seconds: The clock.
    """

    def __init__(self, now_seconds: Callable[[], float]) -> None:
        self.now_seconds = now_seconds
        self._arriving: OrderedDict[str, _Arriving] = OrderedDict()
        self._measured: deque[MigrationMeasured] = deque(maxlen=MAX_MEASURED)

    @property
    def measured(self) -> Sequence[MigrationMeasured]:
        """Return the last moves, oldest first."""
        return tuple(self._measured)

    def shipped(self, session_id: str, data_bytes: int, seconds: float) -> None:
        """Take note of keys and values that came, which has just ended after so many seconds."""
        self._arrived(session_id, began_seconds=self.now_seconds() - seconds).shipped_bytes += data_bytes

    def round(self, request: GenerateRequest) -> Round:
        """Begin to watch a `Generate` call."""
        if request.follows:
            self._arrived(request.session_id, began_seconds=self.now_seconds())
        return Round(self, request)

    def _arrived(self, session_id: str, *, began_seconds: float) -> _Arriving:
        """Return the move that a round belongs to."""
        arriving = self._arriving.get(session_id)
        if arriving is None or began_seconds > arriving.round_seconds + ROUND_GAP_SECONDS:
            arriving = self._arriving[session_id] = _Arriving(began_seconds, began_seconds)
        arriving.round_seconds = self.now_seconds()
        self._arriving.move_to_end(session_id)
        while len(self._arriving) > MAX_ARRIVING:
            self._arriving.popitem(last=False)
        return arriving

    def settle(self, request: GenerateRequest, switched_seconds: float) -> None:
        """Take a move as done: its last round's first token came at `switched_seconds`."""
        arriving = self._arriving.pop(request.session_id, None)
        if arriving is None:
            return
        self._measured.append(
            MigrationMeasured(
                migration_id=new_id("mig"),
                model=request.model,
                path="ship" if arriving.shipped_bytes else "replay",
                tokens=len(request.prompt_token_ids) + len(request.generated_token_ids),
                seconds=switched_seconds - arriving.began_seconds,
                shipped_bytes=arriving.shipped_bytes,
            )
        )
