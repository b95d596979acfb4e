"""Loads of replicas: a host reads a checkpoint once for all that start there meanwhile (single flight).

A load has two stages that run at once: the checkpoint's way into the host (disk or network), which whoever
starts the same model on the same host meanwhile shares, and each replica's own copy over the bus. It ends
with the later of the two. This holds for every policy alike, as the real store does it. What is fetched ahead
of any start gives way: it stands still while its host fetches for somebody who waits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from services.controller.simulation.flows import Flows, Link, Transfer
from stoker.ids import ModelName, NodeId


@dataclass(slots=True, eq=False)
class Fetch:
    """A checkpoint on its way into a host."""

    transfer: Transfer
    takers: dict[Load, None] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class Load:
    """One replica's load."""

    done: Callable[[], None]
    key: tuple[NodeId, ModelName]
    copy: Transfer | None = None
    """Over the bus; None once that has ended."""
    fetch: Fetch | None = None
    """What it waits for with others; None = all bytes are in the host."""


@dataclass(slots=True, eq=False)
class Ahead:
    """A checkpoint that is fetched before anybody asks for it; `transfer` is None while it stands still."""

    name: ModelName
    left_bytes: float
    source: Sequence[Link]
    ended: Callable[[bool], None]
    transfer: Transfer | None = None


class Loads:
    """All loads of a simulation.

    Args:
        flows: What moves the bytes.
    """

    def __init__(self, flows: Flows) -> None:
        self._flows = flows
        self._fetches: dict[tuple[NodeId, ModelName], Fetch] = {}
        self._fetching: Counter[NodeId] = Counter()
        self._ahead: dict[NodeId, Ahead] = {}

    def is_coming(self, node_id: NodeId, name: ModelName) -> bool:
        """Tell whether a checkpoint is on its way into a host."""
        return (node_id, name) in self._fetches

    def begin(  # noqa: PLR0913 - a load's parts, each named by its caller
        self,
        node_id: NodeId,
        name: ModelName,
        byte_count: int,
        *,
        source: Sequence[Link],
        bus: Link,
        fetched: Callable[[], None],
        done: Callable[[], None],
    ) -> Load:
        """Begin a load.

        Args:
            node_id: The host.
            name: The model.
            byte_count: Of its checkpoint.
            source: What the bytes come over into the host; empty = they are in its memory.
            bus: From there to the devices, the replica's own.
            fetched: Called once when the host has all bytes, whoever shares them.
            done: Called when the devices have them.
        """
        load = Load(done, (node_id, name))
        if source:
            load.fetch = self._fetches.get(load.key) or self._fetch(load.key, byte_count, source, fetched)
            load.fetch.takers[load] = None
        load.copy = self._flows.begin([bus], byte_count, lambda: self._copied(load))
        return load

    def fetch_ahead(
        self,
        node_id: NodeId,
        name: ModelName,
        byte_count: int,
        *,
        source: Sequence[Link],
        ended: Callable[[bool], None],
    ) -> None:
        """Begin to fetch a checkpoint nobody waits for; one per host at a time.

        Args:
            node_id: The host.
            name: The model.
            byte_count: Of its checkpoint.
            source: What the bytes come over.
            ended: Told whether all bytes are there; if not, a start fetches the rest, or the host failed.
        """
        if node_id in self._ahead:
            raise AssertionError(f"{node_id} fetches {self._ahead[node_id].name} ahead already")
        self._ahead[node_id] = Ahead(name, float(byte_count), source, ended)
        self._go_on(node_id)

    def cancel(self, load: Load) -> None:
        """Give a load up; what it shares goes on while another one waits for it."""
        if load.copy is not None:
            self._flows.cancel(load.copy)
            load.copy = None
        fetch, load.fetch = load.fetch, None
        if fetch is not None:
            del fetch.takers[load]
            if not fetch.takers:
                self._flows.cancel(fetch.transfer)
                self._ended(load.key)

    def give_up_ahead(self, node_id: NodeId) -> None:
        """Give up what a host that fails fetches ahead."""
        ahead = self._ahead.pop(node_id, None)
        if ahead is not None:
            if ahead.transfer is not None:
                self._flows.cancel(ahead.transfer)
            ahead.ended(False)

    def _fetch(
        self,
        key: tuple[NodeId, ModelName],
        byte_count: int,
        source: Sequence[Link],
        fetched: Callable[[], None],
    ) -> Fetch:
        def arrived() -> None:
            fetch = self._fetches[key]
            self._ended(key)
            fetched()
            for load in fetch.takers:
                load.fetch = None
                if load.copy is None:
                    load.done()

        left_bytes = self._give_way(key, byte_count)
        self._fetching[key[0]] += 1
        fetch = self._fetches[key] = Fetch(self._flows.begin(source, left_bytes, arrived))
        return fetch

    def _ended(self, key: tuple[NodeId, ModelName]) -> None:
        del self._fetches[key]
        self._fetching[key[0]] -= 1
        self._go_on(key[0])

    def _give_way(self, key: tuple[NodeId, ModelName], byte_count: int) -> float:
        """Stop what the host fetches ahead; return what is left to fetch of this checkpoint, bytes."""
        node_id, name = key
        ahead = self._ahead.get(node_id)
        if ahead is None:
            return byte_count
        if ahead.transfer is not None:
            ahead.left_bytes = self._flows.remaining(ahead.transfer)
            self._flows.cancel(ahead.transfer)
            ahead.transfer = None
        if ahead.name != name:
            return byte_count
        del self._ahead[node_id]
        ahead.ended(False)
        return ahead.left_bytes

    def _go_on(self, node_id: NodeId) -> None:
        ahead = self._ahead.get(node_id)
        if ahead is None or ahead.transfer is not None or self._fetching[node_id]:
            return

        def arrived() -> None:
            del self._ahead[node_id]
            ahead.ended(True)

        ahead.transfer = self._flows.begin(ahead.source, ahead.left_bytes, arrived)

    def _copied(self, load: Load) -> None:
        load.copy = None
        if load.fetch is None:
            load.done()
