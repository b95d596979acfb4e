"""What the policies' table is made of: one run's figures per line of a file, and the rows they give."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from policy_cells import Cell

from services.controller.simulation.report import Summary

OURS = "stoker"
TARGETS = {"shepherd": 1.27, "serverless": 1.95}
"""The paper's margins of its own scheduler over these (OSDI '24, section 7)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One policy over one cell; `standing_seconds` before the first request."""

    cell: Cell
    policy: str
    standing_seconds: float

    @property
    def key(self) -> str:
        """Return its name in a results file."""
        return json.dumps(asdict(self), sort_keys=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What of a run's summary is told; seconds."""

    mean_seconds: float
    p99_seconds: float
    requests: int
    lost: int

    @classmethod
    def of(cls, summary: Summary) -> Figures:
        """Return a summary's."""
        return cls(
            mean_seconds=summary.startup_mean,
            p99_seconds=summary.startup_p99,
            requests=summary.requests,
            lost=summary.lost,
        )


@dataclass(slots=True)
class Results:
    """Figures by run, kept in a file line by line, so that a long table may go on where it was cut off.

    Attributes:
        path: The file; None = in memory only.
        found: Figures by `Run.key`.
    """

    path: Path | None
    found: dict[str, Figures] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Read what an earlier sitting has found."""
        if self.path is None or not self.path.exists():
            return
        for line in self.path.read_text().splitlines():
            read = json.loads(line)
            self.found[read["run"]] = Figures(**read["figures"])

    def add(self, run: Run, figures: Figures) -> None:
        """Keep a run's figures."""
        self.found[run.key] = figures
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps({"run": run.key, "figures": asdict(figures)}) + "\n")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A row of the table: means over its seeds; seconds.

    Attributes:
        name: Of the cell without its seed.
        seeds, requests: How many; requests of all seeds.
        by_policy: Mean and 99th percentile of start-up, nothing standing.
        standing: Ours on a cluster that has stood.
        floor: Of first come, first served when starts take no time.
        lost: Of each policy, over all seeds.
    """

    name: str
    seeds: int
    requests: int
    by_policy: Mapping[str, tuple[float, float]]
    standing: tuple[float, float] | None
    floor: tuple[float, float]
    lost: Mapping[str, int]

    def ratio(self, policy: str, *, standing: bool = False) -> float:
        """Return the policy's 99th percentile over ours."""
        ours = self.standing if standing and self.standing is not None else self.by_policy[OURS]
        return self.by_policy[policy][1] / max(ours[1], 1e-3)


def row_of(
    cells: Sequence[Cell],
    floors: Sequence[tuple[float, float]],
    results: Results,
    policies: Sequence[str],
    standing_seconds: float,
) -> Row:
    """Return the row of one cell's seeds."""

    def found(policy: str, stood_seconds: float) -> list[Figures]:
        runs = [Run(cell=cell, policy=policy, standing_seconds=stood_seconds) for cell in cells]
        return [results.found[run.key] for run in runs if run.key in results.found]

    by_policy = {policy: found(policy, 0.0) for policy in policies}
    stood = found(OURS, standing_seconds) if standing_seconds else []
    return Row(
        name=cells[0].row,
        seeds=len(cells),
        requests=sum(each.requests for each in by_policy[policies[0]]),
        by_policy={policy: _means(figures) for policy, figures in by_policy.items()},
        standing=_means(stood) if stood else None,
        floor=(
            statistics.fmean(mean for mean, _ in floors),
            statistics.fmean(p99 for _, p99 in floors),
        ),
        lost={policy: sum(each.lost for each in figures) for policy, figures in by_policy.items()},
    )


def table(rows: Iterable[Row], policies: Sequence[str]) -> Iterator[str]:
    """Yield the table's lines, in Markdown; margins of the paper that are reached are bold."""
    others = [policy for policy in policies if policy != OURS]
    over = ", ".join(others)
    heads = ["", "requests (seeds)", "ours", "ours, standing", *others, "floor", f"P99 over ours: {over}"]
    heads += ["over ours standing", "lost"]
    yield "| " + " | ".join(heads) + " |"
    yield "| " + " | ".join("---" for _ in heads) + " |"
    for row in rows:
        cells = [
            row.name,
            f"{row.requests} ({row.seeds})",
            _pair(row.by_policy[OURS]),
            _pair(row.standing) if row.standing else "",
            *(_pair(row.by_policy[policy]) for policy in others),
            _pair(row.floor),
            ", ".join(_ratio(row, policy, standing=False) for policy in others),
            ", ".join(_ratio(row, policy, standing=True) for policy in others) if row.standing else "",
            ", ".join(str(row.lost[policy]) for policy in policies) if any(row.lost.values()) else "0",
        ]
        yield "| " + " | ".join(cells) + " |"


def _ratio(row: Row, policy: str, *, standing: bool) -> str:
    ratio = row.ratio(policy, standing=standing)
    is_reached = ratio >= TARGETS.get(policy, float("inf"))
    return f"**{ratio:.2f}x**" if is_reached else f"{ratio:.2f}x"


def _means(figures: Sequence[Figures]) -> tuple[float, float]:
    if not figures:
        return (0.0, 0.0)
    return (
        statistics.fmean(each.mean_seconds for each in figures),
        statistics.fmean(each.p99_seconds for each in figures),
    )


def _pair(pair: tuple[float, float]) -> str:
    return f"{pair[0]:.2f} / {pair[1]:.2f}"
