"""What a plan has folded is taken over where that very thing happens to that very view."""

from __future__ import annotations

from services.controller.cluster_view.events import Demanded, DemandEnded
from services.controller.cluster_view.fold import fold
from services.controller.cluster_view.foreseen import Foreseen, fold_foreseen
from services.controller.cluster_view.index import index_of
from services.controller.cluster_view.view import Policy
from services.controller.scaling.actions import Note
from services.controller.scaling.reconcile import reconcile
from stoker.ids import ModelName
from tests.unit.services.controller.builders import (
    NOW_SECONDS,
    a_model,
    a_node,
    a_replica,
    a_reservation,
    a_view,
)

M = ModelName("m")
ASKED, LEFT = Demanded(model=M, now_seconds=NOW_SECONDS), DemandEnded(model=M)
VIEW = a_view(models=(a_model("m"),))


def test_what_was_foreseen_of_this_view_is_not_folded_again() -> None:
    foreseen = [Foreseen(VIEW, ASKED, fold(VIEW, ASKED))]

    assert fold_foreseen(VIEW, Demanded(model=M, now_seconds=NOW_SECONDS), foreseen) is foreseen[0].after


def test_another_event_or_an_equal_view_is_folded() -> None:
    asked = fold(VIEW, ASKED)
    foreseen = [Foreseen(VIEW, ASKED, a_view())]

    assert fold_foreseen(asked, LEFT, foreseen) == fold(asked, LEFT)
    assert fold_foreseen(a_view(models=(a_model("m"),)), ASKED, foreseen) == asked


def test_a_plan_names_every_fold_from_the_view_that_it_was_made_for_on() -> None:
    busy = a_replica("r", "other")
    view = a_view(
        models=(a_model("m"), a_model("other")),
        nodes=(a_node("a", replicas=(busy,)),),
        reservations=(a_reservation("r", "other", "a"),),
    )
    view = fold(view, ASKED)

    plan = reconcile(view, NOW_SECONDS, Policy())

    assert plan.foreseen[0].before is view
    for before, after in zip(plan.foreseen, plan.foreseen[1:], strict=False):
        assert after.before is before.after
    for before_view, event, after_view in plan.foreseen:
        assert fold(before_view, event) == after_view
        assert index_of(fold(before_view, event)) == index_of(after_view)
    noted = [each.event for each in plan.actions if isinstance(each, Note)]
    assert noted
    assert all(any(event is each.event for each in plan.foreseen) for event in noted)
