"""Tells a session that began while weights were arriving how the start went, with its first timings."""

from __future__ import annotations

from collections.abc import Callable

from services.node_agent.host_state import Hosted
from services.node_agent.reports import start_timings
from stoker.v1.session_pb2 import GenerateEvent


class AwaitedStart:
    """One session's wait for its replica's weights.

    Args:
        replica: Returns the session's replica as it stands; None when it is gone.
    """

    def __init__(self, replica: Callable[[], Hosted | None]) -> None:
        self._replica = replica
        hosted = replica()
        self._is_awaited = hosted is not None and hosted.is_loading

    def add_to(self, event: GenerateEvent) -> None:
        """Put the start's timings into the first event that carries timings, if the session waited for it.

        Of several ranks the last one may answer just after the first token: then a later event has them.
        """
        if not self._is_awaited or not event.HasField("timings"):
            return
        hosted = self._replica()
        if hosted is not None and not hosted.is_loading:
            self._is_awaited = False
            event.timings.start.CopyFrom(start_timings(hosted))
