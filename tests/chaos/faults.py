"""Faults: which come when (pure, by seed), and how each is done to a running cluster.

Every fault ends by itself, with what it hurt whole again; several may overlap. `ROUNDS` names all there are;
a schedule goes through all of them in shuffled order before one comes twice.
"""

from __future__ import annotations

import asyncio
import random
import signal
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass

import psutil

from stoker.errors import StokerError
from stoker.rpc import connect, translated
from stoker.v1 import controller_pb2, node_agent_pb2, node_agent_pb2_grpc
from tests.chaos.cluster import NODE_FORGET_SECONDS, ChaosCluster, until

OPEN = controller_pb2.NODE_SCHEDULING_OPEN
DRAINED = controller_pb2.NODE_SCHEDULING_DRAINED
BEYOND_LEASE_SECONDS = NODE_FORGET_SECONDS + 2.0
SHORT_SECONDS = (0.5, 3.0)
"""A pause that everybody sits out."""
MOVE_SECONDS = 0.6
"""Within this of the order a move's victim is killed: rounds, the switch, the first tokens after it."""
ANY_FENCE = 2**62
"""An order's that no controller gives: chaos stands for all of them."""
LONG_SECONDS = (7.0, 9.0)
"""A worker's pause that its agent takes for its death."""
GATEWAY_SECONDS = (1.0, 14.0)
"""A gateway's pause: one that everybody sits out, up to one after which agents and clients have left it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One fault of a schedule."""

    kind: str
    pause_seconds: float
    """Before the next one."""
    pick: float
    """Chooses the victim, [0, 1)."""
    seconds: float
    """How long it lasts where that is open, as a fraction of its range, [0, 1)."""


def schedule(seed: int, *, every_seconds: float, kinds: tuple[str, ...]) -> Iterator[Fault]:
    """Yield faults for ever, one each `every_seconds` in the mean."""
    draw = random.Random(seed)
    while True:
        for kind in draw.sample(kinds, len(kinds)):
            yield Fault(
                kind=kind,
                pause_seconds=draw.uniform(0.5, 1.5) * every_seconds,
                pick=draw.random(),
                seconds=draw.random(),
            )


class Faults:
    """Does faults to a cluster.

    Args:
        cluster: The victim.
        say: Told what happens, for people.

    Attributes:
        done: How many of each kind were done.
        zombies: Replicas whose node outlived its lease: they must be gone once it is back.
    """

    def __init__(self, cluster: ChaosCluster, say: Callable[[str], None]) -> None:
        self.done: Counter[str] = Counter()
        self.zombies: set[str] = set()
        self._cluster = cluster
        self._say = say
        self._busy: set[str] = set()
        self._is_gateway_busy = False

    async def do(self, fault: Fault) -> None:
        """Do one fault and return when it is over; skipped where every possible victim is in one already."""
        nodes = [node.node_id for node in self._cluster.nodes if node.node_id not in self._busy]
        if len(self._busy) >= max(1, len(self._cluster.nodes) - 1) or not nodes:
            return  # one node at least must be left to serve
        node = nodes[int(fault.pick * len(nodes))]
        work = KINDS[fault.kind]
        self._busy.add(node)
        try:
            await work(self, node, fault.seconds)
        finally:
            self._busy.discard(node)

    # --- processes ---

    async def kill_worker(self, node: str, seconds: float) -> None:
        """SIGKILL a serving worker."""
        del seconds
        for process in await self._workers(node):
            self._note("kill worker", node, process.pid)
            process.kill()
            return

    async def pause_worker(self, node: str, seconds: float) -> None:
        """Stop a serving worker for a while that everybody sits out."""
        for process in await self._workers(node):
            async with self._paused("pause worker", node, process):
                await asyncio.sleep(_between(SHORT_SECONDS, seconds))
            return

    async def hang_worker(self, node: str, seconds: float) -> None:
        """Stop a serving worker for so long that its agent gives it up."""
        for process in await self._workers(node):
            async with self._paused("hang worker", node, process):
                await asyncio.sleep(_between(LONG_SECONDS, seconds))
            return

    async def kill_agent(self, node: str, seconds: float) -> None:
        """SIGKILL a node agent; its workers end with it."""
        del seconds
        await self._kill("kill agent", f"node_agent of {node}", node)

    async def kill_store(self, node: str, seconds: float) -> None:
        """SIGKILL a store; workers keep their weights."""
        del seconds
        await self._kill("kill store", f"store of {node}", node)

    async def kill_controller(self, node: str, seconds: float) -> None:
        """SIGKILL the controller."""
        del seconds, node
        await self._kill("kill controller", "controller", "")

    async def kill_gateway(self, node: str, seconds: float) -> None:
        """SIGKILL one of the gateways; the other one stays."""
        del node
        with self._one_gateway(seconds) as name:
            if name:
                await self._kill("kill gateway", f"gateway of {name}", name)

    async def pause_gateway(self, node: str, seconds: float) -> None:
        """Stop one of the gateways and wake it: some of its clients have gone to the other one meanwhile."""
        del node
        with self._one_gateway(2.0 * seconds % 1.0) as name:
            process = self._cluster.process(f"gateway of {name}") if name else None
            if process is not None:
                async with self._paused("pause gateway", name, process):
                    await asyncio.sleep(_between(GATEWAY_SECONDS, seconds))

    async def zombie_agent(self, node: str, seconds: float) -> None:
        """Stop a node agent beyond its lease, then wake it."""
        process = self._cluster.process(f"node_agent of {node}")
        if process is None:
            return
        owned, controller = await self._replicas(node), self._controller_pid()
        async with self._paused("zombie agent", node, process):
            await asyncio.sleep(BEYOND_LEASE_SECONDS + 3.0 * seconds)
        await self._expect_gone(node, owned, controller)

    # --- network ---

    async def partition(self, node: str, seconds: float) -> None:
        """Cut a node's agent off from gateways and controllers beyond its lease, then mend the links."""
        owned, controller = await self._replicas(node), self._controller_pid()
        links = self._cluster.links_of(node)
        self._note("partition", node, 0)
        for link in links:
            link.cut()
        try:
            await asyncio.sleep(BEYOND_LEASE_SECONDS + 3.0 * seconds)
        finally:
            for link in links:
                link.mend()
        await self._expect_gone(node, owned, controller)

    async def blip(self, node: str, seconds: float) -> None:
        """Cut a node's agent off for a moment."""
        links = self._cluster.links_of(node)
        self._note("blip", node, 0)
        for link in links:
            link.cut()
        await asyncio.sleep(_between(SHORT_SECONDS, seconds))
        for link in links:
            link.mend()

    # --- orders ---

    async def drain(self, node: str, seconds: float) -> None:
        """Drain a node, which moves its streams, and open it again."""
        self._note("drain", node, 0)
        await self._schedule(node, DRAINED)
        await asyncio.sleep(2.0 + 6.0 * seconds)
        await self._schedule(node, OPEN)

    async def leave(self, node: str, seconds: float) -> None:
        """SIGTERM to a node agent: it moves its streams before it ends, and is started again."""
        del seconds
        title = f"node_agent of {node}"
        process = self._cluster.process(title)
        if process is not None:
            self._note("stop agent", node, process.pid)
            process.terminate()
            await self._cluster.until_serving(title, not_pid=process.pid)

    async def move(self, node: str, seconds: float) -> None:
        """Have a node's sessions moved to another one; both stay."""
        del seconds
        await self._move("move", node)

    async def move_and_kill_source(self, node: str, seconds: float) -> None:
        """SIGKILL the worker that sessions move from, at some moment of the move."""
        found = await self._move("move, kill source", node)
        await self._kill_later(found and found[0].worker_pid, seconds)

    async def move_and_kill_destination(self, node: str, seconds: float) -> None:
        """SIGKILL the worker that sessions move to, at some moment of the move."""
        found = await self._move("move, kill destination", node)
        await self._kill_later(found and found[1].worker_pid, seconds)

    async def move_and_kill_controller(self, node: str, seconds: float) -> None:
        """SIGKILL the controller at some moment of a move."""
        if await self._move("move, kill controller", node):
            await asyncio.sleep(MOVE_SECONDS * seconds)
            await self._kill("kill controller", "controller", "")

    # --- parts ---

    async def _move(self, kind: str, node: str) -> tuple[node_agent_pb2.Replica, ...]:
        """Order the sessions of a node's busiest replica to another node; return both replicas, or none."""
        ready = node_agent_pb2.REPLICA_STATE_READY
        known = [each for each in await self._all_replicas() if each.state == ready]
        known.sort(key=lambda each: -each.running_sessions)
        source = next((each for each in known if each.node_id == node and each.running_sessions), None)
        others = [each for each in known if each.node_id != node and each.node_id not in self._busy]
        if source is None or not others:
            return ()
        order = node_agent_pb2.MoveSessionsRequest(
            replica_id=source.replica_id, to_replica_id=others[-1].replica_id, reason="chaos", fence=ANY_FENCE
        )
        try:
            async with connect(self._cluster.links[node].address) as channel:
                with translated(node):
                    stub = node_agent_pb2_grpc.NodeAgentStub(channel)
                    answer = await stub.MoveSessions(order)
        except StokerError:
            return ()
        if answer.sessions:
            self._note(kind, f"{node} to {others[-1].node_id}, {answer.sessions} sessions", 0)
        return (source, others[-1]) if answer.sessions else ()

    async def _kill_later(self, pid: int | tuple[()], seconds: float) -> None:
        """SIGKILL a process within the time that a move may take."""
        if pid:
            await asyncio.sleep(MOVE_SECONDS * seconds)
            with suppress(psutil.NoSuchProcess):
                psutil.Process(pid).kill()

    def _note(self, kind: str, node: str, pid: int) -> None:
        self.done[kind] += 1
        self._say(f"{kind} {node}" + (f" (pid {pid})" if pid else ""))

    async def _kill(self, kind: str, title: str, node: str) -> None:
        process = self._cluster.process(title)
        if process is not None:
            self._note(kind, node, process.pid)
            process.kill()
            await self._cluster.until_serving(title, not_pid=process.pid)

    @contextmanager
    def _one_gateway(self, pick: float) -> Iterator[str]:
        """Yield the gateway to hurt; empty while one is hurt already: the other one must serve."""
        if self._is_gateway_busy:
            yield ""
            return
        self._is_gateway_busy = True
        try:
            yield self._cluster.gateways[int(pick * len(self._cluster.gateways))].name
        finally:
            self._is_gateway_busy = False

    @asynccontextmanager
    async def _paused(self, kind: str, node: str, process: psutil.Process) -> AsyncIterator[None]:
        self._note(kind, node, process.pid)
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGCONT)

    async def _schedule(self, node: str, how: controller_pb2.NodeScheduling.ValueType) -> None:
        """Tell the controller, as soon as there is one."""

        async def is_told() -> bool:
            try:
                async with self._cluster.client() as client:
                    await client.set_node_scheduling(node, how)
            except StokerError:
                return False
            return True

        await until(is_told, f"the controller takes the order about {node}")

    async def _all_replicas(self) -> list[node_agent_pb2.Replica]:
        try:
            async with self._cluster.client() as client:
                return list(await client.replicas())
        except StokerError:
            return []

    async def _replicas(self, node: str) -> set[str]:
        """Return the replicas that serve on a node now, by id."""
        ready = node_agent_pb2.REPLICA_STATE_READY
        found = await self._all_replicas()
        return {each.replica_id for each in found if each.node_id == node and each.state == ready}

    async def _workers(self, node: str) -> list[psutil.Process]:
        """Return the processes that serve on a node, the busiest first."""
        found = [each for each in await self._all_replicas() if each.node_id == node and each.worker_pid]
        processes = []
        for each in sorted(found, key=lambda each: -each.running_sessions):
            with suppress(psutil.NoSuchProcess):
                processes.append(psutil.Process(each.worker_pid))
        return processes

    def _controller_pid(self) -> int:
        process = self._cluster.process("controller")
        return process.pid if process is not None else 0

    async def _expect_gone(self, node: str, owned: set[str], controller_pid: int) -> None:
        """Wait until a node that outlived its lease has given up the replicas of before.

        A controller that was restarted meanwhile counts the silence from its own start: it may keep them.

        Raises:
            TimeoutError: It goes on with one.
        """
        if not controller_pid or self._controller_pid() != controller_pid:
            return
        self.zombies |= owned

        async def is_over() -> bool:
            known = await self._all_replicas()
            return bool(known) and not owned & {each.replica_id for each in known if each.node_id == node}

        await until(is_over, f"{node} has let go of what it held before its lease ended")


def _between(limits: tuple[float, float], fraction: float) -> float:
    return limits[0] + fraction * (limits[1] - limits[0])


KINDS: dict[str, Callable[[Faults, str, float], Awaitable[None]]] = {
    "kill worker": Faults.kill_worker,
    "pause worker": Faults.pause_worker,
    "hang worker": Faults.hang_worker,
    "kill agent": Faults.kill_agent,
    "kill store": Faults.kill_store,
    "kill controller": Faults.kill_controller,
    "kill gateway": Faults.kill_gateway,
    "pause gateway": Faults.pause_gateway,
    "zombie agent": Faults.zombie_agent,
    "partition": Faults.partition,
    "blip": Faults.blip,
    "drain": Faults.drain,
    "stop agent": Faults.leave,
    "move": Faults.move,
    "move, kill source": Faults.move_and_kill_source,
    "move, kill destination": Faults.move_and_kill_destination,
    "move, kill controller": Faults.move_and_kill_controller,
}
"""All faults, by name."""
