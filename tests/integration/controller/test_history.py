"""The checker finds what it is there to find."""

from __future__ import annotations

import json

import pytest

from stoker.state import Change, Changes, Deleted, Stored, Versioned
from tests.integration.controller.history import violations


def _stored(key: str, value: str = "", *, revision: int) -> Change:
    item = Versioned(key=key, value=value.encode(), create_revision=revision, mod_revision=revision)
    return Stored(item=item)


def _reserved(replica_id: str, device: int, *, revision: int) -> Changes:
    record = json.dumps({"node_id": "n", "devices": [device]})
    return Changes(
        revision=revision,
        changes=(
            _stored(f"devices/n/{device}", replica_id, revision=revision),
            _stored(f"reservations/{replica_id}", record, revision=revision),
        ),
    )


def _deleted(*keys: str, revision: int) -> Changes:
    return Changes(revision=revision, changes=tuple(Deleted(key=key, revision=revision) for key in keys))


LEADS = Changes(revision=1, changes=(_stored("leader", "a", revision=1),))


def test_a_device_that_changes_hands_through_freedom_is_right() -> None:
    freed = _deleted("devices/n/0", "reservations/r1", revision=3)

    assert violations([LEADS, _reserved("r1", 0, revision=2), freed, _reserved("r2", 0, revision=4)]) == []


@pytest.mark.parametrize(
    ("history", "complaint"),
    [
        ([LEADS, _reserved("r1", 0, revision=2), _reserved("r2", 0, revision=3)], "given to r2, r1 has it"),
        ([_reserved("r1", 0, revision=2)], "nobody led"),
        ([LEADS, _deleted("leader", revision=2), _reserved("r1", 0, revision=3)], "nobody led"),
        (
            [LEADS, _reserved("r1", 0, revision=2), _deleted("devices/n/0", revision=3)],
            "freed while its owner keeps",
        ),
        (
            [LEADS, _reserved("r1", 0, revision=2), _deleted("reservations/r1", revision=3)],
            "still its",
        ),
        (
            [LEADS, Changes(revision=2, changes=(_stored("devices/n/0", "r1", revision=2),))],
            "does not reserve it",
        ),
    ],
)
def test_what_must_not_happen_is_found(history: list[Changes], complaint: str) -> None:
    found = violations(history)

    assert len(found) >= 1
    assert complaint in found[0]
