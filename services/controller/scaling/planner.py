"""What one pass of `reconcile` has decided so far, folded into its own copy of the view. Pure."""

from __future__ import annotations

from dataclasses import replace
from itertools import count

from services.controller.cluster_view.demand import Refusal
from services.controller.cluster_view.events import Event, RefusalLifted, Refused, RoomSettled, StopOrdered
from services.controller.cluster_view.fleet import Member, members_of
from services.controller.cluster_view.fold import fold
from services.controller.cluster_view.foreseen import Foreseen
from services.controller.cluster_view.index import Index, index_of, indexed
from services.controller.cluster_view.view import Policy, View
from services.controller.placement.place import Decision
from services.controller.scaling.actions import Action, Note, Noted, Stop
from stoker.ids import ModelName, ReplicaId


class Planner:
    """Collects actions; each is folded at once, so that later rules see what earlier ones decided."""

    def __init__(self, view: View, now_seconds: float, policy: Policy) -> None:
        self.view = indexed(view)
        self.now_seconds = now_seconds
        self.policy = policy
        self.actions: list[Action] = []
        self.decisions: list[tuple[ModelName, Decision]] = []
        self.foreseen: list[Foreseen] = []
        self._due_seconds: float | None = None
        self._members: dict[ModelName, tuple[Member, ...]] = {}
        self._members_view = self.view
        """Of which view those are."""
        self._tentative = count()

    @property
    def index(self) -> Index:
        """The index of the view as decided so far."""
        return index_of(self.view)

    @property
    def next_due_seconds(self) -> float | None:
        """The earliest moment to look again at; None = on the next event."""
        return self._due_seconds

    def members_of(self, name: ModelName) -> tuple[Member, ...]:
        """Return the reserved replicas of a model as they stand now, in the order of their ids."""
        if self._members_view is not self.view:
            self._members, self._members_view = {}, self.view
        found = self._members.get(name)
        if found is None:
            found = self._members[name] = members_of(self.view, name)
        return found

    def tentative_id(self) -> ReplicaId:
        """Return an id for a replica that the shell will name."""
        return ReplicaId(f"tentative-{next(self._tentative)}")

    def look_again(self, at_seconds: float) -> None:
        """Have `reconcile` called at this moment at the latest; moments in the past are ignored."""
        if at_seconds > self.now_seconds and (self._due_seconds is None or at_seconds < self._due_seconds):
            self._due_seconds = at_seconds

    def is_over(self, at_seconds: float) -> bool:
        """Tell whether a moment has come; if not, it is one to look again at."""
        if at_seconds <= self.now_seconds:
            return True
        self.look_again(at_seconds)
        return False

    def fold(self, event: Event) -> None:
        """Take an event into this pass's view."""
        before, self.view = self.view, fold(self.view, event)
        self.foreseen.append(Foreseen(before, event, self.view))

    def note(self, event: Noted) -> None:
        """Decide that the shell folds this."""
        self.fold(event)
        self.actions.append(Note(event=event))

    def stop(self, found: Member, reason: str, *, only_if_idle: bool) -> None:
        """Decide that a replica ends, if there is somebody to tell; its next report brings us back here."""
        if found.node is not None and not found.node.connected:
            return
        replica_id = found.reservation.replica_id
        self.fold(StopOrdered(replica_id=replica_id, now_seconds=self.now_seconds))
        self.actions.append(
            Stop(
                replica_id=replica_id,
                node_id=found.reservation.node_id,
                only_if_idle=only_if_idle,
                reason=reason,
            )
        )

    def refuse(  # noqa: PLR0913 - what a refusal says, each named by its caller
        self,
        name: ModelName,
        reason: str,
        code: str = "",
        *,
        disturbs: bool,
        retry_at_seconds: float | None = None,
        room_for: int = 0,
    ) -> None:
        """Note why a model gets no replica now, if that is news."""
        if retry_at_seconds is not None:
            self.look_again(retry_at_seconds)
        before = self.view.refusals.get(name)
        refusal = Refusal(
            reason=reason,
            code=code,
            at_seconds=self.now_seconds,
            disturbs=disturbs,
            retry_at_seconds=retry_at_seconds,
            room_for=room_for,
        )
        if before is None or replace(before, at_seconds=self.now_seconds) != refusal:
            self.note(Refused(model=name, refusal=refusal))

    def still_waits(self, name: ModelName, *, may_disturb: bool) -> bool:
        """Tell whether nothing has changed that could give a model the replica it was refused."""
        view = self.view
        refusal = view.refusals.get(name)
        if (
            refusal is None
            or view.room != view.room_settled
            or refusal.disturbs != may_disturb
            or name in view.failures
        ):
            return False
        return refusal.retry_at_seconds is None or not self.is_over(refusal.retry_at_seconds)

    def settle(self, room: int) -> None:
        """Note that all models that wait were placed again since the view's `room` was this."""
        if self.view.refusals and self.view.room_settled != room:
            self.note(RoomSettled(room=room))

    def lift(self, name: ModelName) -> None:
        """Note that a model waits no longer, if it did."""
        if name in self.view.refusals:
            self.note(RefusalLifted(model=name))
