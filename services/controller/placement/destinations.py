"""Where replicas that make room for another could go, and what that takes at least. Pure."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from operator import itemgetter
from typing import Final, NamedTuple

from services.controller.cluster_view.estimate import device_bytes
from services.controller.cluster_view.lessons import parts_like
from services.controller.placement.bounds import NOBODY, Bounded, Bounds
from services.controller.placement.options import Option, Rank, free_option, rank
from services.controller.placement.rates import ROUNDING, copy_seconds, swiftest_source
from services.controller.placement.room import Situation, can_ever, wanted_of
from services.controller.placement.streams import free_among, free_streams, known_nodes
from stoker.ids import ModelName, NodeId

_Everybody = tuple[AbstractSet[NodeId], list[Bounded], Rank | None]
"""Free nodes known to be special for a model, their bounds, and the rank that no other one beats."""
_UNKNOWN: Final = (0.0, 0.0)
"""In place of what was not looked up yet."""
_SECONDS: Final = 4
"""Where a rank has its seconds."""


class Destinations:
    """Where replicas could move to; remembers what it has found, for one decision."""

    def __init__(self, situation: Situation) -> None:
        self._situation = situation
        self._copied: dict[int, float] = {}
        self._floors: dict[ModelName, _Floor] = {}
        self._elsewhere: dict[ModelName, _Elsewhere] = {}
        self._source: tuple[float, float] | None = _UNKNOWN

    def copied_seconds(self, byte_count: int) -> float:
        """Return what copying so many bytes to a device takes at least, anywhere."""
        seconds = self._copied.get(byte_count)
        if seconds is None:
            seconds = self._copied[byte_count] = copy_seconds(self._situation.index, byte_count)
        return seconds

    def swiftest_seconds(self, name: ModelName) -> float:
        """Return what starting the model takes at least, were there a free node with all of it in memory."""
        return self._floor_of(name).swiftest_seconds

    def floor_seconds(self, name: ModelName) -> float | None:
        """Return what no start on free slots is quicker than, without a look at nodes; None = nowhere."""
        floor = self._floor_of(name)
        return floor.swiftest_seconds * ROUNDING if floor.near else floor.far_seconds

    def least_seconds(self, name: ModelName) -> float | None:
        """Return what starting the model on free slots takes at least, anywhere; None = nowhere."""
        return self._of(name).least_seconds

    def best(self, name: ModelName, not_on: NodeId, count: int) -> tuple[Option, ...]:
        """Return the best `count` ways to start a model that disturb nobody, on nodes other than `not_on`."""
        return self._of(name).best(not_on, count)

    def _of(self, name: ModelName) -> _Elsewhere:
        found = self._elsewhere.get(name)
        if found is None:
            found = self._elsewhere[name] = _Elsewhere(self._situation, self._floor_of(name))
        return found

    def _floor_of(self, name: ModelName) -> _Floor:
        floor = self._floors.get(name)
        if floor is None:
            if self._source is _UNKNOWN:
                self._source = swiftest_source(self._situation.index)
            floor = self._floors[name] = _floor_of(self._situation, name, self._source)
        return floor


class _Floor(NamedTuple):
    """What is known of a model's starts on free slots before any of the nodes was looked at.

    Attributes:
        name: The model.
        near: Nodes with free slots that have some of it in memory.
        swiftest_seconds: What a start takes at least, were one of those to have all of it.
        far_seconds: What it takes at least on any other node with free slots; None = nobody has any.
    """

    name: ModelName
    near: AbstractSet[NodeId]
    swiftest_seconds: float
    far_seconds: float | None


def _floor_of(situation: Situation, name: ModelName, source: tuple[float, float] | None) -> _Floor:
    index, model = situation.index, situation.view.models[name]
    parts, byte_count = parts_like(situation.view, model), device_bytes(model)
    far_seconds = None
    if source is not None:
        rate, worker_seconds = source
        far_seconds = parts.start_seconds(worker_seconds, byte_count / rate) * ROUNDING
    return _Floor(
        name,
        free_among(index, index.in_memory.get(model.checkpoint)),
        parts.start_seconds(0.0, copy_seconds(index, byte_count)),
        far_seconds,
    )


class _Elsewhere:
    """Where one model could be started on free slots.

    Mostly one of the nodes that have it in memory is the quickest: the others, more of whom have it on their
    disks, are not even listed then.
    """

    def __init__(self, situation: Situation, floor: _Floor) -> None:
        self._situation = situation
        self._wanted = wanted = wanted_of(situation.view, situation.index, floor.name)
        self._bounds = Bounds(situation, wanted, may_disturb=False)
        is_anywhere = not wanted.model.required_labels
        self._near = self._bounds.free_on(floor.near) if floor.near and is_anywhere else []
        self._far_seconds = floor.far_seconds or 0.0
        self._everybody: _Everybody | None = None
        self._options: tuple[Option, ...] = ()
        self._count = 0
        self.least_seconds = self._least_seconds()
        """What a start takes at least; None = there is no place for one."""

    def _least_seconds(self) -> float | None:
        if self._near:
            near_seconds = min([rank[_SECONDS] for rank, _ in self._near])
            if near_seconds <= self._far_seconds:
                return near_seconds
        _, bounded, others = self._all()
        least = [rank[_SECONDS] for rank, _ in bounded]
        if others is not None:
            least.append(others[_SECONDS])
        return min(least, default=None)

    def _all(self) -> _Everybody:
        if self._everybody is None:
            known = known_nodes(self._situation, self._wanted, free=True)
            bounded = self._bounds.free_on(known) if known else []
            self._everybody = known, bounded, self._bounds.least_free()
        return self._everybody

    def best(self, not_on: NodeId, count: int) -> tuple[Option, ...]:
        """Return the best ways that disturb nobody, on nodes other than `not_on`, at most `count`."""
        has_room_itself = len(self._situation.index.summaries[not_on].free) >= self._wanted.slots
        needed = count + has_room_itself
        if self._count < needed:
            self._count, self._options = needed, self._look(needed)
        return tuple([option for option in self._options if option.node_id != not_on][:count])

    def _look(self, count: int) -> tuple[Option, ...]:
        situation, wanted = self._situation, self._wanted
        found: list[tuple[Rank, Option]] = []
        looked: set[NodeId] = set()
        self._bounds.best = None
        for bound, node_id in self._nodes():
            if len(found) >= count and bound > found[count - 1][0]:
                break
            if node_id == NOBODY or node_id in looked or self._bounds.is_behind(bound, node_id):
                continue
            looked.add(node_id)
            node, summary = situation.view.nodes[node_id], situation.index.summaries[node_id]
            option = free_option(situation, node, wanted) if can_ever(wanted, node, summary) else None
            if option is not None:
                insort(found, (rank(option, situation.policy), option), key=itemgetter(0))
                if len(found) >= count:
                    self._bounds.best = found[count - 1][0]
        return tuple([option for _, option in found[:count]])

    def _nodes(self) -> Iterator[Bounded]:
        """Yield bounds of nodes with room, the lowest first; some maybe twice.

        Those that have it near come first as long as no other can beat them, then those that hold it.
        """
        far_seconds, preferred = self._far_seconds, len(self._wanted.model.preferred_labels)
        far: Rank = (int(far_seconds / self._bounds.tie_seconds), 0, 0.0, -preferred, far_seconds, "")
        for bounded in self._near:
            if bounded[0] > far:
                break
            yield bounded
        yield far, NOBODY
        known, everybody, others = self._all()
        if others is None:
            yield from everybody
            return
        for bounded in everybody:
            if bounded[0] > others:
                break
            yield bounded
        yield others, NOBODY
        yield from free_streams(self._situation, self._bounds, everybody, known)
