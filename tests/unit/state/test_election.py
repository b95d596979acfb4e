"""What a watch on the election's key says about who leads."""

from __future__ import annotations

import pytest

from stoker.state import Changes, Deleted, Leader, Resync, Snapshot, Stored, Versioned, WatchEvent
from stoker.state.election import leaders_of


def item(key: str, revision: int) -> Versioned:
    """Build a key of an election."""
    return Versioned(key=key, value=b"me", create_revision=revision, mod_revision=revision + 3)


@pytest.mark.parametrize(
    ("event", "leaders"),
    [
        (Resync(snapshot=Snapshot(revision=9)), [None]),
        (Resync(snapshot=Snapshot(revision=9, items=(item("e2", 3),))), [None]),
        (
            Resync(snapshot=Snapshot(revision=9, items=(item("e", 3), item("e2", 4)))),
            [Leader(identity=b"me", term=3)],
        ),
        (Changes(revision=9, changes=(Deleted(key="e", revision=9),)), [None]),
        (Changes(revision=9, changes=(Stored(item=item("e", 3)),)), [Leader(identity=b"me", term=3)]),
        (Changes(revision=9, changes=(Stored(item=item("e2", 3)),)), []),
    ],
)
def test_only_the_elections_own_key_says_who_leads(event: WatchEvent, leaders: list[Leader | None]) -> None:
    assert leaders_of(event, "e") == leaders
