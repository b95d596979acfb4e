"""One worker as the agent sees it: its process, the channel to it, its sessions, and its life."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc

from services.node_agent.host_state import (
    Event,
    LoadRefused,
    LoadSucceeded,
    WeightsArrived,
    WeightsLost,
    WorkerExited,
    WorkerWarm,
)
from services.node_agent.sessions.relay import SessionRelay
from services.node_agent.workers import session_socket
from services.node_agent.workers.session_socket import SessionSocket
from services.node_agent.workers.worker_process import WorkerProcess
from stoker import log
from stoker.errors import DeadlineExceeded, KvUnavailable, PeerError, StokerError, WorkerDied
from stoker.frames import FrameLink
from stoker.ids import WorkerId
from stoker.rpc import cancelled_after, connect, translated
from stoker.v1.node_agent_pb2 import StartReplicaRequest
from stoker.v1.rank_group_pb2 import RankGroup
from stoker.v1.session_kv_pb2 import (
    HoldSessionRequest,
    HoldSessionResponse,
    ReadKvRequest,
    WriteKvResponse,
)
from stoker.v1.worker_pb2 import (
    DescribeWorkerRequest,
    LoadEnd,
    LoadModelRequest,
    LoadModelResponse,
    WorkerDescription,
)
from stoker.v1.worker_pb2_grpc import WorkerStub

StreamUnaryCall = grpc.aio.StreamUnaryCall[Any, Any]

EXIT_GRACE_SECONDS = 1.0
"""A worker that broke its connection is ended if its process has not ended by itself after this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkOptions:
    """How to talk to workers."""

    attach_socket: str
    cuda_devices: frozenset[int]
    """Slots that are GPUs; the others stand for the processor."""
    load_timeout_seconds: float
    spawn_timeout_seconds: float
    max_sessions: int


class WorkerLink:
    """Speaks to one worker process and turns what happens to it into events.

    Args:
        process: The worker; reaped by `live`.
        options: See `LinkOptions`.
        emit: Takes the events; called in the event loop.
        on_sessions_change: Called when its running or waiting sessions changed.
    """

    def __init__(
        self,
        process: WorkerProcess,
        options: LinkOptions,
        *,
        emit: Callable[[Event], None],
        on_sessions_change: Callable[[], None],
    ) -> None:
        self.process = process
        self.description: WorkerDescription | None = None
        self._options = options
        self._emit = emit
        self._began_seconds = time.monotonic()
        self.start_seconds = 0.0
        self._exited = asyncio.Event()
        self._late: asyncio.TimerHandle | None = None
        self._channel = connect(f"unix:{process.socket}")
        self._stub = WorkerStub(self._channel)
        # Keys and values are handed on as they came: to open and close a part takes two copies of a MiB.
        self._read_kv: grpc.aio.UnaryStreamMultiCallable[ReadKvRequest, bytes] = self._channel.unary_stream(
            "/stoker.v1.Worker/ReadKv", request_serializer=ReadKvRequest.SerializeToString
        )
        self._write_kv: grpc.aio.StreamUnaryMultiCallable[bytes, WriteKvResponse] = (
            self._channel.stream_unary(
                "/stoker.v1.Worker/WriteKv", response_deserializer=WriteKvResponse.FromString
            )
        )
        self.relay = SessionRelay(
            self._stub,
            peer=f"worker {process.worker_id}",
            max_sessions=options.max_sessions,
            on_change=on_sessions_change,
            now_seconds=time.monotonic,
            on_load_end=self._end_load,
        )

    @property
    def worker_id(self) -> WorkerId:
        """Return the worker's id."""
        return self.process.worker_id

    async def live(self) -> None:
        """Follow the worker from its start to its end; emits WorkerWarm and WorkerExited."""
        async with asyncio.TaskGroup() as tasks:
            greeting = tasks.create_task(self._greet())
            reason = await self.process.wait()
            self._exited.set()
            greeting.cancel()
        self._emit(WorkerExited(worker_id=self.worker_id, reason=reason))
        await self._channel.close()

    async def load(
        self, order: StartReplicaRequest, devices: Sequence[int], group: RankGroup | None = None
    ) -> None:
        """Have the worker load a model, then relay its sessions until it ends.

        Args:
            order: Of the replica.
            devices: Its slots that are this worker's.
            group: Which of the replica's ranks this worker is; None = it is all of it.
        """
        request = LoadModelRequest(
            spec=order.spec,
            revision=order.checkpoint.revision,
            replica_id=order.replica_id,
            attach_socket=self._options.attach_socket,
            devices=[index for index in devices if index in self._options.cuda_devices],
            group=group,
        )
        try:
            response, connection = await self._order(request)
        except PeerError as error:
            if error.code == PeerError.code and await self._ends_by_itself():
                return  # its exit says more than the broken connection
            self._refuse(error)
        except StokerError as error:
            self._refuse(error)
        else:
            link = None
            if connection is not None:
                link = FrameLink(connection, on_frame=self.relay.take_frame, on_end=self.relay.lose)
                self.relay.use(link)
            self._emit(LoadSucceeded(worker_id=self.worker_id, response=response))
            if response.loading:
                timeout_seconds = self._options.load_timeout_seconds
                self._late = asyncio.get_running_loop().call_later(timeout_seconds, self._give_up_weights)
            try:
                await self._relay()
            finally:
                self._cancel_late()
                if link is not None:
                    link.close()

    async def _order(self, request: LoadModelRequest) -> tuple[LoadModelResponse, socket.socket | None]:
        """Have the model loaded; return the worker's answer, and its connection for sessions, if it has some.

        Raises:
            StokerError: It could not be loaded.
        """
        timeout_seconds = self._options.load_timeout_seconds
        if request.group.rank > 0:
            with translated(f"worker {self.worker_id}"):
                return await self._stub.LoadModel(request, timeout=timeout_seconds), None
        path = self.process.socket.with_suffix(session_socket.SUFFIX)
        with SessionSocket(path) as awaited, translated(f"worker {self.worker_id}"):
            request.session_socket = str(path)
            response = await self._stub.LoadModel(request, timeout=timeout_seconds)
            return response, await awaited.accept()

    async def read_kv(self, request: ReadKvRequest, *, timeout_seconds: float) -> AsyncGenerator[bytes]:
        """Yield the parts of a running session's keys and values in their wire form; raises as it answers."""
        call = self._read_kv(request, timeout=timeout_seconds)
        with translated(f"worker {self.worker_id}"), cancelled_after(call) as parts:
            async for part in parts:
                yield part

    async def write_kv(self, parts: AsyncIterator[bytes], *, timeout_seconds: float) -> WriteKvResponse:
        """Hand the parts of a coming session's keys and values to the worker; raises what it answers."""
        call = self._write_kv(timeout=timeout_seconds)
        with translated(f"worker {self.worker_id}"), cancelled_after(call):
            async for part in parts:
                if not await self._is_written(call, part):
                    break
            else:
                await call.done_writing()
            return await call

    async def hold(self, request: HoldSessionRequest, *, timeout_seconds: float) -> HoldSessionResponse:
        """Have a session stand still, or go on; raises what the worker answers."""
        with translated(f"worker {self.worker_id}"):
            return await self._stub.HoldSession(request, timeout=timeout_seconds)

    async def _is_written(self, call: StreamUnaryCall, part: bytes) -> bool:
        """Hand a part over; False: the worker has answered already, with an error."""
        try:
            await call.write(part)
        except asyncio.InvalidStateError:
            return False
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.INTERNAL:
                raise
            # A write that was under way when the worker answered hides what it answered.
            raise KvUnavailable(
                f"worker {self.worker_id} stopped taking keys and values; its log says why"
            ) from error
        return True

    async def _greet(self) -> None:
        try:
            with translated(f"worker {self.worker_id}"):
                self.description = await self._stub.DescribeWorker(
                    DescribeWorkerRequest(), timeout=self._options.spawn_timeout_seconds, wait_for_ready=True
                )
        except StokerError as error:
            if not await self._ends_by_itself():
                log.get().warning("worker.unresponsive", worker_id=self.worker_id, message=error.message)
                await self.process.end()
            return
        self.start_seconds = time.monotonic() - self._began_seconds
        self._emit(WorkerWarm(worker_id=self.worker_id))

    async def _relay(self) -> None:
        try:
            await self.relay.run()
            message = "it closed the stream of its sessions"
        except StokerError as error:
            message = error.message
        # No token can come any more: whoever waits for one must know now, not when the process was reaped.
        self.relay.fail_all(WorkerDied(f"worker {self.worker_id} is lost: {message}"))
        if not await self._ends_by_itself():
            log.get().warning("worker.unresponsive", worker_id=self.worker_id, message=message)
            await self.process.end()

    def _end_load(self, end: LoadEnd) -> None:
        self._cancel_late()
        if end.error_code:
            self._lose_weights(end.error_code, end.error_message)
        else:
            self._emit(WeightsArrived(worker_id=self.worker_id, timings=end.timings))

    def _give_up_weights(self) -> None:
        """Called when the time is up."""
        seconds = self._options.load_timeout_seconds
        self._lose_weights(DeadlineExceeded.code, f"not all weights were there after {seconds:g} s")

    def _cancel_late(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _lose_weights(self, error_code: str, error_message: str) -> None:
        self._emit(WeightsLost(worker_id=self.worker_id, error_code=error_code, error_message=error_message))

    def _refuse(self, error: StokerError) -> None:
        refused = LoadRefused(worker_id=self.worker_id, error_code=error.code, error_message=error.message)
        self._emit(refused)

    async def _ends_by_itself(self) -> bool:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(EXIT_GRACE_SECONDS):
                await self._exited.wait()
        return self._exited.is_set()
