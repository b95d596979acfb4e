"""A cluster that says what a test tells it to: controller, node agent and store as real gRPC servers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import Any, Self

import grpc

from services.node_agent.sessions.linked_sessions import serve_link
from services.node_agent.sessions.session_listener import SessionListener
from services.node_agent.sessions.session_sources import FollowedSource, OnNews
from stoker import rpc
from stoker.errors import ModelNotFound, StokerError
from stoker.v1 import (
    checkpoint_store_pb2,
    checkpoint_store_pb2_grpc,
    controller_pb2,
    controller_pb2_grpc,
    model_pb2,
    node_agent_pb2,
    node_agent_pb2_grpc,
    session_pb2,
    start_pb2,
)
from tests.integration.gateway.tiny_text import tiny_files, tiny_tokenizer

Script = Callable[[session_pb2.GenerateRequest], AsyncIterator[session_pb2.GenerateEvent]]

CONTEXT_TOKENS = 512


class FakeStore(checkpoint_store_pb2_grpc.CheckpointStoreServicer):
    """Gives small files by checkpoint uri."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.reads = 0

    async def ReadSmallFiles(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802 - the rpc's name
        """Send every file in two parts."""
        self.reads += 1
        for name, content in self.files[request.uri].items():
            half = len(content) // 2
            yield checkpoint_store_pb2.SmallFile(name=name, content=content[:half])
            yield checkpoint_store_pb2.SmallFile(name=name, content=content[half:], last=True)


class FakeAgent(node_agent_pb2_grpc.NodeAgentServicer):
    """Plays scripts, to calls of their own and over links.

    Attributes:
        linked: Sessions that came over links.
        links: Those there are now; cancelling one ends it.
        has_links: False: it is an agent of before, which knows none.
    """

    def __init__(self) -> None:
        self.orders: list[session_pb2.GenerateRequest] = []
        self.cancelled = asyncio.Event()
        self.script: Script = says("Hello!")
        self.linked = 0
        self.links: set[asyncio.Task[Any]] = set()
        self.has_links = True
        self.listener = SessionListener("127.0.0.1:0")
        self.kept: dict[str, node_agent_pb2.KeptSession] = {}

    async def Generate(self, request: Any, context: Any) -> AsyncGenerator[Any]:  # noqa: N802 - the rpc's name
        """Play the script."""
        self.orders.append(request)
        kept = self._keep(request)
        try:
            async for event in self.script(request):
                kept.tokens.extend(event.tokens)
                kept.finish_reason = event.finish_reason or kept.finish_reason
                yield event
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled.set()
            raise

    def _keep(self, request: session_pb2.GenerateRequest) -> node_agent_pb2.KeptSession:
        """Begin to keep a session's tokens, as a node agent does where that is asked for."""
        kept = node_agent_pb2.KeptSession(
            session_id=request.session_id,
            epoch=request.epoch,
            replica_id=request.replica_id,
            revision=f"r-{request.model}",
            fingerprint=request.fingerprint,
            tokens=[session_pb2.Token(id=token) for token in request.generated_token_ids],
        )
        if request.keep_seconds:
            self.kept[request.session_id] = kept
        return kept

    async def FindSessions(self, request: Any, context: Any) -> Any:  # noqa: N802 - the rpc's name
        """Give what has been kept."""
        found = [self.kept[name] for name in request.session_ids if name in self.kept]
        return node_agent_pb2.FindSessionsResponse(sessions=found)

    async def LinkSessions(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802 - the rpc's name
        """Play the script to whoever asks over a link."""
        if not self.has_links:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
        task = asyncio.current_task()
        assert task is not None
        self.links.add(task)
        try:
            async with aclosing(serve_link(self.listener, self._open)) as events:
                async for event in events:
                    yield event
        finally:
            self.links.discard(task)

    def _open(self, request: session_pb2.GenerateRequest, on_news: OnNews) -> FollowedSource:
        self.linked += 1
        return FollowedSource(self.Generate(request, None), None, on_news, request)


class FakeController(controller_pb2_grpc.ControllerServicer):
    """Tells routes; a cold model becomes ready when the test says so."""

    def __init__(self) -> None:
        self.routes: dict[str, controller_pb2.Route] = {}
        self.watchers: list[asyncio.Queue[controller_pb2.RoutesUpdate]] = []
        self.acquired: list[controller_pb2.AcquireRequest] = []
        self.acquire_error: StokerError | None = None
        self.may_start = asyncio.Event()
        self.acquires_left = asyncio.Event()
        self.cold_replica: controller_pb2.RouteReplica | None = None

    async def WatchRoutes(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802 - the rpc's name
        """Send all routes, then changes."""
        changes: asyncio.Queue[controller_pb2.RoutesUpdate] = asyncio.Queue()
        self.watchers.append(changes)
        yield controller_pb2.RoutesUpdate(snapshot=True, routes=list(self.routes.values()))
        while True:
            yield await changes.get()

    async def Acquire(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802 - the rpc's name
        """Say that it starts, and that it is ready once `may_start` is set."""
        self.acquired.append(request)
        if self.acquire_error is not None:
            raise self.acquire_error
        try:
            yield controller_pb2.AcquireEvent(
                starting=controller_pb2.AcquireStarting(
                    replica_id="rep-cold", node_id="node-1", predicted_seconds=1.5, loaded_fraction=0.25
                )
            )
            await self.may_start.wait()
        except (asyncio.CancelledError, GeneratorExit):
            self.acquires_left.set()
            raise
        timings = start_pb2.StartTimings(weights_seconds=0.5, total_seconds=0.75)
        yield controller_pb2.AcquireEvent(
            ready=controller_pb2.AcquireReady(replica=self.cold_replica, timings=timings)
        )

    async def Deploy(self, request: Any, context: Any) -> Any:  # noqa: N802 - the rpc's name
        """Make a route of the spec."""
        return controller_pb2.DeployResponse(model=model_pb2.Model(spec=request.spec), created=True)

    async def DeleteModel(self, request: Any, context: Any) -> Any:  # noqa: N802 - the rpc's name
        """Know no model."""
        raise ModelNotFound(f"model {request.name!r} is not deployed")

    async def ListModels(self, request: Any, context: Any) -> Any:  # noqa: N802 - the rpc's name
        """List what the routes name."""
        return controller_pb2.ListModelsResponse(models=[route.model for route in self.routes.values()])

    def push(self, route: controller_pb2.Route) -> None:
        """Tell everybody about a route."""
        name = route.model.spec.name
        if route.deleted:
            self.routes.pop(name, None)
        else:
            self.routes[name] = route
        for watcher in self.watchers:
            watcher.put_nowait(controller_pb2.RoutesUpdate(routes=[route]))


class FakeCluster:
    """All three, on ports of their own."""

    def __init__(self) -> None:
        self.controller, self.agent, self.store = FakeController(), FakeAgent(), FakeStore()
        self._servers: list[rpc.Server] = []
        self.controller_address = self.agent_address = self.store_address = ""

    async def __aenter__(self) -> Self:
        """Start the servers."""
        self.controller_address = await self._serve(
            controller_pb2_grpc.add_ControllerServicer_to_server, self.controller
        )
        self.agent_address = await self._serve(
            node_agent_pb2_grpc.add_NodeAgentServicer_to_server, self.agent
        )
        self.store_address = await self._serve(
            checkpoint_store_pb2_grpc.add_CheckpointStoreServicer_to_server, self.store
        )
        self.controller.cold_replica = self.replica("rep-cold")
        self._listening = asyncio.create_task(self.agent.listener.run())
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop them."""
        for server in self._servers:
            await server.stop()
        self._listening.cancel()
        await asyncio.wait([self._listening])
        self.agent.listener.close()

    async def stop_controller(self) -> None:
        """Take the controller away."""
        await self._servers[0].stop()

    async def _serve(self, add: Callable[[Any, Any], None], servicer: Any) -> str:
        server = rpc.Server([])
        add(servicer, server.grpc_server)
        port = server.bind("127.0.0.1:0")
        await server.start()
        self._servers.append(server)
        return f"127.0.0.1:{port}"

    def replica(self, replica_id: str, *, agent_address: str | None = None) -> controller_pb2.RouteReplica:
        """Return a replica on the fake agent."""
        return controller_pb2.RouteReplica(
            replica_id=replica_id,
            node_id="node-1",
            agent_address=agent_address or self.agent_address,
            max_context_tokens=CONTEXT_TOKENS,
            max_batch=8,
        )

    def route(
        self, name: str, *, ready: bool = True, template: bool = True, max_queue: int = 8
    ) -> controller_pb2.Route:
        """Return a model's route; its small files are put into the store."""
        uri = f"/models/{name}"
        self.store.files[uri] = tiny_files() if template else tiny_files(template=None)
        return controller_pb2.Route(
            model=model_pb2.Model(
                spec=model_pb2.ModelSpec(name=name, checkpoint_uri=uri, max_queue=max_queue),
                checkpoint=model_pb2.CheckpointInfo(
                    uri=uri, revision=f"r-{name}", context_tokens=CONTEXT_TOKENS, vocabulary_tokens=259
                ),
                created_unix_seconds=1_700_000_000,
            ),
            replicas=[self.replica(f"rep-{name}")] if ready else [],
            store_addresses=[self.store_address],
        )


def token_events(
    request: session_pb2.GenerateRequest, token_ids: list[int], *, stops: bool
) -> list[session_pb2.GenerateEvent]:
    """Return a session's events, one token each, cut at its token limit; log probability -(id / 256)."""
    wants_logprobs = request.sampling.HasField("top_logprobs")

    def token(token_id: int) -> session_pb2.Token:
        if not wants_logprobs:
            return session_pb2.Token(id=token_id)
        top = [
            session_pb2.TopLogprob(id=(token_id + step) % 256, logprob=-(token_id + step) / 256)
            for step in range(request.sampling.top_logprobs)
        ]
        return session_pb2.Token(id=token_id, logprob=-token_id / 256, top_logprobs=top)

    limit = request.sampling.max_tokens
    events = [
        session_pb2.GenerateEvent(epoch=request.epoch, position=position, tokens=[token(token_id)])
        for position, token_id in enumerate(token_ids[:limit])
    ]
    is_cut = len(token_ids) > limit or not stops
    events[-1].finish_reason = session_pb2.FINISH_REASON_LENGTH if is_cut else session_pb2.FINISH_REASON_STOP
    for end in (events[0], events[-1]):
        end.timings.queue_seconds = 0.001
        end.timings.prefill_seconds = 0.002
    return events


def says(text: str) -> Script:
    """Return a script that says the text, byte by byte, and stops."""
    token_ids = [*tiny_tokenizer().encode(text, add_special_tokens=False).ids, 257]

    async def play(request: session_pb2.GenerateRequest) -> AsyncIterator[session_pb2.GenerateEvent]:
        for event in token_events(request, token_ids, stops=True):
            yield event

    return play


def goes_on_with(text: str, *, stands_still_at: int) -> Script:
    """Return a script that says the text from where its order ends; the first one stops saying anything."""
    token_ids = [*tiny_tokenizer().encode(text, add_special_tokens=False).ids, 257]

    async def play(request: session_pb2.GenerateRequest) -> AsyncIterator[session_pb2.GenerateEvent]:
        has = len(request.generated_token_ids)
        for event in token_events(request, token_ids, stops=True)[has:]:
            if event.position == stands_still_at and not has:
                await asyncio.Event().wait()
            yield event

    return play


def says_its_seed() -> Script:
    """Return a script whose text is the session's seed."""

    async def play(request: session_pb2.GenerateRequest) -> AsyncIterator[session_pb2.GenerateEvent]:
        async for event in says(str(request.sampling.seed))(request):
            yield event

    return play


def fails_after(text: str, error: StokerError, *, times: int = 1_000_000) -> Script:
    """Return a script that says the text and fails; after so many times it says `fine`."""
    token_ids = tiny_tokenizer().encode(text, add_special_tokens=False).ids
    left = times

    async def play(request: session_pb2.GenerateRequest) -> AsyncIterator[session_pb2.GenerateEvent]:
        nonlocal left
        if left <= 0:
            async for event in says("fine")(request):
                yield event
            return
        left -= 1
        for position, token_id in enumerate(token_ids):
            yield session_pb2.GenerateEvent(
                epoch=request.epoch, position=position, tokens=[session_pb2.Token(id=token_id)]
            )
        raise error

    return play


def says_for_ever() -> Script:
    """Return a script that never ends by itself."""

    async def play(request: session_pb2.GenerateRequest) -> AsyncIterator[session_pb2.GenerateEvent]:
        position = 0
        while True:
            yield session_pb2.GenerateEvent(
                epoch=request.epoch, position=position, tokens=[session_pb2.Token(id=64)]
            )
            position += 1
            await asyncio.sleep(0.005)

    return play
