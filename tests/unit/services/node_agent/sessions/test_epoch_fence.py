"""A node refuses the earlier owners of a session."""

from __future__ import annotations

import pytest

from services.node_agent.sessions.epoch_fence import EpochFence
from stoker.errors import Fenced


def test_an_epoch_owns_a_session_once() -> None:
    fence = EpochFence()
    fence.admit("a", 0, follows=False)

    with pytest.raises(Fenced, match="epoch 0 is late"):
        fence.admit("a", 0, follows=False)


def test_an_earlier_owner_is_refused_whatever_it_asks_for() -> None:
    fence = EpochFence()
    fence.admit("a", 3, follows=False)

    for follows in (False, True):
        with pytest.raises(Fenced, match="had an owner of epoch 3") as refused:
            fence.admit("a", 2, follows=follows)
        assert refused.value.details == {"highest_epoch": 3}


def test_who_only_follows_leaves_the_present_owner_its_session() -> None:
    fence = EpochFence()
    fence.admit("a", 1, follows=False)
    fence.admit("a", 7, follows=True)

    fence.admit("a", 2, follows=False)


def test_sessions_are_apart_and_the_oldest_is_forgotten() -> None:
    fence = EpochFence(remembered=2)
    for session_id in ("a", "b", "c"):
        fence.admit(session_id, 5, follows=False)

    fence.admit("a", 0, follows=False)
    with pytest.raises(Fenced):
        fence.admit("c", 5, follows=False)
