"""What must change: `reconcile(view, now_seconds, policy) -> Plan`, pure.

Rules, in the order in which they run:

1. Nodes: silent beyond the time-out → unreachable; silent for very long → forgotten. Replicas whose nodes a
   new controller has waited for in vain → lost.
2. Replicas that must go: failed starts (and the model backs off), replicas of deleted models, orphans nobody
   reserved, stale ones after a redeploy, surplus ones, and idle ones whose keep-alive is over.
3. Reservations whose replica is gone are released.
4. Models that want a replica get one, who waits longest first: requests that wait, then `min_replicas`, then
   more sessions than the replicas' concurrency. A model that backs off gets none.

The plan says what to do now and when to look again though nothing happens.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

from services.controller.actions import Action, Note, Noted, Plan, Release, Start, Stop, start_failed
from services.controller.fleet import Member, Standing, is_idle, members_by_model
from services.controller.fold import (
    Event,
    NodeForgotten,
    NodeUnreachable,
    RefusalLifted,
    Refused,
    Releasing,
    ReplicaLost,
    Reserved,
    StopOrdered,
    fold,
)
from services.controller.place import Placed, StopIdle, Unplaceable, Wait, place
from services.controller.view import Model, Node, Phase, Policy, Refusal, Reservation, View
from stoker.ids import ModelName, ReplicaId


def reconcile(view: View, now_seconds: float, policy: Policy) -> Plan:
    """Decide everything that is to be decided about this view."""
    planner = _Planner(view, now_seconds, policy)
    planner.check_nodes()
    planner.check_missing()
    planner.stop_what_must_go()
    planner.release_what_is_gone()
    planner.start_what_is_wanted()
    return Plan(
        actions=tuple(planner.actions),
        next_due_seconds=min((due for due in planner.due_seconds if due > now_seconds), default=None),
    )


class _Planner:
    """Collects actions; folds each into its own copy of the view, so that later rules see earlier ones."""

    def __init__(self, view: View, now_seconds: float, policy: Policy) -> None:
        self.view = view
        self.now_seconds = now_seconds
        self.policy = policy
        self.actions: list[Action] = []
        self.due_seconds: list[float] = []
        self._tentative = count()
        self._warm: set[ModelName] = set()

    # --- nodes ---

    def check_nodes(self) -> None:
        for node_id in sorted(self.view.nodes):
            node = self.view.nodes[node_id]
            if node.reachable and self._is_over(node.last_seen_seconds + self.policy.node_timeout_seconds):
                self._note(NodeUnreachable(node_id=node_id))
            elif not node.reachable and self._is_over(
                node.last_seen_seconds + self.policy.node_forget_seconds
            ):
                self._note(NodeForgotten(node_id=node_id))

    def check_missing(self) -> None:
        for replica_id in sorted(self.view.reservations):
            reservation = self.view.reservations[replica_id]
            if reservation.lost or reservation.node_id in self.view.nodes:
                continue
            if self._is_over(reservation.seen_seconds + self.policy.node_timeout_seconds):
                self._note(ReplicaLost(replica_id=replica_id))

    # --- stopping ---

    def stop_what_must_go(self) -> None:
        for node_id in sorted(self.view.nodes):
            self._stop_orphans(self.view.nodes[node_id])
        for name, members in members_by_model(self.view).items():
            model = self.view.models.get(name)
            for found in members:
                if found.standing is Standing.FAILED:
                    self._give_up(found)
                elif model is None and found.standing in (Standing.STARTING, Standing.READY):
                    self._stop(found, "model deleted", only_if_idle=False)
            if model is not None:
                self._replace_stale(members)
                self._stop_unused(model, members)

    def _stop_orphans(self, node: Node) -> None:
        for replica_id in sorted(node.replicas):
            replica = node.replicas[replica_id]
            if replica_id in self.view.reservations or replica.phase is Phase.STOPPING or not node.connected:
                continue
            if self._is_over(replica.first_seen_seconds + self.policy.orphan_grace_seconds):
                self.actions.append(
                    Stop(
                        replica_id=replica_id,
                        node_id=node.node_id,
                        only_if_idle=False,
                        reason="nobody reserved it",
                    )
                )
                self.due_seconds.append(self.now_seconds + self.policy.orphan_grace_seconds)

    def _give_up(self, found: Member) -> None:
        replica = found.replica
        if replica is None or found.node is None or not found.node.connected:
            return  # its node's next report brings us back here
        if replica.ready_since_seconds is not None:
            self._stop(found, "its worker died", only_if_idle=False)
            return
        failed = start_failed(
            self.view,
            found.reservation.model,
            code=replica.error_code or "load_failed",
            message=replica.error_message or "the node agent gave no reason",
            now_seconds=self.now_seconds,
            policy=self.policy,
        )
        self._note(failed)
        self._stop(found, "start failed", only_if_idle=False)

    def _replace_stale(self, members: tuple[Member, ...]) -> None:
        """Replace what runs an older deployment: idle ones now, busy ones once a current one is ready."""
        current_ready = any(not found.stale and found.standing is Standing.READY for found in members)
        for found in members:
            if not found.stale or found.standing not in (Standing.STARTING, Standing.READY):
                continue
            if found.standing is Standing.STARTING or is_idle(found):
                self._stop(found, "replaced by a newer deployment", only_if_idle=is_idle(found))
            elif current_ready or self._is_over(
                found.reservation.seen_seconds + self.policy.replace_after_seconds
            ):
                self._stop(found, "replaced by a newer deployment", only_if_idle=False)

    def _stop_unused(self, model: Model, members: tuple[Member, ...]) -> None:
        """Stop replicas idle for the keep-alive, the longest idle first, and never below the minimum."""
        current = [found for found in members if not found.stale]
        live = sum(found.standing in (Standing.STARTING, Standing.READY) for found in current)
        spare = live - model.min_replicas
        if spare <= 0 or model.name in self.view.demands:
            return
        idle = sorted(
            (found for found in current if is_idle(found)),
            key=lambda found: (_idle_since_seconds(found), found.reservation.replica_id),
        )
        surplus = live - model.max_replicas
        for found in idle[:spare]:
            over_seconds = _keep_until_seconds(model, found, self.policy)
            if surplus > 0:
                self._stop(found, "more replicas than the maximum", only_if_idle=True)
                surplus -= 1
            elif over_seconds is not None and self._is_over(over_seconds):
                self._stop(found, "keep-alive is over", only_if_idle=True)

    # --- releasing ---

    def release_what_is_gone(self) -> None:
        for replica_id in sorted(self.view.reservations):
            reservation = self.view.reservations[replica_id]
            reason = None if reservation.releasing else self._gone(reservation)
            if reason is not None:
                self._fold(Releasing(replica_id=replica_id))
                self.actions.append(Release(replica_id=replica_id, reason=reason))

    def _gone(self, reservation: Reservation) -> str | None:
        """Return why the reservation holds no longer; None while it does."""
        node = self.view.nodes.get(reservation.node_id)
        if node is None:
            over = self._is_over(reservation.seen_seconds + self.policy.node_forget_seconds)
            return "its node is gone" if over else None
        if reservation.replica_id in node.replicas:
            return None
        if not node.connected:
            return None  # the last report is old; the next one, or forgetting the node, decides
        if reservation.reported:
            return "its node no longer runs it"
        if reservation.adopted:
            return "its node does not run it"
        # The last report may be older than the order, so its silence says nothing yet, not even after a stop.
        over = self._is_over(reservation.seen_seconds + self.policy.order_grace_seconds)
        return "its node never reported it" if over else None

    # --- starting ---

    def start_what_is_wanted(self) -> None:
        self._warm = {
            name
            for name, members in members_by_model(self.view).items()
            if any(found.standing is Standing.READY for found in members)
        }
        wanting = sorted(self._wanting(), key=lambda name: (*self._urgency(name), name))
        for name in wanting:
            self._start(name)
        for name in sorted(self.view.refusals.keys() - set(wanting)):
            self._note(RefusalLifted(model=name))

    def _wanting(self) -> Iterator[ModelName]:
        """Yield the models that want one more replica than they have or are getting."""
        by_model = members_by_model(self.view)
        for name in self.view.demands.keys() | self.view.always | by_model.keys():
            model = self.view.models.get(name)
            if model is None:
                continue
            members = by_model.get(name, ())
            live = sum(
                found.standing in (Standing.STARTING, Standing.READY) for found in members if not found.stale
            )
            if live < self._desired(model, members) and not self._rests(name):
                yield name

    def _desired(self, model: Model, members: tuple[Member, ...]) -> int:
        asked = 1 if model.name in self.view.demands else 0
        sessions = sum(
            found.replica.sessions
            for found in members
            if found.replica is not None and found.standing is Standing.READY
        )
        loaded = sessions // model.concurrency + 1 if sessions else 0
        return min(model.max_replicas, max(model.min_replicas, asked, loaded))

    def _rests(self, name: ModelName) -> bool:
        failure = self.view.failures.get(name)
        return failure is not None and not self._is_over(failure.retry_at_seconds)

    def _urgency(self, name: ModelName) -> tuple[int, float]:
        demand = self.view.demands.get(name)
        if demand is not None and name not in self._warm:
            return (0, demand.since_seconds)
        return (1 if name in self.view.always else 2, 0.0)

    def _start(self, name: ModelName) -> None:
        cold = name not in self._warm
        decision = place(self.view, name, self.now_seconds, self.policy, may_disturb=cold)
        match decision:
            case Placed():
                self._lift(name)
                self._reserve(name, decision)
            case StopIdle(victims=victims, node_id=node_id):
                for replica_id in victims:
                    self._fold(
                        StopOrdered(replica_id=replica_id, now_seconds=self.now_seconds, for_model=name)
                    )
                    self.actions.append(
                        Stop(
                            replica_id=replica_id,
                            node_id=node_id,
                            only_if_idle=True,
                            reason=f"makes room for {name}",
                            for_model=name,
                        )
                    )
                self._refuse(name, f"{node_id} is stopping a replica to make room")
            case Wait(reason=reason, retry_at_seconds=retry_at_seconds):
                if retry_at_seconds is not None:
                    self.due_seconds.append(retry_at_seconds)
                self._refuse(name, reason)
            case Unplaceable(code=code, reasons=reasons):
                self._refuse(name, "; ".join(reasons), code)

    def _reserve(self, name: ModelName, placed: Placed) -> None:
        runtime = self.view.models[name].runtime
        self.actions.append(
            Start(
                model=name,
                node_id=placed.node_id,
                devices=placed.devices,
                runtime=runtime,
                estimate=placed.estimate,
                options=placed.options,
            )
        )
        tentative = Reservation(
            replica_id=ReplicaId(f"tentative-{next(self._tentative)}"),
            model=name,
            node_id=placed.node_id,
            devices=placed.devices,
            runtime=runtime,
            seen_seconds=self.now_seconds,
        )
        self._fold(Reserved(reservation=tentative))

    # --- collecting ---

    def _stop(self, found: Member, reason: str, *, only_if_idle: bool) -> None:
        replica_id = found.reservation.replica_id
        if found.node is not None and not found.node.connected:
            return  # nobody to tell; its next report brings us back here
        self._fold(StopOrdered(replica_id=replica_id, now_seconds=self.now_seconds))
        self.actions.append(
            Stop(
                replica_id=replica_id,
                node_id=found.reservation.node_id,
                only_if_idle=only_if_idle,
                reason=reason,
            )
        )

    def _refuse(self, name: ModelName, reason: str, code: str = "") -> None:
        before = self.view.refusals.get(name)
        if before is None or (before.reason, before.code) != (reason, code):
            refusal = Refusal(reason=reason, code=code, at_seconds=self.now_seconds)
            self._note(Refused(model=name, refusal=refusal))

    def _lift(self, name: ModelName) -> None:
        if name in self.view.refusals:
            self._note(RefusalLifted(model=name))

    def _note(self, event: Noted) -> None:
        self._fold(event)
        self.actions.append(Note(event=event))

    def _fold(self, event: Event) -> None:
        self.view = fold(self.view, event)

    def _is_over(self, at_seconds: float) -> bool:
        """Tell whether a moment has come; if not, it is one to look again at."""
        if at_seconds <= self.now_seconds:
            return True
        self.due_seconds.append(at_seconds)
        return False


def _idle_since_seconds(found: Member) -> float:
    since_seconds = found.replica.idle_since_seconds if found.replica else None
    return since_seconds if since_seconds is not None else 0.0


def _keep_until_seconds(model: Model, found: Member, policy: Policy) -> float | None:
    """Return until when an idle replica is kept: its keep-alive, and long enough for its first request."""
    if model.keep_alive_seconds < 0:
        return None
    ready_since_seconds = found.replica.ready_since_seconds if found.replica else None
    return max(
        _idle_since_seconds(found) + model.keep_alive_seconds,
        (ready_since_seconds or 0.0) + policy.minimum_residency_seconds,
    )
