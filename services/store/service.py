"""The store daemon's parts and their order of life."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Sequence

from services.store import metrics
from services.store.attach_server import AttachServer
from services.store.catalog import Catalog
from services.store.disk_probe import DiskProbe
from services.store.grpc_service import SERVICE_NAME, CheckpointStoreService
from services.store.integrity.damaged_copies import DamagedCopies
from services.store.integrity.verified_parts import FOLDER_NAME as VERIFIED_FOLDER_NAME
from services.store.integrity.verified_parts import VerifiedParts
from services.store.link_speed import expected_rates, link_bytes_per_second
from services.store.loads import Loads
from services.store.peers.service import Peers
from services.store.peers.shared_file import DiskCopy
from services.store.peers.wire import FileIdentity
from services.store.pool.arena import Arena, FaultedIn, open_arena
from services.store.pool.counters import ReadyCounters
from services.store.pulls import Pulls
from services.store.reading.disk_sources import DiskSources
from services.store.reading.lanes import Lane
from services.store.reading.pace import Pace
from services.store.run_folder import RunFolder
from services.store.settings import FaultIn, StoreSettings
from services.store.sharing import Sharing, disk_copy
from services.store.tiers import Tiers, open_tiers
from stoker import log, rpc
from stoker.clock import SystemClock
from stoker.v1 import checkpoint_store_pb2_grpc

_MIN_COUNTERS = 4096
_GRPC_GRACE_SECONDS = 0.2
"""For answers on their way; status streams never end by themselves."""


class StoreService:
    """Builds, serves and takes apart; see `stoker.serving.Service`."""

    def __init__(self, settings: StoreSettings, ended_within: asyncio.Event) -> None:
        """Args: ended_within: set when the attach server ends by itself."""
        self._settings = settings
        self._ended_within = ended_within
        self._clock = SystemClock()
        self._folder: RunFolder | None = None
        self._arena: Arena | None = None
        self._counters: ReadyCounters | None = None
        self._catalog: Catalog | None = None
        self._loads: Loads | None = None
        self._tiers: Tiers | None = None
        self._pulls: Pulls | None = None
        self._peers: Peers | None = None
        self._probe: DiskProbe | None = None
        self._pace: Pace | None = None
        self._attach: AttachServer | None = None
        self._attach_task: asyncio.Task[None] | None = None
        self._server: rpc.Server | None = None

    async def start(self) -> None:
        """See `Service`; ready in well under a second: the pool's pages come in the background."""
        settings = self._settings
        self._folder = folder = RunFolder(settings.run_dir)
        self._arena = arena = open_arena(settings)
        self._counters = counters = ReadyCounters(max(_MIN_COUNTERS, arena.chunk_count))
        if settings.peer_address:
            self._peers = Peers(find_on_disk=self._find_for_peers)
            self._peers.start(
                settings.peer_address, settings.peers, advertised=settings.advertised_peer_address
            )
        peers = self._peers
        self._tiers = tiers = await asyncio.to_thread(
            open_tiers, settings, peers=None if peers is None else peers.source
        )
        self._pace = pace = Pace(settings.paced_bytes_per_second)
        self._catalog = catalog = Catalog(allowed_roots=settings.allowed_roots, remote=tiers.remote)
        sharing = None if peers is None else Sharing(peers.exchange, chunk_bytes=arena.chunk_bytes)
        self._loads = loads = self._new_loads(arena, counters, tiers, pace, sharing)
        self._probe = probe = DiskProbe(
            loads, pace, byte_count=settings.probe_bytes, threads=settings.read_threads
        )
        metrics.PAGE_BYTES.set(arena.page_bytes)
        self._server = server = rpc.Server([SERVICE_NAME])
        self._pulls = pulls = Pulls(catalog, loads, pace=pace, clock=self._clock, sharing=sharing)
        service = CheckpointStoreService(
            catalog=catalog,
            loads=loads,
            clock=self._clock,
            pulls=pulls,
            cache=tiers.cache,
            peers=peers,
            attach_socket=str(folder.socket_path),
            described=probe.consider,
            expected=expected_rates(settings.paced_bytes_per_second, link_bytes_per_second()),
        )
        checkpoint_store_pb2_grpc.add_CheckpointStoreServicer_to_server(service, server.grpc_server)
        server.bind(settings.address)
        self._attach = AttachServer(
            folder.socket_path,
            loads=loads,
            catalog=catalog,
            clock=self._clock,
            max_attachments=settings.max_attachments,
        )
        self._attach.bind()
        self._attach_task = asyncio.create_task(self._attach.serve(), name="attach-server")
        self._attach_task.add_done_callback(self._attach_ended)
        await catalog.find_on_disk()
        await server.start()
        for entry in catalog.entries():
            probe.consider(entry)
        if settings.fault_in is FaultIn.EAGER:
            self._fault_in(arena, loads)
        log.get().info(
            "pool.opened",
            total_bytes=arena.total_bytes,
            chunk_bytes=arena.chunk_bytes,
            page_bytes=arena.page_bytes,
            backing=arena.backing,
            address=settings.address,
            attach_socket=str(folder.socket_path),
        )

    def _new_loads(
        self, arena: Arena, counters: ReadyCounters, tiers: Tiers, pace: Pace, sharing: Sharing | None
    ) -> Loads:
        """Return what brings checkpoints into the pool, over all tiers that the settings name."""
        settings = self._settings
        return Loads(
            arena,
            counters,
            sources=DiskSources(
                settings.verify_disk,
                VerifiedParts(settings.run_dir / VERIFIED_FOLDER_NAME),
                DamagedCopies(None if tiers.cache is None else tiers.cache.root, forget=tiers.forget),
            ),
            threads={
                Lane.DISK: settings.read_threads,
                Lane.FAR: settings.far_threads,
                Lane.LANDING: settings.landing_threads,
            },
            clock=self._clock,
            sharing=sharing,
            pace=pace,
        )

    async def stop_serving(self) -> None:
        """See `Service`."""
        if self._server is not None:
            await self._server.set_serving(serving=False)

    async def drain(self, grace_seconds: float) -> None:
        """See `Service`: loads under way may end; workers keep what they have mapped anyway."""
        if self._loads is None:
            return
        loads = self._loads
        try:
            async with asyncio.timeout(grace_seconds):
                with loads.changes.watched() as changed:
                    while loads.loading():
                        await changed.wait()
                        changed.clear()
        except TimeoutError:
            log.get().warning("drain.cut_short", grace_seconds=grace_seconds)

    async def close(self) -> None:
        """See `Service`."""
        if self._tiers is not None:
            self._tiers.remote.close()  # first: threads that wait for an origin give up
        if self._pace is not None:
            self._pace.close()  # and those that are held back
        # Peers before loads: threads wait for them, too. The probe last: the loads' pace lets its reads go.
        for mover in (self._pulls, self._peers, self._loads, self._probe):
            if mover is not None:
                await mover.close()
        if self._server is not None:
            await self._server.stop(_GRPC_GRACE_SECONDS if self._attach_task else 0.0)
        if self._attach_task is not None:
            self._attach_task.cancel()
            await asyncio.wait([self._attach_task])
        if self._arena is not None:
            await asyncio.to_thread(self._arena.close)
        for part in (self._attach, self._catalog, self._tiers, self._counters, self._folder):
            if part is not None:
                part.close()

    def _find_for_peers(self, identity: FileIdentity) -> DiskCopy | None:
        return None if self._catalog is None else disk_copy(self._catalog.entries(), identity)

    def _attach_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None:
            log.get().error("attach.server_crashed", exc_info=task.exception())
            self._ended_within.set()

    def _fault_in(self, arena: Arena, loads: Loads) -> None:
        loop = asyncio.get_running_loop()
        context = contextvars.copy_context()

        def step_done(chunks: Sequence[int]) -> None:
            loop.call_soon_threadsafe(loads.chunks.mark_faulted_in, chunks)
            metrics.FAULTED_IN_BYTES.inc(len(chunks) * arena.chunk_bytes)

        def done(faulted_in: FaultedIn) -> None:
            metrics.FAULT_IN_SECONDS.set(faulted_in.seconds)
            metrics.PAGE_BYTES.set(faulted_in.page_bytes)
            context.run(
                log.get().info,
                "pool.faulted_in",
                bytes=faulted_in.byte_count,
                seconds=round(faulted_in.seconds, 3),
                page_bytes=faulted_in.page_bytes,
                backing=arena.backing,
            )

        arena.fault_in(self._settings.fault_in_threads, step_done=step_done, done=done)
