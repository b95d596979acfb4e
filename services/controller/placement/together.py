"""Cold models that ask at the same time: who chooses first, so that two don't fight for one node. Pure.

Who waits longest chooses first, with one exception: where two want the same slots and the elder has another
place, the one that would lose more by giving way (its regret) goes first. Nobody waits for longer than with
its second choice.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from services.controller.cluster_view.index import index_of
from services.controller.cluster_view.view import Policy, View
from services.controller.placement.place import Placed, place
from services.controller.placement.room import devices_needed
from stoker.ids import ModelName, NodeId

MAX_TOGETHER = 8
"""Models placed together, the longest waiting; the others come after them one by one."""


def order_together(
    view: View, names: Sequence[ModelName], now_seconds: float, policy: Policy
) -> tuple[ModelName, ...]:
    """Return the order in which these models, longest waiting first, choose their nodes."""
    batch = names[:MAX_TOGETHER]
    if len(batch) < 2:  # noqa: PLR2004 - one alone fights nobody
        return tuple(names)
    wanted: dict[NodeId, list[ModelName]] = defaultdict(list)
    regrets: dict[ModelName, float | None] = {}
    for name in batch:
        decision = place(view, name, now_seconds, policy, may_disturb=False)
        if isinstance(decision, Placed):
            wanted[decision.node_id].append(name)
            regrets[name] = _regret_seconds(decision)
    first = {name: age for age, name in enumerate(batch)}
    for node_id, rivals in wanted.items():
        if _fight(view, node_id, rivals) and all(regrets[name] is not None for name in rivals):
            places = sorted(first[name] for name in rivals)
            rivals.sort(key=lambda name: (-(regrets[name] or 0.0), first[name]))
            first.update(zip(rivals, places, strict=True))
    return (*sorted(batch, key=lambda name: first[name]), *names[MAX_TOGETHER:])


def _regret_seconds(decision: Placed) -> float | None:
    """Return what the second-best node would cost more; None where there is no second one."""
    others = [option for option in decision.options if option.node_id != decision.node_id]
    if not others:
        return None
    best_seconds = decision.estimate.total_seconds
    return min(option.cost_seconds for option in others) - best_seconds


def _fight(view: View, node_id: NodeId, rivals: list[ModelName]) -> bool:
    """Tell whether the node is wanted by more models than it has slots for."""
    needed = sum(devices_needed(view.models[name]) for name in rivals)
    return needed > len(index_of(view).summaries[node_id].free)
