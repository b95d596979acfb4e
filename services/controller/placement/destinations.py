"""Where replicas that make room for another could go, and what that takes at least. Pure."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from operator import itemgetter
from typing import Final

from services.controller.cluster_view.estimate import device_bytes
from services.controller.cluster_view.lessons import parts_like
from services.controller.placement.bounds import ROUNDING, Bounded, Bounds, copy_seconds, swiftest_source
from services.controller.placement.options import Option, Rank, free_option, rank
from services.controller.placement.room import Situation, can_ever, wanted_of
from services.controller.placement.streams import NOBODY, free_among, free_streams, known_nodes
from stoker.ids import ModelName, NodeId

_UNKNOWN: Final = (0.0, 0.0)
"""In place of what was not looked up yet."""
_SECONDS: Final = 4
"""Where a rank has its seconds."""


class Destinations:
    """Where replicas could move to; remembers what it has found, for one decision."""

    def __init__(self, situation: Situation) -> None:
        self._situation = situation
        self._swiftest: dict[ModelName, float] = {}
        self._copied: dict[int, float] = {}
        self._elsewhere: dict[ModelName, _Elsewhere] = {}
        self._swiftest_source: tuple[float, float] | None = _UNKNOWN

    def copied_seconds(self, byte_count: int) -> float:
        """Return what copying so many bytes to a device takes at least, anywhere."""
        seconds = self._copied.get(byte_count)
        if seconds is None:
            seconds = self._copied[byte_count] = copy_seconds(self._situation.index, byte_count)
        return seconds

    def swiftest_seconds(self, name: ModelName) -> float:
        """Return what starting the model takes at least, were there a free node with all of it in memory."""
        if name not in self._swiftest:
            view = self._situation.view
            model = view.models[name]
            copying = copy_seconds(self._situation.index, device_bytes(model))
            self._swiftest[name] = parts_like(view, model).start_seconds(0.0, copying)
        return self._swiftest[name]

    def floor_seconds(self, name: ModelName) -> float | None:
        """Return what no start on free slots is quicker than, without a look at nodes; None = nowhere."""
        if self._swiftest_source is _UNKNOWN:
            self._swiftest_source = swiftest_source(self._situation.index)
        if self._swiftest_source is None:
            return None
        index, view = self._situation.index, self._situation.view
        model = view.models[name]
        if free_among(index, index.in_memory.get(model.checkpoint)):
            return self.swiftest_seconds(name) * ROUNDING
        rate, worker_seconds = self._swiftest_source
        load = device_bytes(model) / rate
        return parts_like(view, model).start_seconds(worker_seconds, load) * ROUNDING

    def least_seconds(self, name: ModelName) -> float | None:
        """Return what starting the model on free slots takes at least, anywhere; None = nowhere."""
        return self._of(name).least_seconds

    def best(self, name: ModelName, not_on: NodeId, count: int) -> tuple[Option, ...]:
        """Return the best `count` ways to start a model that disturb nobody, on nodes other than `not_on`."""
        return self._of(name).best(not_on, count)

    def _of(self, name: ModelName) -> _Elsewhere:
        found = self._elsewhere.get(name)
        if found is None:
            found = self._elsewhere[name] = _Elsewhere(self._situation, name)
        return found


class _Elsewhere:
    """Where one model could be started on free slots."""

    def __init__(self, situation: Situation, name: ModelName) -> None:
        self._situation = situation
        self._wanted = wanted = wanted_of(situation.view, situation.index, name)
        self._bounds = Bounds(situation, wanted, may_disturb=False)
        self._known = known_nodes(situation, wanted, free=True)
        self._bounded = self._bounds.free_on(self._known) if self._known else []
        self._options: tuple[Option, ...] = ()
        self._count = 0
        self._others = self._bounds.least_free()
        """The rank that nodes can't beat that are not known."""
        least = [rank[_SECONDS] for rank, _ in self._bounded]
        if self._others is not None:
            least.append(self._others[_SECONDS])
        self.least_seconds = min(least, default=None)

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
        """Yield bounds of nodes with room, the lowest first; known ones maybe twice.

        Known ones come first as long as no other can beat them: mostly one of them is enough.
        """
        others = self._others
        if others is None:
            yield from self._bounded
            return
        for bounded in self._bounded:
            if bounded[0] > others:
                break
            yield bounded
        yield others, NOBODY
        yield from free_streams(self._situation, self._bounds, self._bounded, self._known)
