"""Cluster state: one protocol, two backends (embedded, etcd), one test suite for both.

`open_state` gives a `StateStore`; `docs/state.md` says what one may rely on.
"""

from stoker.state.election import FencedState, Leader, campaign, observe
from stoker.state.errors import LeaseLost, StateUnavailable
from stoker.state.leases import Lease
from stoker.state.open import open_state
from stoker.state.protocol import (
    ABSENT,
    NO_LEASE,
    Change,
    Changes,
    Committed,
    Compare,
    Conflict,
    CreateRevisionIs,
    Delete,
    Deleted,
    LeaseId,
    ModRevisionIs,
    Outcome,
    Put,
    Resync,
    Snapshot,
    StateStore,
    Stored,
    ValueIs,
    Versioned,
    WatchEvent,
    Write,
    absent,
    unchanged,
)

__all__ = [
    "ABSENT",
    "NO_LEASE",
    "Change",
    "Changes",
    "Committed",
    "Compare",
    "Conflict",
    "CreateRevisionIs",
    "Delete",
    "Deleted",
    "FencedState",
    "Leader",
    "Lease",
    "LeaseId",
    "LeaseLost",
    "ModRevisionIs",
    "Outcome",
    "Put",
    "Resync",
    "Snapshot",
    "StateStore",
    "StateUnavailable",
    "Stored",
    "ValueIs",
    "Versioned",
    "WatchEvent",
    "Write",
    "absent",
    "campaign",
    "observe",
    "open_state",
    "unchanged",
]
