"""Why the cluster is as it is: the last decisions with their options, estimates and outcomes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from services.controller.placement.options import Option
from services.controller.placement.place import Decision, Migrate, Placed, StopIdle, Unplaceable, Wait
from stoker.ids import ModelName, ReplicaId
from stoker.v1 import controller_pb2, start_pb2

MAX_DECISIONS = 2_000
MAX_OPTIONS = 16
MAX_REQUESTS = 16
DEFAULT_LIMIT = 10
MAX_MESSAGE_CHARACTERS = 1_000


class DecisionLog:
    """A bounded log of one term's decisions; one that only repeats the model's last is not kept."""

    def __init__(self) -> None:
        self._decisions: OrderedDict[int, controller_pb2.ExplainedDecision] = OrderedDict()
        self._count = 0
        self._last: dict[ModelName, controller_pb2.ExplainedDecision] = {}
        self._of_replica: dict[ReplicaId, controller_pb2.ExplainedDecision] = {}

    def add(
        self, name: ModelName, decision: Decision, request_ids: Iterable[str], unix_seconds: float
    ) -> None:
        """Remember a decision about a model, and who waited for it."""
        explained = _explained(name, decision, unix_seconds)
        explained.request_ids.extend(sorted(request_ids)[:MAX_REQUESTS])
        last = self._last.get(name)
        if last is not None and not isinstance(decision, Placed):
            reason = decision.reason if isinstance(decision, Wait) else explained.reason
            same = last.choice == explained.choice and last.reason.startswith(reason)
            if same and set(explained.request_ids) <= set(last.request_ids):
                return
        self._count += 1
        self._decisions[self._count] = explained
        self._last[name] = explained
        while len(self._decisions) > MAX_DECISIONS:
            _, oldest = self._decisions.popitem(last=False)
            if self._last.get(ModelName(oldest.model)) is oldest:
                del self._last[ModelName(oldest.model)]
            self._of_replica.pop(ReplicaId(oldest.replica_id), None)

    def started(self, name: ModelName, replica_id: ReplicaId) -> None:
        """Note which replica came of the model's last decision."""
        last = self._last.get(name)
        if last is not None and last.choice == "start" and not last.replica_id:
            last.replica_id = replica_id
            self._of_replica[replica_id] = last

    def ready(self, replica_id: ReplicaId, timings: start_pb2.StartTimings) -> None:
        """Note what a start came to, beside what was predicted."""
        decision = self._of_replica.get(replica_id)
        if decision is not None:
            decision.outcome = "ready"
            decision.measured.CopyFrom(timings)

    def failed(self, replica_id: ReplicaId, message: str) -> None:
        """Note that a start failed, and why; one that had been ready keeps its outcome."""
        decision = self._of_replica.get(replica_id)
        if decision is not None and not decision.outcome:
            decision.outcome = "failed"
            decision.outcome_message = message[:MAX_MESSAGE_CHARACTERS]

    def explain(self, subject: str, limit: int) -> list[controller_pb2.ExplainedDecision]:
        """Return the decisions about a model, or for a request, the latest first; limit 0 = 10."""
        found = [
            decision
            for decision in reversed(self._decisions.values())
            if subject == decision.model or subject in decision.request_ids
        ]
        return found[: limit or DEFAULT_LIMIT]


def _explained(name: ModelName, decision: Decision, unix_seconds: float) -> controller_pb2.ExplainedDecision:
    explained = controller_pb2.ExplainedDecision(model=name, unix_seconds=unix_seconds)
    options: tuple[Option, ...] = ()
    match decision:
        case Placed(node_id=node_id, options=options):
            explained.choice, explained.reason = "start", f"starts on {node_id}"
        case StopIdle(node_id=node_id, victims=victims, options=options):
            explained.choice = "stop_idle"
            explained.reason = f"{', '.join(victims)} on {node_id} must stop first"
        case Migrate(node_id=node_id, moves=moves, options=options):
            explained.choice = "migrate"
            where = ", ".join(f"{move.replica_id} to {move.to_node_id}" for move in moves)
            explained.reason = f"makes room on {node_id} by moving {where}"
        case Wait(reason=reason, details=details):
            explained.choice = "wait"
            explained.reason = f"{reason}: {'; '.join(details)}" if details else reason
        case Unplaceable(reasons=reasons):
            explained.choice, explained.reason = "refuse", "; ".join(reasons)
    explained.options.extend(_option(option) for option in options[:MAX_OPTIONS])
    return explained


def _option(option: Option) -> controller_pb2.ExplainedOption:
    estimate = option.estimate
    kind = "migrate" if option.moves else "stop_idle" if option.victims else "free"
    return controller_pb2.ExplainedOption(
        node_id=option.node_id,
        devices=option.devices,
        kind=kind,
        victims=option.victims,
        tier=estimate.tier,
        worker_seconds=estimate.worker_seconds,
        load_seconds=estimate.load_seconds,
        stage_seconds=dict(estimate.stage_seconds),
        skeleton_seconds=estimate.skeleton_seconds,
        first_forward_seconds=estimate.first_forward_seconds,
        overhead_seconds=estimate.overhead_seconds,
        stop_seconds=estimate.stop_seconds,
        disturbance_seconds=option.disturbance_seconds,
        total_seconds=estimate.total_seconds,
    )
