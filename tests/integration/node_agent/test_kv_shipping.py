"""Keys and values over real gRPC: worker → agent → agent → worker, with engines that are played."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from services.node_agent.servicer import Servicer
from services.node_agent.sessions.move_watch import MoveWatch
from services.node_agent.workers.worker_link import LinkOptions, WorkerLink
from services.worker.kv.kv_desk import KvDesk
from services.worker.kv.kv_format import ALL_TOKENS, KvLayout
from stoker.errors import CapacityError, KvUnavailable, PeerError, ReplicaGone
from stoker.ids import SessionId
from stoker.rpc import Server, connect, translated
from stoker.v1.node_agent_pb2 import FetchKvRequest, FetchKvResponse
from stoker.v1.node_agent_pb2_grpc import NodeAgentStub, add_NodeAgentServicer_to_server
from stoker.v1.session_kv_pb2 import KvPart, ReadKvRequest, WriteKvResponse
from stoker.v1.worker_pb2_grpc import WorkerServicer, add_WorkerServicer_to_server

LAYOUT = KvLayout(
    revision="r", engine="e", cache=ALL_TOKENS, dtype="float32", layers=2, kv_heads=4, head_dim=64
)
TOKENS = 2000
"""8 MB: several pieces, and more than the windows of gRPC hold."""

REFUSED = "revision is 'q' there, 'r' here|stopped taking keys and values"
"""gRPC hides an answer that comes while a part is being written; then the agent says that much."""


class PlayedEngine:
    """An engine with one session, whose keys and values are its tokens' numbers."""

    def __init__(self, layout: KvLayout = LAYOUT) -> None:
        self.engine, self.kv_layout, self.numerics = self, layout, "n"
        self.is_late = self.is_stepping = False
        self.layout, self.tokens, self.adapter = layout, 0, ("", "")
        self.came = bytearray()
        self.released = 0
        self.held_seconds = 0.0

    def call(self, work: Callable[[], Any]) -> Future[Any]:
        """Do it at once."""
        done: Future[Any] = Future()
        try:
            done.set_result(work())
        except CapacityError as error:
            done.set_exception(error)
        return done

    def export_kv(self, engine_id: SessionId) -> Any:
        """Return the reader of the session."""
        return SimpleNamespace(
            layout=self.layout, tokens=tuple(range(TOKENS)), adapter=self.adapter, read=data_of
        )

    def hold(self, engine_id: SessionId, seconds: float) -> int:
        """Have the session stand still; its last token's keys and values are not there yet."""
        self.held_seconds = seconds
        return TOKENS + 1

    def warm_decode(self) -> None:
        """Be warm."""

    def stage_kv(self) -> Any:
        """Return room."""
        return self

    def has_room(self, tokens: int) -> bool:
        """Say that room must be made."""
        return False

    def extend(self, tokens: int) -> None:
        """Make room."""

    def write(self, data: bytes, tokens: int) -> None:
        """Take a piece."""
        self.came += data
        self.tokens += tokens

    def release(self) -> None:
        """Give it back."""
        self.released += 1


def data_of(first: int, end: int) -> bytes:
    """Return the tokens' keys and values."""
    return b"".join(token.to_bytes(4, "little") * (LAYOUT.token_bytes // 4) for token in range(first, end))


class PlayedWorker(WorkerServicer):
    """A worker's desk."""

    def __init__(self, engine: PlayedEngine, spoil: Callable[[KvPart], None]) -> None:
        self.desk = KvDesk(engine)  # type: ignore[arg-type]
        self._spoil = spoil

    async def ReadKv(self, request: ReadKvRequest, context: object) -> AsyncIterator[KvPart]:  # noqa: N802 - the rpc
        """Give away."""
        async for encoded in self.desk.read(request, SessionId("e")):
            part = KvPart.FromString(encoded)
            self._spoil(part)
            yield part

    async def WriteKv(self, request_iterator: AsyncIterator[KvPart], context: object) -> WriteKvResponse:  # noqa: N802 - the rpc
        """Take."""
        return await self.desk.write(aiter(request_iterator))


class Agent:
    """A node agent with one worker."""

    def __init__(self, address: str, engine: PlayedEngine, moves: MoveWatch) -> None:
        self.address, self.engine, self.moves = address, engine, moves

    async def fetch(
        self, source: Agent, *, from_token: int = 0, replica_id: str = "rep", hold_seconds: float = 0.0
    ) -> FetchKvResponse:
        """Ask it to fetch the session."""
        async with connect(self.address) as channel:
            with translated("agent"):
                return await NodeAgentStub(channel).FetchKv(
                    FetchKvRequest(
                        session_id="s",
                        replica_id="rep",
                        from_agent_address=source.address,
                        from_replica_id=replica_id,
                        from_token=from_token,
                        hold_seconds=hold_seconds,
                    ),
                    timeout=120,
                )


@asynccontextmanager
async def agent(
    folder: Path, name: str, engine: PlayedEngine, spoil: Callable[[KvPart], None] = lambda _: None
) -> AsyncIterator[Agent]:
    """Run an agent and its worker."""
    worker, server = Server(["w"]), Server(["a"])
    socket = folder / f"{name}.sock"
    played = PlayedWorker(engine, spoil)
    add_WorkerServicer_to_server(played, worker.grpc_server)
    worker.bind(f"unix:{socket}")
    await worker.start()
    options = LinkOptions(
        attach_socket="",
        cuda_devices=frozenset(),
        load_timeout_seconds=9,
        spawn_timeout_seconds=9,
        max_sessions=9,
    )
    process: Any = SimpleNamespace(worker_id=name, socket=socket)
    link = WorkerLink(process, options, emit=lambda _: None, on_sessions_change=lambda: None)
    moves = MoveWatch(lambda: 0.0)

    def worker_of(replica_id: str) -> WorkerLink:
        if replica_id != "rep":
            raise ReplicaGone(f"replica {replica_id} is not served")
        return link

    host: Any = SimpleNamespace(worker_of=worker_of, moves=moves)
    add_NodeAgentServicer_to_server(Servicer(host, lambda: None, None), server.grpc_server)  # type: ignore[arg-type,return-value]
    port = server.bind("127.0.0.1:0")
    await server.start()
    try:
        yield Agent(f"127.0.0.1:{port}", engine, moves)
    finally:
        await link._channel.close()
        await server.stop()
        await worker.stop()
        played.desk.close()


async def test_keys_and_values_come_whole_and_in_order_from_node_to_node(tmp_path: Path) -> None:
    async with agent(tmp_path, "a", PlayedEngine()) as source, agent(tmp_path, "b", PlayedEngine()) as target:
        came = await target.fetch(source)

    assert (came.tokens, came.data_bytes) == (TOKENS, TOKENS * LAYOUT.token_bytes)
    assert bytes(target.engine.came) == b"".join(
        data_of(first, end) for first, end in LAYOUT.pieces(0, TOKENS)
    )
    assert target.engine.released == 0


async def test_a_session_stands_still_where_the_last_of_it_is_fetched(tmp_path: Path) -> None:
    async with agent(tmp_path, "a", PlayedEngine()) as source, agent(tmp_path, "b", PlayedEngine()) as target:
        before = await target.fetch(source)
        last = await target.fetch(source, from_token=TOKENS, hold_seconds=0.5)

    assert (before.held_tokens, last.held_tokens) == (0, TOKENS + 1)
    assert (last.tokens, last.data_bytes) == (TOKENS, 0)
    assert source.engine.held_seconds == 0.5


async def test_a_worker_that_lays_them_out_differently_refuses_by_name(tmp_path: Path) -> None:
    other = KvLayout(
        revision="q", engine="e", cache=ALL_TOKENS, dtype="float32", layers=2, kv_heads=4, head_dim=64
    )
    async with (
        agent(tmp_path, "a", PlayedEngine(other)) as source,
        agent(tmp_path, "b", PlayedEngine()) as target,
    ):
        with pytest.raises(KvUnavailable, match=REFUSED):
            await target.fetch(source)


async def test_damage_on_the_way_is_found_and_leaves_nothing(tmp_path: Path) -> None:
    def spoil(part: KvPart) -> None:
        if part.piece.first_token > 0:
            part.piece.data = bytes(len(part.piece.data))

    async with (
        agent(tmp_path, "a", PlayedEngine(), spoil) as source,
        agent(tmp_path, "b", PlayedEngine()) as target,
    ):
        with pytest.raises(KvUnavailable):  # KvDamaged, unless a write under way hides it
            await target.fetch(source)

    assert target.engine.released == 1


async def test_a_source_that_is_gone_is_an_error_of_the_move_alone(tmp_path: Path) -> None:
    async with agent(tmp_path, "a", PlayedEngine()) as source, agent(tmp_path, "b", PlayedEngine()) as target:
        with pytest.raises(ReplicaGone):
            await target.fetch(source, replica_id="another")
        source.address = "127.0.0.1:1"
        with pytest.raises(PeerError):
            await target.fetch(source)
