"""A fleet of stores that load one file on a virtual clock: messages take time, stores come and die."""

from __future__ import annotations

import heapq
import itertools
import random
from collections import Counter
from dataclasses import dataclass, field

from services.store.peers.swarm import FileSwarm

STEP_SECONDS = 0.25


@dataclass
class Node:
    """A store: its swarm, who asked it, and what it is doing."""

    swarm: FileSwarm | None = None
    have: set[int] = field(default_factory=set)
    asked_by: dict[str, bool] = field(default_factory=dict)
    asks: set[str] = field(default_factory=set)
    dead: bool = False
    busy: int = 0


class Fleet:
    """Runs the stores' own decisions until everyone alive has everything."""

    def __init__(self, seed: int, *, chunks: int, threads: int = 4, longest_delay: float = 0.2) -> None:
        self.random = random.Random(seed)
        self.chunks = chunks
        self.threads = threads
        self.longest_delay = longest_delay
        self.nodes: dict[str, Node] = {}
        self.origin: Counter[int] = Counter()
        self.sent: Counter[str] = Counter()
        self.now = 0.0
        self.deaths = 0
        self.speed: dict[str, float] = {}
        self._events: list = []
        self._order = itertools.count()
        self._links: dict[tuple[str, str], float] = {}

    def at(self, seconds: float, action) -> None:
        """Do something at a time."""
        heapq.heappush(self._events, (seconds, next(self._order), action))

    def message(self, source: str, target: str, action) -> None:
        """Deliver in order, after a delay."""
        arrives = self.now + self.random.uniform(0.001, self.longest_delay)
        arrives = max(arrives, self._links.get((source, target), 0.0) + 1e-9)
        self._links[source, target] = arrives
        self.at(arrives, lambda: None if self.nodes[target].dead else action())

    def join(self, name: str, *, complete: bool = False) -> None:
        """A store begins to load, or is there with everything."""
        node = self.nodes.setdefault(name, Node())
        if complete:
            node.have = set(range(self.chunks))
            return
        node.swarm = FileSwarm(me=name, chunks=self.chunks, joined_seconds=self.now)
        for peer in self.nodes:
            if peer != name and not self.nodes[peer].dead:
                self._ask(name, peer)
        for peer, loading in node.asked_by.items():
            node.swarm.interested(peer, loading=loading)
            self._tell(name, peer)
        self._work(name)
        self.at(self.now + STEP_SECONDS, lambda: self._tick(name))

    def die(self, name: str) -> None:
        """A store is gone; its peers notice some time later."""
        node = self.nodes[name]
        if node.dead or (node.swarm is None and not node.have):
            return
        node.dead = True
        self.deaths += 1
        for peer in self.nodes:
            if peer != name:
                self.message(name, peer, lambda peer=peer: self._noticed(peer, name))

    def run(self, until_seconds: float = 10_000.0) -> None:
        """Let time pass until nothing happens any more."""
        while self._events:
            self.now, _, action = heapq.heappop(self._events)
            assert self.now < until_seconds, "it never ends"
            action()

    def unfinished(self) -> list[str]:
        """Stores that are alive and lack something."""
        return [name for name, node in self.nodes.items() if not node.dead and len(node.have) < self.chunks]

    def _ask(self, name: str, peer: str) -> None:
        node = self.nodes[name]
        if node.swarm is not None and peer not in node.asks:
            node.asks.add(peer)
            node.swarm.expect(peer)
            self.message(name, peer, lambda: self._asked(peer, name))

    def _asked(self, name: str, asker: str) -> None:
        node = self.nodes[name]
        self._ask(name, asker)  # whoever comes in is dialled back
        node.asked_by[asker] = True
        if node.swarm is not None:
            node.swarm.interested(asker, loading=True)
        self._tell(name, asker)

    def _tell(self, name: str, asker: str) -> None:
        node = self.nodes[name]
        have = sum(1 << index for index in node.have)
        fetching = node.swarm.fetching if node.swarm else 0
        loading = node.swarm is not None
        self.message(
            name,
            asker,
            lambda: self._told(asker, name, have=have, fetching=fetching, loading=loading),
        )

    def _told(self, name: str, peer: str, **state) -> None:
        swarm = self.nodes[name].swarm
        if swarm is not None:
            swarm.update(peer, **state)
            self._work(name)

    def _noticed(self, name: str, dead: str) -> None:
        node = self.nodes[name]
        node.asked_by.pop(dead, None)
        if node.swarm is not None:
            node.swarm.gone(dead)
            self._work(name)

    def _tick(self, name: str) -> None:
        node = self.nodes[name]
        if node.swarm is not None and not node.dead:
            self._work(name)
            self.at(self.now + STEP_SECONDS, lambda: self._tick(name))

    def _work(self, name: str) -> None:
        node = self.nodes[name]
        swarm = node.swarm
        while swarm is not None and not node.dead and node.busy < self.threads:
            wanted = [index for index in range(self.chunks) if index not in node.have]
            choice = swarm.choose(wanted, self.now)
            if choice is None:
                return
            node.busy += 1
            if choice.peer is None:
                self.origin[choice.index] += 1
            else:
                self.sent[choice.peer] += 1
            if choice.claimed:
                self._tell_all(name)
            self._begin(name, choice)

    def _begin(self, name: str, choice) -> None:
        seconds = self.random.uniform(0.02, 0.6) * self.speed.get(name, 1.0)
        self.at(self.now + seconds, lambda: self._fetched(name, choice))

    def _fetched(self, name: str, choice) -> None:
        node = self.nodes[name]
        if node.dead or node.swarm is None:
            return
        giver = None if choice.peer is None else self.nodes[choice.peer]
        if giver is not None and not giver.dead and self._is_fetching(giver, choice.index):
            self.at(self.now + 0.1, lambda: self._fetched(name, choice))  # it sends on what it gets
            return
        node.busy -= 1
        failed = giver is not None and giver.dead
        refused = giver is not None and not failed and choice.index not in giver.have
        node.swarm.release(choice.index, self.now, done=not (failed or refused))
        if failed:
            node.swarm.drop(choice.peer, until_seconds=self.now + 30)
        elif refused:
            node.swarm.refused(choice.peer, choice.index)
        else:
            node.swarm.arrived(choice.index)
            node.have.add(choice.index)
        if len(node.have) == self.chunks:
            node.swarm = None
        self._tell_all(name)
        self._work(name)

    @staticmethod
    def _is_fetching(node: Node, index: int) -> bool:
        return node.swarm is not None and bool(node.swarm.fetching >> index & 1) and index not in node.have

    def _tell_all(self, name: str) -> None:
        for asker in self.nodes[name].asked_by:
            self._tell(name, asker)
