"""How the thread of a following rank ends, and what becomes of its process then."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from services.worker.ranks.following import start_following
from services.worker.weights.weights_gate import WeightsGate
from stoker.errors import LoadFailed, PeerError

WAIT_SECONDS = 60.0


class Rank(SimpleNamespace):
    """What a thread needs of a `LoadedFollower`, and how often its orders were closed."""

    def __init__(self, error: Exception | None, gate: WeightsGate) -> None:
        def follow(_orders: object) -> None:
            if error is not None:
                raise error

        self.closed = 0
        orders = SimpleNamespace(orders=lambda: iter(()), close=self.close)
        super().__init__(follower=SimpleNamespace(follow=follow), orders=orders, gate=gate)

    def close(self) -> None:
        """Note it."""
        self.closed += 1


def end_of(error: Exception | None, gate: WeightsGate) -> tuple[int, int]:
    """Return how often a rank's orders were closed and its process was ended."""
    rank, ends = Rank(error, gate), []
    thread = start_following(rank, lambda: ends.append(1))
    thread.join(WAIT_SECONDS)
    assert not thread.is_alive()
    return rank.closed, len(ends)


@pytest.mark.parametrize("error", [None, PeerError("lost step"), LoadFailed("another one")])
def test_a_rank_that_has_nobody_to_follow_or_lost_step_ends(error: Exception | None) -> None:
    assert end_of(error, WeightsGate(1)) == (1, 1)


def test_a_rank_whose_weights_do_not_come_is_ended_by_who_hears_of_it() -> None:
    """Were it gone at once, rank 0 would report a broken connection before the load's own error is known."""
    gate, error = WeightsGate(1), LoadFailed("disk broke")
    gate.fail(error)

    assert end_of(error, gate) == (0, 0)
