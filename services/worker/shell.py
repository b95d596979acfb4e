"""The worker's process: becomes warm, loads one model, runs its sessions, and speaks gRPC to its agent."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import sys
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import grpc

from services.worker import wire
from services.worker.engine.engine_thread import EngineThread
from services.worker.engine.protocol import TokenOut
from services.worker.kv.kv_desk import KvDesk
from services.worker.run_stream import RunStream
from services.worker.settings import WorkerSettings
from stoker import log
from stoker.errors import InvalidRequest, PeerError, ReplicaGone, StokerError
from stoker.frames import FrameLink
from stoker.rpc import Server
from stoker.v1.session_kv_pb2 import (
    HoldSessionRequest,
    HoldSessionResponse,
    KvPart,
    ReadKvRequest,
    WriteKvResponse,
)
from stoker.v1.worker_pb2 import (
    DescribeWorkerRequest,
    LoadEnd,
    LoadModelRequest,
    LoadModelResponse,
    RunCommand,
    StepEvent,
    WorkerDescription,
)
from stoker.v1.worker_pb2_grpc import WorkerServicer, add_WorkerServicer_to_server

if TYPE_CHECKING:
    from services.worker.engine.protocol import Output
    from services.worker.load import LoadedModel
    from services.worker.weights.pool_lock import LockedPool

    Context = grpc.aio.ServicerContext[Any, Any]

SWITCH_SECONDS = 0.0005
"""How long the engine's thread keeps the interpreter while the loop has tokens to send (Python: 5 ms)."""

MAX_HOLD_SECONDS = 5.0
"""Longest time that a session stands still for its move, whatever is asked."""

FLUSH_SECONDS = 1.0
"""How long the last errors of a failed engine may take to reach the agent."""


class WorkerShell(WorkerServicer):
    """One worker's parts and their lifecycle; see `stoker.serving.Service`."""

    def __init__(self, settings: WorkerSettings, ended_within: asyncio.Event) -> None:
        self._settings = settings
        self._ended_within = ended_within
        self._server = Server(["stoker.v1.Worker"])
        add_WorkerServicer_to_server(self, self._server.grpc_server)
        self._loop = asyncio.get_running_loop()
        self._thread = ThreadPoolExecutor(1, "stoker-load")
        self._warm: asyncio.Future[list[str]] | None = None
        self._stream = RunStream(self._loop)
        self._engine: EngineThread | None = None
        self._kv: KvDesk | None = None
        self._loaded: LoadedModel | None = None
        self._pool: LockedPool | None = None
        self._load_began = False
        self._follows = False

    async def start(self) -> None:
        """Listen at once; `DescribeWorker` answers when the imports are done."""
        self._server.bind(f"unix:{self._settings.socket}")
        await self._server.start()
        warming = ThreadPoolExecutor(1, "stoker-warm-up")  # of its own: niceness belongs to a thread
        self._warm = self._loop.run_in_executor(warming, self._warm_up)
        warming.shutdown(wait=False)
        self._warm.add_done_callback(self._end_if_cold)

    async def stop_serving(self) -> None:
        """See `stoker.serving.Service`."""
        await self._server.set_serving(serving=False)

    async def drain(self, grace_seconds: float) -> None:
        """The node agent has drained the sessions; nothing is left to wait for."""

    async def close(self) -> None:
        """Stop listening; the process's end frees the rest."""
        await self._server.stop()

    # --- rpcs ---

    async def DescribeWorker(  # noqa: N802 - the name of the rpc
        self, request: DescribeWorkerRequest, context: Context
    ) -> WorkerDescription:
        """Say what this worker is, once it is warm."""
        del request, context
        return WorkerDescription(
            worker_id=self._settings.worker_id,
            pid=os.getpid(),
            warm=True,
            architectures=await self._until_warm(),
            engine="transformers",
        )

    async def LoadModel(  # noqa: N802 - the name of the rpc
        self, request: LoadModelRequest, context: Context
    ) -> LoadModelResponse:
        """Load the one model of this worker's life; a worker whose load failed is of no further use."""
        del context
        if self._load_began:
            raise InvalidRequest(f"worker {self._settings.worker_id} has had its model: start another one")
        self._load_began = True
        await self._until_warm()
        from services.worker.load import completed, load_model  # noqa: PLC0415 - torch: only once it is warm

        with log.bind(replica_id=request.replica_id, model=request.spec.name):
            if request.group.rank > 0:
                return await self._follow(request)
            load = load_model if request.group.ranks <= 1 else _load_first_rank
            loaded = await self._loop.run_in_executor(self._thread, load, request, self._settings, self._pool)
        is_loading = not loaded.loaded.done()
        timings = loaded.timings if is_loading else completed(loaded)
        if is_loading:
            loaded.loaded.add_done_callback(
                lambda _: self._loop.call_soon_threadsafe(self._on_load_end, loaded)
            )
        self._loaded = loaded
        self._stream.use(loaded.adapters)
        self._engine = EngineThread(
            loaded.engine,
            on_outputs=self._on_outputs,
            on_failure=self._on_engine_failure,
            interrupt=loaded.gate.interrupt,
        )
        gc.freeze()  # a full collection walks through torch and the model, 0.5 s in which no token is made
        self._engine.start()
        self._kv = KvDesk(self._engine)
        self._stream.expect_kv(self._kv)
        if request.session_socket:
            await self._link_sessions(request.session_socket, self._engine, is_loading=is_loading)
        limits = loaded.engine.limits
        return LoadModelResponse(
            timings=timings,
            loading=is_loading,
            max_context_tokens=limits.max_context_tokens,
            kv_cache_tokens=limits.max_kv_tokens,
            max_batch=limits.max_batch,
            numerics=loaded.engine.numerics,
        )

    async def _follow(self, request: LoadModelRequest) -> LoadModelResponse:
        """Load a rank without sessions of its own, and follow the first one; answers when all is loaded."""
        from services.worker.load import completed  # noqa: PLC0415 - as in LoadModel
        from services.worker.ranks.following import start_following  # noqa: PLC0415 - as above
        from services.worker.ranks.load_rank import load_follower  # noqa: PLC0415 - as above

        rank = await self._loop.run_in_executor(
            self._thread, load_follower, request, self._settings, self._pool
        )
        self._follows = True
        gc.freeze()
        start_following(rank, self._end_from_thread)
        await asyncio.shield(asyncio.wrap_future(rank.loaded))
        return LoadModelResponse(timings=completed(rank))

    async def Run(  # noqa: N802 - the name of the rpc
        self, request_iterator: AsyncIterator[RunCommand], context: Context
    ) -> AsyncIterator[StepEvent]:
        """Run sessions until the agent goes; then they are cancelled. A following rank has none."""
        del context
        if self._follows:
            await self._ended_within.wait()
            return
        engine = self._engine
        if engine is None:
            raise ReplicaGone(f"worker {self._settings.worker_id} has no model yet")
        async with asyncio.TaskGroup() as tasks:
            commands = tasks.create_task(self._take_commands(request_iterator, engine))
            try:
                async for step in self._stream.events():
                    yield step
            finally:
                commands.cancel()
                self._stream.cancel_all(engine)

    async def ReadKv(  # type: ignore[override]  # noqa: N802 - the name of the rpc
        self, request: ReadKvRequest, context: Context
    ) -> AsyncIterator[bytes]:
        """Give a running session's keys and values away, while it goes on: parts in their wire form."""
        del context
        desk = self._desk()
        request.hold_seconds = min(request.hold_seconds, MAX_HOLD_SECONDS)
        async with aclosing(
            desk.read(request, self._stream.engine_id(request.session_id, request.epoch))
        ) as parts:
            async for part in parts:
                yield part

    async def WriteKv(  # noqa: N802 - the name of the rpc
        self, request_iterator: AsyncIterator[KvPart], context: Context
    ) -> WriteKvResponse:
        """Take keys and values of a session that is about to come."""
        del context
        return await self._desk().write(aiter(request_iterator))

    async def HoldSession(  # noqa: N802 - the name of the rpc
        self, request: HoldSessionRequest, context: Context
    ) -> HoldSessionResponse:
        """Have a session stand still for the last round of its move, or go on."""
        del context
        if self._engine is None:
            raise ReplicaGone(f"worker {self._settings.worker_id} has no model yet")
        engine_id = self._stream.engine_id(request.session_id, request.epoch)
        held = self._engine.hold(engine_id, min(request.seconds, MAX_HOLD_SECONDS))
        return HoldSessionResponse(tokens=await asyncio.wrap_future(held))

    def _desk(self) -> KvDesk:
        if self._kv is None:
            raise ReplicaGone(f"worker {self._settings.worker_id} has no model yet")
        return self._kv

    async def _link_sessions(self, path: str, engine: EngineThread, *, is_loading: bool) -> None:
        """Have sessions travel over the agent's socket.

        Raises:
            PeerError: Nobody listens there.
        """
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        connection.setblocking(False)
        try:
            await self._loop.sock_connect(connection, path)
        except OSError as error:
            connection.close()
            raise PeerError(
                f"the session socket {path} of the node agent takes no connection: {error}"
            ) from error
        link = FrameLink(
            connection,
            on_frame=lambda frame: self._stream.take(wire.command(frame), engine),
            on_end=lambda _: self._stream.cancel_all(engine),
        )
        self._stream.send_over(link, is_loading=is_loading)

    async def _take_commands(self, commands: AsyncIterator[RunCommand], engine: EngineThread) -> None:
        async for command in commands:
            self._stream.take(command, engine)

    # --- life ---

    def _warm_up(self) -> list[str]:
        """Import what a load needs; returns the architectures. Runs in a thread."""
        if self._settings.warm_up_niceness:
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), self._settings.warm_up_niceness)
        import torch  # noqa: PLC0415 - seconds of imports, while the loop answers already

        if self._settings.threads:
            torch.set_num_threads(self._settings.threads)
        sys.setswitchinterval(SWITCH_SECONDS)
        from services.worker import load  # noqa: PLC0415 - a load must not import anything

        self._pool = load.lock_pool_for_devices(self._settings)
        from services.worker.model_loading import supported_architectures  # noqa: PLC0415 - as above
        from services.worker.warm import warm_up  # noqa: PLC0415 - as above

        warm_up()
        return sorted(supported_architectures())

    async def _until_warm(self) -> list[str]:
        if self._warm is None:
            raise AssertionError("no call comes before start")
        return await asyncio.shield(self._warm)

    def _end_from_thread(self) -> None:
        self._loop.call_soon_threadsafe(self._ended_within.set)

    def _end_if_cold(self, warm: asyncio.Future[list[str]]) -> None:
        if not warm.cancelled() and (error := warm.exception()) is not None:
            log.get().error("worker.warm_up_failed", exc_info=error)
            self._ended_within.set()

    def _on_outputs(self, outputs: list[Output]) -> None:
        """Called in the engine's thread."""
        loaded = self._loaded
        if loaded is not None and not loaded.gate.has_opened(loaded.needs_stages):
            tokens = [output for output in outputs if isinstance(output, TokenOut)]
            if tokens:
                raise AssertionError("a token was made before the weights it needs were there")
        self._stream.on_outputs(outputs)

    def _on_load_end(self, loaded: LoadedModel) -> None:
        """Tell the agent how the rest of the load went; a replica without weights is over."""
        from services.worker.load import completed  # noqa: PLC0415 - as in LoadModel

        try:
            self._stream.announce(LoadEnd(timings=completed(loaded)))
        except StokerError as error:
            log.get().error("weights.lost", error_code=error.code, message=error.message)
            self._stream.announce(LoadEnd(error_code=error.code, error_message=error.message))
            self._loop.call_later(FLUSH_SECONDS, self._ended_within.set)

    def _on_engine_failure(self, cause: BaseException) -> None:
        """Called in the engine's thread, which is its last act."""
        if self._loaded is not None and cause is self._loaded.gate.error:
            return  # `_on_load_end` tells
        log.get().error("engine.failed", exc_info=cause)
        self._loop.call_soon_threadsafe(self._fail_sessions, wire.engine_failed(cause))

    def _fail_sessions(self, error: StokerError) -> None:
        self._stream.fail(error)
        self._loop.call_later(FLUSH_SECONDS, self._ended_within.set)


def _load_first_rank(
    request: LoadModelRequest, settings: WorkerSettings, pool: LockedPool | None
) -> LoadedModel:
    from services.worker.ranks.load_rank import load_leader  # noqa: PLC0415 - as in LoadModel

    return load_leader(request, settings, pool)
