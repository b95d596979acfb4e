"""Which nodes have what, e.g. a checkpoint: groups whose changed copies cost what changes. Pure.

A cluster's stores hold millions of checkpoints together, and a decision asks about one of them. So changes
are noted, and sorted into the groups when somebody asks, or when there are many: all of one group at once.
Whoever asks gets what sorting them in at once would have given.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Generic, TypeVar

from immutables import Map

from stoker.ids import NodeId

K = TypeVar("K")
Members = Map[NodeId, None]
NOBODY: Members = Map()
MOST_NOTED = 4_000_000
"""Changes noted before they are sorted in though nobody asked: the more at once, the less each costs."""
MOST_CHANGES = 1024
"""Changes of nodes, likewise: each copy names them all."""
_Noted = tuple[NodeId, tuple[K, ...], tuple[K, ...]]
"""A node, the groups that it leaves, and those it joins."""


class Groups(Generic[K]):
    """Nodes by what they have; equal to others with the same nodes."""

    __slots__ = ("_count", "_noted", "_sorted")

    def __init__(self) -> None:
        self._sorted: Map[K, Members] = Map()
        self._noted: tuple[_Noted[K], ...] = ()
        self._count = 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Groups) and self._all() == other._all()

    __hash__ = None  # type: ignore[assignment]  # nobody needs it as a key

    def get(self, key: K) -> Members:
        """Return the nodes that have something."""
        return self._all().get(key, NOBODY)

    def moved(self, node_id: NodeId, left: Iterable[K], joined: Iterable[K]) -> Groups[K]:
        """Return the groups after a node has left some, each of which it was in, and joined others."""
        noted = (node_id, tuple(left), tuple(joined))
        if not noted[1] and not noted[2]:
            return self
        after: Groups[K] = Groups()
        after._sorted, after._noted = self._sorted, (*self._noted, noted)
        after._count = self._count + len(noted[1]) + len(noted[2])
        if after._count > MOST_NOTED or len(after._noted) > MOST_CHANGES:
            after._all()
        return after

    def _all(self) -> Map[K, Members]:
        """Return the groups, what was noted sorted in; that it was is no difference to anybody."""
        if self._noted:
            self._sorted = _with(self._sorted, self._noted)
            self._noted, self._count = (), 0
        return self._sorted


def _with(groups: Map[K, Members], noted: Iterable[_Noted[K]]) -> Map[K, Members]:
    by_key: dict[K, dict[NodeId, bool]] = {}
    for node_id, left, joined in noted:
        for key in left:
            by_key.setdefault(key, {})[node_id] = False
        for key in joined:
            by_key.setdefault(key, {})[node_id] = True
    draft = groups.mutate()
    for key, changes in by_key.items():
        before = draft.get(key)
        if before is None:
            joined_nodes = [node_id for node_id, is_in in changes.items() if is_in]
            if joined_nodes:
                draft[key] = Map(dict.fromkeys(joined_nodes))
            continue
        members = before.mutate()
        for node_id, is_in in changes.items():
            if is_in:
                members[node_id] = None
            else:
                members.pop(node_id, None)
        found = members.finish()
        if found:
            draft[key] = found
        else:
            draft.pop(key, None)
    return draft.finish()
