"""A job: a request on its way, with its trace, its sink and its deadline."""

from __future__ import annotations

from dataclasses import dataclass

from services.gateway.text_request import Sink, TextRequest
from services.gateway.trace import Trace
from stoker.clock import Clock
from stoker.errors import DeadlineExceeded


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What every step of a request needs."""

    request: TextRequest
    trace: Trace
    sink: Sink
    clock: Clock
    timeout_seconds: float
    """Longest life, from the request's arrival."""

    def age_seconds(self) -> float:
        """Return the time since the request arrived."""
        return self.clock.now_seconds() - self.trace.started_seconds

    def deadline_left_seconds(self) -> float:
        """Return what is left until the answer must begin, at least a millisecond; 0 = it has no deadline."""
        if self.request.deadline_seconds is None:
            return 0.0
        return max(0.001, self.request.deadline_seconds - self.age_seconds())

    def left_seconds(self) -> float:
        """Return the time left, above 0.

        Raises:
            DeadlineExceeded: There is none.
        """
        left = self.timeout_seconds - self.age_seconds()
        if left <= 0:
            raise DeadlineExceeded(
                f"the request took longer than {self.timeout_seconds:g} s; ask for fewer tokens or try later"
            )
        return left
