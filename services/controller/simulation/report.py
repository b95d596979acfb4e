"""What a simulated run was like: figures for people and for machines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from services.controller.simulation.world import World
from stoker.units import GB


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """One run's figures; seconds, shares in [0, 1].

    Attributes:
        policy: Its name.
        requests: How many came.
        lost: How many waited beyond the time-out.
        startup_mean, startup_p50, startup_p95, startup_p99: From arrival until a replica serves it, waiting
            after a preemption included; lost requests count with their whole wait.
        first_token_mean, first_token_p50, first_token_p95, first_token_p99: From arrival to the first
            token, of served requests.
        cold: Share of requests that found no replica with a place.
        utilisation: Share of all device time in which devices computed.
        held: Share in which they had an owner.
        starts, preemptions, displacements, migrations: How many; a preempted session begins again, a
            displaced one waits and goes on after its last token, a migrated one goes on at once.
        start_error_p50, start_error_p90: Of the predicted against the measured time of starts, relative; 0
            where nothing was predicted.
        gigabytes: Moved by starts, by tier they came from.
    """

    policy: str
    requests: int
    lost: int
    startup_mean: float
    startup_p50: float
    startup_p95: float
    startup_p99: float
    first_token_mean: float
    first_token_p50: float
    first_token_p95: float
    first_token_p99: float
    cold: float
    utilisation: float
    held: float
    starts: int
    preemptions: int
    displacements: int
    migrations: int
    start_error_p50: float
    start_error_p90: float
    gigabytes: dict[str, float]


def summarise(world: World) -> Summary:
    """Return the figures of a run that has ended."""
    waits = np.array([session.wait_seconds for session in world.sessions] or [0.0])
    firsts = np.array(
        [
            session.first_token_seconds - session.request.arrival_seconds
            for session in world.sessions
            if session.first_token_seconds is not None
        ]
        or [0.0]
    )
    device_seconds = max(world.now, 1e-9) * sum(len(node.owners) for node in world.nodes.values())
    counters = world.counters
    return Summary(
        policy=world.policy.name,
        requests=len(world.sessions),
        lost=sum(session.lost for session in world.sessions),
        startup_mean=float(waits.mean()),
        startup_p50=float(np.percentile(waits, 50)),
        startup_p95=float(np.percentile(waits, 95)),
        startup_p99=float(np.percentile(waits, 99)),
        first_token_mean=float(firsts.mean()),
        first_token_p50=float(np.percentile(firsts, 50)),
        first_token_p95=float(np.percentile(firsts, 95)),
        first_token_p99=float(np.percentile(firsts, 99)),
        cold=sum(session.cold for session in world.sessions) / max(1, len(world.sessions)),
        utilisation=counters.busy_device_seconds / device_seconds,
        held=counters.held_device_seconds / device_seconds,
        starts=counters.starts,
        preemptions=counters.preemptions,
        displacements=counters.displacements,
        migrations=counters.migrations,
        start_error_p50=float(np.percentile(counters.start_errors or [0.0], 50)),
        start_error_p90=float(np.percentile(counters.start_errors or [0.0], 90)),
        gigabytes={tier: moved / GB for tier, moved in sorted(counters.bytes_by_tier.items())},
    )


def table(summaries: Sequence[Summary]) -> str:
    """Return the figures side by side, one line per policy."""
    head = (
        f"{'policy':<28}{'mean':>8}{'P50':>8}{'P95':>8}{'P99':>8}{'TTFT':>8}{'P99':>8}"
        f"{'cold':>7}{'util':>7}{'starts':>8}{'moves':>7}{'kills':>7}{'lost':>6}{'error':>7}  bytes by tier"
    )
    return "\n".join(["start-up and time to first token in seconds", head, *map(_line, summaries)])


def _line(summary: Summary) -> str:
    tiers = ", ".join(f"{tier} {moved:,.0f} GB" for tier, moved in summary.gigabytes.items())
    return (
        f"{summary.policy:<28}{summary.startup_mean:>8.2f}{summary.startup_p50:>8.2f}"
        f"{summary.startup_p95:>8.2f}{summary.startup_p99:>8.2f}{summary.first_token_mean:>8.2f}"
        f"{summary.first_token_p99:>8.2f}{summary.cold:>7.1%}{summary.utilisation:>7.1%}{summary.starts:>8}"
        f"{summary.migrations:>7}{summary.preemptions + summary.displacements:>7}{summary.lost:>6}"
        f"{summary.start_error_p50:>7.0%}  {tiers}"
    )


def to_json(summaries: Sequence[Summary]) -> str:
    """Return the figures for machines, one object per policy."""
    return json.dumps([asdict(summary) for summary in summaries], indent=2)
