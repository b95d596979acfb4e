"""What a start of a model costs at least, on a node and on those not looked at yet. Pure.

Rules:
1. A bound is never above the rank of what a closer look finds there; it may be below.
2. What is the same for every node is worked out once: a decision asks for some sixty bounds.
3. Sums are those of `estimate` and `options`, from the summary's numbers wherever nothing is queued.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import exp, inf, log

from services.controller.cluster_view.estimate import (
    NOTHING_HELD,
    bytes_per_second,
    device_bytes,
    load_seconds,
    source_of,
    worker_wait_seconds,
)
from services.controller.cluster_view.moves import least_move
from services.controller.cluster_view.summary import ORIGINS, Shape, Summary
from services.controller.cluster_view.traits import WORTH_DECAY_SECONDS, WORTH_LOG_LIMIT
from services.controller.cluster_view.view import Node
from services.controller.placement.options import Rank
from services.controller.placement.rates import ROUNDING, copy_seconds, lowest, rungs_of
from services.controller.placement.room import Situation, Wanted
from stoker.ids import NodeId

Bounded = tuple[Rank, NodeId]
NOBODY = NodeId("")
"""In place of a node: whatever the stream gives next is not below this rank."""
Dear = tuple[float, float]
"""The worth (its key, see `traits`) above which, and the rate below which a node costs too much."""
NOBODY_IS_DEAR: Dear = (inf, 0.0)
_SLACK = 1e-6
"""Of a logarithm, and of the difference of two of them."""
_PLACE_OF = {origin: place for place, origin in enumerate(ORIGINS)}
_DISK = _PLACE_OF["disk"]


class Bounds:
    """The ranks that starts of one model can't beat.

    Args:
        situation: What the decision is about.
        wanted: What is to start: the situation's model, or one that has to move.
        may_disturb: Others may be stopped or moved for it.
    """

    def __init__(self, situation: Situation, wanted: Wanted, *, may_disturb: bool) -> None:
        policy, index, parts = situation.policy, situation.index, wanted.parts
        self.wanted = wanted
        self.limit_seconds = inf
        """Whoever disturbs others and costs more is out: something better was found."""
        self.best: Rank | None = None
        """Of the options found, once they are enough: who at most ties with it has to have the lower id."""
        self.disturbs_busy = may_disturb and (policy.may_migrate or situation.waited_too_long)
        self._may_disturb = may_disturb
        self._slots = wanted.slots
        self._shape: Shape | None = None
        self._shape_fits = False
        self._index = index
        self._least_opening = lowest(index.by_opening.get(wanted.origin))
        self._slowest_device = lowest(index.by_device)
        self._summaries = index.summaries
        self._nodes = situation.view.nodes
        self._file_bytes = wanted.model.file_bytes
        self._device_bytes = device_bytes(wanted.model)
        self._checkpoint = wanted.model.checkpoint
        self._origin = ORIGINS.index(wanted.origin)
        self._beside_seconds = parts.skeleton_seconds + parts.first_forward_seconds
        self._overhead_seconds = parts.overhead_seconds
        self.tie_seconds = policy.tie_seconds
        self._weight = 1.0 if situation.waited_too_long else policy.hysteresis_ratio
        self._stop_seconds = policy.stop_seconds
        self._faded = situation.now_seconds / WORTH_DECAY_SECONDS
        if not self.disturbs_busy:
            return
        if policy.may_migrate:
            move_per_token, move = least_move(situation.view, policy)
            self._per_byte = copy_seconds(index, 1)
            self._per_token, self._per_move = move_per_token * ROUNDING, move * ROUNDING
        else:
            self._per_byte = self._per_token = 0.0
            self._per_move = policy.drain_grace_seconds

    def sorted_on(self, nodes: Iterable[NodeId]) -> list[Bounded]:
        """Return the bounds of these nodes, the lowest first; those that are out are left out."""
        found = [(bound, node_id) for node_id in nodes if (bound := self.on(node_id)) is not None]
        found.sort()
        return found

    def free_on(self, nodes: Iterable[NodeId]) -> list[Bounded]:
        """Return the same of those with free slots that hold some of the checkpoint: `on` without its calls.

        Where a model could move to is asked for each one that could, and mostly of such nodes.
        """
        if self._slots > 1 or self.wanted.model.preferred_labels:
            return self.sorted_on(nodes)
        found: list[tuple[float, NodeId]] = []
        summaries, nodes_by_id, checkpoint = self._summaries, self._nodes, self._checkpoint
        beside, overhead, tie_seconds = self._beside_seconds, self._overhead_seconds, self.tie_seconds
        file_bytes, device_bytes = self._file_bytes, self._device_bytes
        for node_id in nodes:
            summary = summaries[node_id]
            if not summary.free or not summary.is_open:
                continue
            if summary.shape is not self._shape:
                self._look_at(summary.shape)
            if not self._shape_fits:
                continue
            if summary.queued:
                load = self.load_seconds(node_id, summary)
            else:
                node = nodes_by_id[node_id]
                held = node.held.get(checkpoint)
                device_rate, disk_rate = summary.device_rate, summary.rates[_DISK]
                if held is not None and held.dram_bytes >= file_bytes:
                    load = device_bytes / device_rate
                elif held is not None and held.disk_bytes >= file_bytes and disk_rate < device_rate:
                    load = summary.openings[_DISK] + (file_bytes - held.dram_bytes) / disk_rate
                    load = max(device_bytes / device_rate, load)
                else:
                    load = self._unqueued_seconds(node, summary)
            seconds = summary.worker_seconds + max(load, beside) + overhead
            found.append((seconds * ROUNDING, node_id))
        found.sort()
        return [((int(seconds / tie_seconds), 0, 0.0, 0, seconds, ""), node_id) for seconds, node_id in found]

    def on(self, node_id: NodeId) -> Rank | None:
        """Return the lowest rank of a start on the node; None = there is no room, and nobody to make some."""
        summary = self._summaries[node_id]
        if not summary.is_open:
            return None
        if summary.shape is not self._shape:
            self._look_at(summary.shape)
        if not self._shape_fits:
            return None
        preferred = 0
        if self.wanted.model.preferred_labels:
            preferred = len(self.wanted.model.preferred_labels & self._nodes[node_id].labels)
        if len(summary.free) >= self._slots:
            # with a pool that is full somebody may have to go all the same: that costs no less
            return self._rank(self.start_seconds(node_id, summary), -preferred)
        disturbing = self._least_disturbing(summary) if self._may_disturb else None
        if disturbing is None:
            return None
        cost_seconds, worth = disturbing
        seconds = self.start_seconds(node_id, summary) + cost_seconds
        return self._rank(seconds, -preferred, victims=1, worth=worth)

    def idle_on(
        self,
        rows: Sequence[tuple[float, NodeId]],
        seen: set[NodeId],
        dear: Dear,
        aside: list[NodeId],
        limit_seconds: float,
    ) -> list[Bounded]:
        """Return the same of unseen nodes where an idle replica goes and nothing of the checkpoint is held.

        Where only busy ones go is not counted: another stream has those nodes. The search asks for this more
        than for anything else: nothing is called that can be written out.

        Args:
            rows: Nodes with idle replicas.
            seen: Nodes to leave out; these are in it afterwards.
            dear: What tells the dear ones.
            aside: Takes those, of which nothing else is worked out.
            limit_seconds: Those that cost more are left out.
        """
        origin, file_bytes, beside = self._origin, self._file_bytes, self._beside_seconds
        stop_seconds, weight, faded = self._stop_seconds, self._weight, self._faded
        overhead, tie_seconds, slots = self._overhead_seconds, self.tie_seconds, self._slots
        summaries, (most_key, least_rate) = self._summaries, dear
        found: list[Bounded] = []
        for _, node_id in rows:
            if node_id in seen:
                continue
            seen.add(node_id)
            summary = summaries[node_id]
            rate, key = summary.rates[origin], summary.worth_keys[0][0]
            if key > most_key or rate < least_rate:
                aside.append(node_id)
                continue
            if len(summary.free) >= slots:
                continue
            if summary.shape is not self._shape:
                self._look_at(summary.shape)
            if not self._shape_fits:
                continue
            if summary.queued or rate >= summary.device_rate:
                load = self.load_seconds(node_id, summary)
            else:
                load = summary.openings[origin] + file_bytes / rate
            worth = exp(min(key - faded, WORTH_LOG_LIMIT))
            cost_seconds = stop_seconds + weight * worth
            seconds = cost_seconds + summary.worker_seconds + overhead
            seconds = (seconds + (max(beside, load))) * ROUNDING
            if seconds <= limit_seconds:
                found.append(((int(seconds / tie_seconds), 1, worth * ROUNDING, 0, seconds, ""), node_id))
        return found

    def dear_idle(self, rate: float, worth_key: float, most_seconds: float) -> Dear:
        """Return what tells nodes that cost more than this by one of their numbers alone.

        Args:
            rate: None of the nodes has a higher one.
            worth_key: None of them has an idle replica worth less.
            most_seconds: Nodes with idle replicas that cost no more are not told from the others.
        """
        if most_seconds == inf:
            return NOBODY_IS_DEAR
        spare = most_seconds / ROUNDING - self._stop_seconds
        for_worth = (spare - self._least_start(rate, 0.0)) / self._weight if self._weight else inf
        most_key = log(for_worth) + self._faded + _SLACK if for_worth > 0 else -inf
        worth = exp(min(worth_key - self._faded, WORTH_LOG_LIMIT))
        for_load = spare - self._weight * worth - self._overhead_seconds
        if for_load <= self._beside_seconds:
            return most_key, inf
        opened = for_load - self._least_opening
        least_rate = self._file_bytes / opened if opened > 0 else inf
        if least_rate >= self._slowest_device:  # see `_least_start`
            least_rate = self._device_bytes / for_load
        return most_key, least_rate * ROUNDING

    def all_on(self, rows: Iterable[tuple[float, NodeId]], seen: set[NodeId]) -> list[Bounded]:
        """Return the bounds of nodes not seen yet that are not out."""
        found: list[Bounded] = []
        for _, node_id in rows:
            if node_id not in seen:
                seen.add(node_id)
                bound = self.on(node_id)
                if bound is not None:
                    found.append((bound, node_id))
        return found

    def is_behind(self, bound: Rank, node_id: NodeId) -> bool:
        """Tell whether a node at most ties with the best one, and its id comes later."""
        best = self.best
        return (
            best is not None
            and bound[1:4] == best[1:4]
            and best[4] * ROUNDING <= bound[4] <= best[4]
            and node_id > best[5]
        )

    def _look_at(self, shape: Shape) -> None:
        """Find out whether nodes of a shape can ever take the model: most nodes share theirs."""
        self._shape, self._shape_fits = shape, bool(self.wanted.slots_that_fit(shape))

    def beyond(self, rate: float, worker_seconds: float) -> Rank:
        """Return the rank that free nodes can't beat with at most this rate, and no less for the worker."""
        return self._rank(self._least_start(rate, worker_seconds))

    def idle_beyond(self, rate: float, worth_key: float) -> Rank:
        """Return the rank that nodes can't beat with at most this rate, and idle replicas worth no less."""
        worth = exp(min(worth_key - self._faded, WORTH_LOG_LIMIT))
        if self._slowest_device > rate:  # `_least_start`, written out
            load = self._least_opening + self._file_bytes / rate
        else:
            load = self._device_bytes / rate
        start_seconds = max(load, self._beside_seconds) + self._overhead_seconds
        seconds = (self._stop_seconds + self._weight * worth + start_seconds) * ROUNDING
        return (int(seconds / self.tie_seconds), 1, worth * ROUNDING, 0, seconds, "")

    def busy_beyond(self, rate: float, worker_seconds: float) -> Rank:
        """Return the rank that nodes with no more than this rate, and busy replicas, can't beat."""
        return self._rank(self._least_start(rate, worker_seconds), victims=1)

    def least_free(self) -> Rank | None:
        """Return the rank that no free node without any of the checkpoint beats; None = there is none."""
        if self.wanted.model.required_labels:
            return None
        least = [
            self._least_start(-nodes.first[0], 0.0 if by_worker is None else by_worker.first[0])
            for nodes, by_worker in rungs_of(self._index, self.wanted)
        ]
        return self._rank(min(least)) if least else None

    def start_seconds(self, node_id: NodeId, summary: Summary) -> float:
        """Return how long a start takes on the node, once there is room."""
        load = self.load_seconds(node_id, summary)
        beside = self._beside_seconds
        worker_seconds = summary.worker_seconds
        if self._slots > 1:
            node = self._nodes[node_id]
            worker_seconds = worker_wait_seconds(node, summary.starting_workers, self._slots)
        return worker_seconds + (max(beside, load)) + self._overhead_seconds

    def load_seconds(self, node_id: NodeId, summary: Summary) -> float:
        """Return how long a load takes on the node."""
        wanted, node = self.wanted, self._nodes[node_id]
        if not summary.queued:
            return self._unqueued_seconds(node, summary)
        if not 0 < summary.shape.pool_bytes < self._file_bytes:
            return self._queued_seconds(node, summary)
        return load_seconds(
            wanted.model,
            node,
            loading_bytes=summary.loading_bytes,
            has_peer=wanted.has_peer(node_id),
            is_coming=self._checkpoint in summary.loading,
        )

    def _unqueued_seconds(self, node: Node, summary: Summary) -> float:
        """Return how long a load takes where nothing is queued: `load_seconds` from the summary's rates."""
        file_bytes, device_rate = self._file_bytes, summary.device_rate
        held = node.held.get(self._checkpoint)
        if held is None:
            rate = summary.rates[self._origin]
            if rate < device_rate:
                return summary.openings[self._origin] + file_bytes / rate
            held = NOTHING_HELD
        missing_bytes = file_bytes - held.dram_bytes
        device_seconds = self._device_bytes / device_rate
        if missing_bytes <= 0:
            return device_seconds
        if held.disk_bytes >= file_bytes:
            source, origin = "disk", _DISK
        else:
            source = source_of(self.wanted.model, held, has_peer=self.wanted.has_peer(node.node_id))
            origin = _PLACE_OF[source]
        rate = summary.rates[origin]
        if rate >= device_rate:  # that of the device: how fast the source is, the summary does not say
            rate = bytes_per_second(node, source)
        seconds = summary.openings[origin] + missing_bytes / rate
        return max(device_seconds, seconds)

    def _queued_seconds(self, node: Node, summary: Summary) -> float:
        """Return how long a load takes where bytes wait: `load_seconds` of one that fits the pool."""
        held = node.held.get(self._checkpoint, NOTHING_HELD)
        missing_bytes, stages, seconds = self._file_bytes - held.dram_bytes, node.stages, 0.0
        if missing_bytes > 0:
            source = source_of(self.wanted.model, held, has_peer=self.wanted.has_peer(node.node_id))
            queued_bytes, stage = summary.loading_bytes, stages.get(source)
            if stage is not None and stage.queued_bytes > queued_bytes:
                queued_bytes = stage.queued_bytes
            if self._checkpoint in summary.loading:
                missing_bytes = 0
            origin = _PLACE_OF[source]
            rate = summary.rates[origin]
            if rate >= summary.device_rate:
                rate = bytes_per_second(node, source)
            seconds = summary.openings[origin] + (queued_bytes + missing_bytes) / rate
        stage = stages.get("device")
        queued_bytes = stage.queued_bytes if stage is not None else 0
        device_seconds = (queued_bytes + self._device_bytes) / summary.device_rate
        return max(device_seconds, seconds)

    def _least_disturbing(self, summary: Summary) -> tuple[float, float] | None:
        """Return what making room costs at least (wait and weighted disturbance), and disturbs at least.

        Any set of victims costs no less than the cheapest single one. None = nobody could go.
        """
        idle = self._least_idle(summary) if summary.worth_keys else None
        if not summary.busy or not self.disturbs_busy:
            return idle
        busy = self._least_busy(summary)
        return busy if idle is None else (min(idle[0], busy[0]), min(idle[1], busy[1]))

    def _least_idle(self, summary: Summary) -> tuple[float, float]:
        worth = exp(min(summary.worth_keys[0][0] - self._faded, WORTH_LOG_LIMIT))
        return self._stop_seconds + self._weight * worth, worth

    def _least_busy(self, summary: Summary) -> tuple[float, float]:
        seconds = self._per_token * summary.busy_tokens + self._per_move
        return self._per_byte * summary.busy_bytes + (1 + self._weight) * seconds, seconds

    def _least_start(self, rate: float, worker_seconds: float) -> float:
        """Return how long a start takes at least where nothing is held, at no more than a rate."""
        if self._slowest_device > rate:
            load = self._least_opening + self._file_bytes / rate
        else:  # a slow device may hide the opening behind its copy, and several share one
            load = self._device_bytes / rate
        return worker_seconds + max(load, self._beside_seconds) + self._overhead_seconds

    def _rank(self, seconds: float, less_preferred: int = 0, *, victims: int = 0, worth: float = 0.0) -> Rank:
        """Return the lowest rank of an option that costs no less than this."""
        seconds *= ROUNDING
        return (int(seconds / self.tie_seconds), victims, worth * ROUNDING, less_preferred, seconds, "")
