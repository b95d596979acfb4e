"""The shell around supervision: runs its effects, feeds it events, knows the workers."""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager

from services.node_agent import metrics
from services.node_agent.background import Background
from services.node_agent.event_lines import tell_event
from services.node_agent.host_state import (
    DrainOrdered,
    Effect,
    EndWorker,
    Event,
    FailSessions,
    HostState,
    LoadModel,
    Policy,
    ReplicaPhase,
    SessionsEnded,
    SpawnWorker,
    StartOrdered,
    StopOrdered,
    Tick,
    WakeAt,
    WorkerExited,
    WorkerPhase,
    WorkerWarm,
)
from services.node_agent.reports import Load
from services.node_agent.sessions.awaited_start import AwaitedStart
from services.node_agent.sessions.epoch_fence import EpochFence
from services.node_agent.sessions.kept_sessions import KeepLimits, KeptSessions
from services.node_agent.sessions.move_watch import MoveWatch
from services.node_agent.sessions.relay import RelayedSession, SessionRelay
from services.node_agent.settings import NodeAgentSettings
from services.node_agent.supervision import handle
from services.node_agent.workers.fork_server import ForkServer
from services.node_agent.workers.hurry import Hurry
from services.node_agent.workers.log_folder import LogFolder
from services.node_agent.workers.replica_workers import group_of, socket_path
from services.node_agent.workers.worker_link import LinkOptions, WorkerLink
from services.node_agent.workers.worker_pool import waiting_orders
from services.node_agent.workers.worker_process import WorkerOptions, WorkerProcess, worker_environment
from stoker import log
from stoker.errors import BY_CODE, ReplicaGone, StokerError
from stoker.ids import ReplicaId, WorkerId
from stoker.v1.node_agent_pb2 import Device, KeptSession, StartReplicaRequest, StopReplicaRequest
from stoker.v1.session_pb2 import GenerateEvent, GenerateRequest


class Host:
    """The workers and replicas of this host. Belongs to the event loop.

    Args:
        settings: Of the agent.
        devices: The slots of this host.
        background: Owns the tasks.
        on_change: Called after every change worth reporting; `urgent` is False for session counts.
    """

    def __init__(
        self,
        settings: NodeAgentSettings,
        devices: Sequence[Device],
        background: Background,
        on_change: Callable[[bool], None],
    ) -> None:
        self._settings = settings
        self._background = background
        self._on_change = on_change
        self._logs = LogFolder(settings.log_dir)
        self._worker_env = {"STOKER_WORKER_ATTACH_SOCKET": str(settings.attach_socket), **settings.worker_env}
        self._fork_server = ForkServer(
            worker_environment(threads=settings.worker_threads, further=self._worker_env),
            background.spawn,
            enabled=settings.fork_server,
        )
        self._links: dict[WorkerId, WorkerLink] = {}
        self._hurry = Hurry(
            self._fork_server,
            pids=self._spawning_pids,
            is_needed=lambda: bool(waiting_orders(self.state.replicas.values())),
        )
        self._ended_early: set[WorkerId] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._fence = EpochFence()
        self._kept = KeptSessions(
            self.session, background.spawn, KeepLimits(keep_seconds=settings.keep_seconds)
        )
        self._quiet = asyncio.Condition()
        self.moves = MoveWatch(time.monotonic)
        self.architectures: tuple[str, ...] = ()
        self.worker_start_seconds = 0.0
        self.state = HostState()
        self._policy = Policy(
            devices=tuple(device.index for device in devices),
            worker_prefix=f"{os.getpid()}-{secrets.token_hex(3)}",
            prestarted_workers=settings.prestarted_workers,
            max_prestarted_workers=settings.max_prestarted_workers,
            refill_pause_seconds=settings.refill_pause_seconds,
            spawn_timeout_seconds=settings.spawn_timeout_seconds,
        )
        self._link_options = LinkOptions(
            attach_socket=str(settings.attach_socket),
            cuda_devices=frozenset(device.index for device in devices if device.kind == "cuda"),
            load_timeout_seconds=settings.load_timeout_seconds,
            spawn_timeout_seconds=settings.spawn_timeout_seconds,
            max_sessions=settings.max_sessions,
        )

    # --- orders and sessions ---

    def order_start(self, order: StartReplicaRequest) -> None:
        """Begin to start a replica; raises as `supervision.handle`."""
        known = order.replica_id in self.state.replicas
        self.apply(StartOrdered(order=order))
        if not known:
            log.get().info(
                "replica.ordered",
                replica_id=order.replica_id,
                model=order.spec.name,
                devices=list(order.devices),
                predicted_seconds=round(order.predicted_seconds, 3),
            )

    def order_stop(self, order: StopReplicaRequest) -> None:
        """Stop a replica, with grace for its sessions; raises as `supervision.handle`."""
        replica_id = ReplicaId(order.replica_id)
        link = self._link_of(replica_id)
        self.apply(
            StopOrdered(
                replica_id=replica_id,
                only_if_idle=order.only_if_idle,
                grace_seconds=order.grace_seconds,
                fence=order.fence,
                session_count=link.relay.session_count if link is not None else 0,
            )
        )
        log.get().info("replica.stop_ordered", replica_id=replica_id, reason=order.reason)
        if link is not None and not order.only_if_idle and order.grace_seconds > 0:
            link.relay.ask_to_leave(order.reason, order.grace_seconds, to_replica_id=order.to_replica_id)

    def worker_of(self, replica_id: str) -> WorkerLink:
        """Return the worker of a replica that serves here, also while it drains.

        Raises:
            ReplicaGone: There is none.
        """
        link = self._link_of(ReplicaId(replica_id))
        if link is None:
            raise ReplicaGone(f"replica {replica_id} is not served on node {self._settings.node_id}")
        return link

    def relays(self) -> dict[str, tuple[str, SessionRelay]]:
        """Return model and sessions of each replica that serves here."""
        hosted = [(one, self._link_of(replica_id)) for replica_id, one in self.state.replicas.items()]
        return {one.replica_id: (one.order.spec.name, link.relay) for one, link in hosted if link is not None}

    @asynccontextmanager
    async def session(self, request: GenerateRequest) -> AsyncIterator[RelayedSession]:
        """Run a session on a replica; leaving the block cancels it if it has not finished.

        Raises:
            StokerError: As `admit` and `SessionRelay.open`.
        """
        relay = self.admit(request)
        session = relay.open(request)
        try:
            yield session
        finally:
            relay.close(session)

    def admit(self, request: GenerateRequest) -> SessionRelay:
        """Return the relay that may open this session; earlier owners on this node's other replicas end.

        Raises:
            ReplicaGone: The replica is not served here.
            Fenced: A later owner has been here.
        """
        replica_id = ReplicaId(request.replica_id)
        hosted, link = self.state.replicas.get(replica_id), self._link_of(replica_id)
        if hosted is None or hosted.phase is not ReplicaPhase.READY or link is None:
            phase = hosted.phase.value if hosted is not None else "not here"
            raise ReplicaGone(f"replica {replica_id} is {phase} on node {self._settings.node_id}")
        if self.state.draining:
            raise ReplicaGone(f"replica {replica_id} takes no session: node {self._settings.node_id} stops")
        self._fence.admit(request.session_id, request.epoch, follows=request.follows)
        if not request.follows:
            for other in self._links.values():
                if other is not link:
                    other.relay.cut(request.session_id, below_epoch=request.epoch)
        return link.relay

    def generate_kept(self, request: GenerateRequest) -> AsyncGenerator[GenerateEvent]:
        """Run a session that outlives its reader; see `KeptSessions.generate`."""
        hosted = self.state.replicas.get(ReplicaId(request.replica_id))
        revision = hosted.order.checkpoint.revision if hosted is not None else ""
        return self._kept.generate(request, revision)

    def find_kept(self, session_ids: Iterable[str]) -> list[KeptSession]:
        """Return what is known of sessions that outlived their readers."""
        return self._kept.find(session_ids, self._fence.highest)

    def release_kept(self, session_id: str, epoch: int) -> None:
        """End a session that nobody wants more tokens of, unless a later owner runs it."""
        self._kept.release(session_id, epoch)

    def awaited_start(self, replica_id: str) -> AwaitedStart:
        """Return a watch on a replica's start, for a session that begins now."""
        return AwaitedStart(lambda: self.state.replicas.get(ReplicaId(replica_id)))

    def next_worker_seconds(self) -> float:
        """Return when the next worker that is being pre-started should be warm, from now; 0 = none is."""
        began = [
            worker.since_seconds
            for worker in self.state.workers.values()
            if worker.phase is WorkerPhase.SPAWNING
        ]
        if not began or not self.worker_start_seconds:
            return 0.0
        return max(0.05, min(began) + self.worker_start_seconds - time.monotonic())

    def loads(self) -> dict[ReplicaId, Load]:
        """Return what each replica's worker is doing."""
        found = {}
        for replica_id in self.state.replicas:
            link = self._link_of(replica_id)
            if link is not None:
                relay = link.relay
                found[replica_id] = Load(
                    running_sessions=relay.running_count,
                    waiting_sessions=relay.session_count - relay.running_count,
                    longest_wait_seconds=relay.longest_wait_seconds(),
                    idle_seconds=relay.idle_seconds(),
                    context_tokens=relay.context_tokens(),
                    worker_pid=link.process.pid,
                )
        return found

    def read_logs(self, replica_id: ReplicaId, *, tail_lines: int, follow: bool) -> AsyncIterator[str]:
        """Return the lines its worker printed; raises NotFound when there is none."""
        return self._logs.of_replica(replica_id).read(tail_lines=tail_lines, follow=follow)

    # --- lifecycle ---

    def start(self) -> None:
        """Fill the pool."""
        self.apply(Tick())

    async def drain(self, grace_seconds: float) -> None:
        """Take no more orders; return when no session runs, after the grace at the latest."""
        self.apply(DrainOrdered())
        for link in self._links.values():
            link.relay.ask_to_leave(f"node {self._settings.node_id} stops", grace_seconds)
        try:
            async with asyncio.timeout(grace_seconds), self._quiet:
                await self._quiet.wait_for(lambda: self._session_count() == 0)
        except TimeoutError:
            log.get().warning("sessions.cut_off", count=self._session_count(), seconds=grace_seconds)

    async def close(self) -> None:
        """End every worker; returns when none is left."""
        if not self.state.draining:
            self.apply(DrainOrdered())
        self._hurry.end()
        if self._timer is not None:
            self._timer.cancel()
        while self._links:
            await asyncio.gather(*[link.process.end() for link in self._links.values()])
            await asyncio.sleep(0)

    # --- events in, effects out ---

    def apply(self, event: Event) -> None:
        """Take an event: change the state, run what follows."""
        self.state, effects = handle(self._policy, self.state, event, time.monotonic())
        if isinstance(event, WorkerWarm):
            self._warmed(event.worker_id)
        tell_event(self.state, event)
        for effect in effects:
            self._run(effect)
        if isinstance(event, StartOrdered):
            self._hurry.begin()
        self._on_change(True)

    def _run(self, effect: Effect) -> None:
        match effect:
            case SpawnWorker(worker_id=worker_id, is_awaited=is_awaited):
                niceness = 0 if is_awaited else self._settings.pool_niceness
                self._background.spawn(self._live(worker_id, niceness), f"worker {worker_id}")
            case LoadModel(worker_id=worker_id, order=order, devices=devices, rank=rank):
                if rank == 0:
                    self._logs.assign(ReplicaId(order.replica_id), worker_id)
                group = group_of(effect, self._settings.run_dir)
                loading = self._links[worker_id].load(order, devices, group)
                self._background.spawn(loading, f"load {order.replica_id}")
            case EndWorker(worker_id=worker_id):
                self._end(worker_id)
            case FailSessions(worker_id=worker_id, error_code=code, error_message=message):
                self._links[worker_id].relay.fail_all(BY_CODE.get(code, StokerError)(message))
            case WakeAt(at_seconds=at_seconds):
                if self._timer is not None:
                    self._timer.cancel()
                wait_seconds = max(0.0, at_seconds - time.monotonic()) + 0.001
                self._timer = asyncio.get_running_loop().call_later(wait_seconds, self.apply, Tick())

    def _spawning_pids(self) -> list[int]:
        workers = self.state.workers.values()
        spawning = {worker.worker_id for worker in workers if worker.phase is WorkerPhase.SPAWNING}
        return [self._links[worker_id].process.pid for worker_id in spawning & self._links.keys()]

    async def _live(self, worker_id: WorkerId, niceness: int) -> None:
        try:
            link = await self._spawn(worker_id, niceness)
        except OSError as error:
            reason = f"could not be started: {error.strerror or error}"
            self.apply(WorkerExited(worker_id=worker_id, reason=reason))
            return
        self._links[worker_id] = link
        if worker_id in self._ended_early:
            self._ended_early.discard(worker_id)
            link.process.kill()
        try:
            await link.live()
        finally:
            link.process.kill()
            del self._links[worker_id]

    async def _spawn(self, worker_id: WorkerId, niceness: int) -> WorkerLink:
        settings = self._settings
        process = await WorkerProcess.start(
            worker_id,
            WorkerOptions(
                threads=settings.worker_threads,
                warm_up_niceness=niceness,
                log_level=settings.log_level,
                environment=self._worker_env,
            ),
            socket_path(settings.run_dir, worker_id),
            self._logs.open(worker_id),
            self._fork_server,
        )
        return WorkerLink(
            process,
            self._link_options,
            emit=self.apply,
            on_sessions_change=lambda: self._sessions_changed(worker_id),
        )

    def _end(self, worker_id: WorkerId) -> None:
        link = self._links.get(worker_id)
        if link is None:
            self._ended_early.add(worker_id)
        else:
            self._background.spawn(link.process.end(), f"end {worker_id}")

    def _sessions_changed(self, worker_id: WorkerId) -> None:
        worker, link = self.state.workers.get(worker_id), self._links.get(worker_id)
        if worker is not None and worker.replica_id is not None and link is not None:
            hosted = self.state.replicas.get(worker.replica_id)
            is_stopping = hosted is not None and hosted.phase is ReplicaPhase.STOPPING
            if is_stopping and link.relay.session_count == 0:
                self.apply(SessionsEnded(replica_id=worker.replica_id))
        if self.state.draining:
            self._background.spawn(self._notify_quiet(), "drain")
        self._on_change(False)

    async def _notify_quiet(self) -> None:
        async with self._quiet:
            self._quiet.notify_all()

    def _session_count(self) -> int:
        return sum(link.relay.session_count for link in self._links.values())

    def _link_of(self, replica_id: ReplicaId) -> WorkerLink | None:
        hosted = self.state.replicas.get(replica_id)
        if hosted is None or hosted.worker_id is None:
            return None
        return self._links.get(hosted.worker_id)

    def _warmed(self, worker_id: WorkerId) -> None:
        """Learn from a worker that is warm how long one takes, and what it can serve."""
        link = self._links[worker_id]
        if link.description is not None:
            self.architectures = tuple(link.description.architectures)
        known = self.worker_start_seconds or link.start_seconds
        self.worker_start_seconds = 0.7 * known + 0.3 * link.start_seconds
        metrics.WORKER_START.observe(link.start_seconds)
        log.get().info(
            "worker.warmed",
            worker_id=worker_id,
            pid=link.process.pid,
            forked=link.process.is_forked,
            seconds=round(link.start_seconds, 3),
        )
