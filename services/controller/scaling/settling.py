"""How long a new leader leaves running replicas alone: until the nodes have had time to report. Pure.

Nodes are not in the state, so a new leader learns which ones there are as they report. Who decides after the
first report believes that this node is the cluster, and would stop its replicas to make room that the next
node has free. So, where an earlier leader's replicas run, nothing is stopped or moved *for another model*
until `settling_seconds` have passed and every node with a reservation has reported, or until a node that has
not would count as unreachable. Starts where there is room, and all other stops, don't wait.
"""

from __future__ import annotations

from dataclasses import dataclass

from services.controller.cluster_view.view import View
from services.controller.scaling.actions import Action, Migrate, Stop


@dataclass(frozen=True, slots=True, kw_only=True)
class Settling:
    """The first moments of a term.

    Attributes:
        began_seconds: When it began to decide.
        settling_seconds: What nodes get at least.
        node_timeout_seconds: What they get at most.
    """

    began_seconds: float
    settling_seconds: float
    node_timeout_seconds: float

    def until_seconds(self, view: View, now_seconds: float) -> float:
        """Return when this is over, as far as one can tell now; not after `now_seconds` = it is."""
        if now_seconds >= self.began_seconds + max(self.settling_seconds, self.node_timeout_seconds):
            return now_seconds
        adopted = [found for found in view.reservations.values() if found.adopted]
        if not adopted:
            return self.began_seconds
        is_awaited = any(found.node_id not in view.nodes for found in adopted)
        least, most = self.settling_seconds, max(self.settling_seconds, self.node_timeout_seconds)
        return self.began_seconds + (most if is_awaited else least)


def disturbs(action: Action) -> bool:
    """Tell whether an action takes a running replica's place for another model."""
    return isinstance(action, Migrate) or (isinstance(action, Stop) and action.for_model is not None)
