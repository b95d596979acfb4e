"""A fleet with links: stores and origin send and receive at most so much, shared by their flows."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from services.store.peers.swarm import Choice
from tests.unit.services.store.peers.fleet import Fleet

ORIGIN = ""
TICK_SECONDS = 0.02


@dataclass
class Flow:
    """A chunk on its way to a store; `done` is in chunks, 0 to 1."""

    name: str
    choice: Choice
    done: float = 0.0

    @property
    def source(self) -> str:
        """Who sends it."""
        return self.choice.peer or ORIGIN


class LinkedFleet(Fleet):
    """Fetches take what the links give; a chunk that is sent on is never further than where it comes from."""

    def __init__(self, seed: int, *, chunks: int, chunks_per_second: float) -> None:
        super().__init__(seed, chunks=chunks, threads=16, longest_delay=0.05)
        self.rate = chunks_per_second
        self.flows: list[Flow] = []
        self.sent_from: Counter[str] = Counter()

    @property
    def one_copy_seconds(self) -> float:
        """What a link needs for the file: nobody can have it sooner."""
        return self.chunks / self.rate

    def _begin(self, name: str, choice: Choice) -> None:
        if not self.flows:
            self.at(self.now + TICK_SECONDS, self._flow)
        self.flows.append(Flow(name, choice))
        self.sent_from[choice.peer or ORIGIN] += 1

    def _flow(self) -> None:
        up = Counter(flow.source for flow in self.flows)
        down = Counter(flow.name for flow in self.flows)
        first = {(flow.name, flow.choice.index): flow for flow in self.flows if flow.choice.claimed}
        for flow in sorted(self.flows, key=lambda flow: not flow.choice.claimed):
            step = TICK_SECONDS * self.rate / max(up[flow.source], down[flow.name])
            flow.done = min(1.0, flow.done + step)
            before = first.get((flow.source, flow.choice.index))
            if before is not None:
                flow.done = min(flow.done, before.done)
        ended = [flow for flow in self.flows if flow.done >= 1.0 - 1e-9]
        self.flows = [flow for flow in self.flows if flow not in ended]
        if self.flows:
            self.at(self.now + TICK_SECONDS, self._flow)
        for flow in sorted(ended, key=lambda flow: not flow.choice.claimed):
            self._fetched(flow.name, flow.choice)
