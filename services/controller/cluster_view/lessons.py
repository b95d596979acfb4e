"""What the cluster learns from each start that ends: rates of a node's stages, parts of a start. Pure.

Rules:
1. A start teaches its node a rate only if nothing else loaded there: shared stages are no measure.
2. What a host's disk gives comes from its page cache, too, and nobody knows before which: both are one stage.
3. A node that has not used a stage yet counts on what the others of the cluster have learnt about theirs,
   with weight 0: its own first measurement replaces it. Before any start has taught a stage, what the first
   store says of its own (a store probes its disk) stands in for the others. The same for a model that was
   never started: its skeleton and its overhead are those of the others' last starts.
4. A checkpoint from afar is opened before its first byte comes: what such starts take longer than the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from statistics import median

from services.controller.cluster_view.bandwidth import as_said, learn
from services.controller.cluster_view.estimate import (
    SEED_OVERHEAD_SECONDS,
    LearntParts,
    learnt_parts,
    seed_skeleton_seconds,
    unexplained_seconds,
)
from services.controller.cluster_view.frozen import changed
from services.controller.cluster_view.learnt import Fleet, Learnt, StartStages, Transferred
from services.controller.cluster_view.view import Model, Node, Phase, Replica, View
from stoker.ids import ReplicaId

DISK = "disk"
PAGE_CACHE = "page_cache"
FAR = frozenset({"remote", "peer"})
FLEET_STARTS = 15
"""Starts of all models that are remembered for the others."""
SURE_STARTS = 3
"""A model with fewer of its own is taken to be partly like the others."""


def is_complete(replica: Replica) -> bool:
    """Tell whether a start has succeeded: one that takes sessions while it loads may still fail."""
    return replica.phase is Phase.READY and not replica.loading


def lessons_of(before: Node | None, replicas: Mapping[ReplicaId, Replica]) -> list[Transferred]:
    """Return what a node's stages moved in the starts that `replicas`, its new report, shows complete."""
    seen = before.replicas if before else {}
    ended = [
        replica
        for replica_id, replica in replicas.items()
        if (was := seen.get(replica_id)) is not None
        and was is not replica
        and not is_complete(was)
        and is_complete(replica)
    ]
    if not ended:
        return []
    loading = sum(not is_complete(found) and found.phase is not Phase.FAILED for found in seen.values())
    if loading > 1:
        return []
    return [transferred for replica in ended for transferred in _by_stage(replica.stages)]


def rates_after(
    node: Node, before: Node | None, lessons: list[Transferred], fleet: Fleet
) -> Mapping[str, Learnt]:
    """Return the node's rates after these lessons, and the fleet's where it has none of its own."""
    rates = dict(before.learnt) if before else {}
    for lesson in lessons:
        known = rates.get(lesson.tier)
        own = known if known is not None and known.weight > 0 else None
        taught = learn(own, lesson, node.last_seen_seconds, seed=0.0)
        if taught is not None:
            rates[lesson.tier] = taught
    for stage, rate in fleet.rates.items():
        if stage not in rates or rates[stage].weight == 0:
            rates[stage] = changed(rate, weight=0.0) if rate.weight else rate
    return rates


def fleet_after(fleet: Fleet, lessons: list[Transferred], node: Node) -> Fleet:
    """Return what the whole cluster knows about its stages after a node's report and its lessons."""
    said = [stage for stage in node.stages if stage not in fleet.rates]
    if not lessons and not said:
        return fleet
    rates = dict(fleet.rates)
    for stage in said:
        found = as_said(node.stages[stage].bytes_per_second, node.last_seen_seconds)
        if found is not None:
            rates[stage] = found
    for lesson in lessons:
        known = rates.get(lesson.tier)
        own = known if known is not None and known.weight > 0 else None
        taught = learn(own, lesson, node.last_seen_seconds, seed=0.0)
        if taught is not None:
            rates[lesson.tier] = taught
    return replace(fleet, rates=rates)


def fleet_with_start(fleet: Fleet, model: Model, stages: StartStages) -> Fleet:
    """Return what the whole cluster knows about starts after one more.

    What a start from afar takes beyond the others' overhead is the opening of its checkpoint there.
    """
    overhead_seconds = unexplained_seconds(stages)
    ratio = stages.skeleton_seconds / seed_skeleton_seconds(model.layers)
    tier = _far_tier(stages)
    if tier is not None:
        near_seconds = fleet.typical[2] if fleet.typical is not None else SEED_OVERHEAD_SECONDS
        beyond_seconds = max(0.0, overhead_seconds - near_seconds)
        known = (*fleet.openings.get(tier, ()), beyond_seconds)[-FLEET_STARTS:]
        fleet = replace(fleet, openings={**fleet.openings, tier: known})
        overhead_seconds = min(overhead_seconds, near_seconds)
    starts = (*fleet.starts, (ratio, stages.first_forward_seconds, overhead_seconds))[-FLEET_STARTS:]
    ratios, forwards, overheads = zip(*starts, strict=True)
    return replace(fleet, starts=starts, typical=(median(ratios), median(forwards), median(overheads)))


def parts_like(view: View, model: Model) -> LearntParts:
    """Return the parts that an estimate for this model counts on.

    Its own skeletons and first passes, with one like the other models' while it has few of its own; the
    overhead is everybody's: attaching and reporting are the same for all, and one start is one sample.
    """
    own = view.measured.get(model.name, ())
    if view.fleet.typical is None:
        return learnt_parts(model, own)
    ratio, typical_forward_seconds, overhead_seconds = view.fleet.typical
    skeletons = [start.skeleton_seconds for start in own]
    forwards = [start.first_forward_seconds for start in own]
    if len(own) < SURE_STARTS:
        skeletons.append(ratio * seed_skeleton_seconds(model.layers))
        forwards.append(typical_forward_seconds)
    return LearntParts(
        skeleton_seconds=median(skeletons),
        first_forward_seconds=median(forwards),
        overhead_seconds=overhead_seconds,
    )


def _far_tier(stages: StartStages) -> str | None:
    """Return the far tier that most bytes of a start came from; None = none did."""
    far = [found for found in stages.transfers if found.tier in FAR and found.bytes]
    return max(far, key=lambda found: found.bytes).tier if far else None


def _by_stage(stages: StartStages) -> list[Transferred]:
    local = [found for found in stages.transfers if found.tier in {DISK, PAGE_CACHE}]
    others = [found for found in stages.transfers if found.tier not in {DISK, PAGE_CACHE}]
    if not local:
        return others
    seconds = sum(found.seconds for found in local)
    longest = max(found.seconds for found in local)
    if stages.weights_seconds > 0:  # they overlap: together they took no longer than the load
        seconds = max(longest, min(seconds, stages.weights_seconds))
    return [Transferred(tier=DISK, bytes=sum(found.bytes for found in local), seconds=seconds), *others]
