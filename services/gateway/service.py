"""The gateway's parts, put together, and their lifecycle."""

from __future__ import annotations

import asyncio
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import AsyncExitStack

from services.gateway.api_keys import ApiKeys
from services.gateway.grpc_api import SERVICE_NAME, Inference
from services.gateway.rest.admin import admin_router
from services.gateway.rest.app import build_app
from services.gateway.rest.edge import Edge
from services.gateway.rest.inference import inference_handlers, inference_router
from services.gateway.rest.models import models_router
from services.gateway.rest.server import HttpServer
from services.gateway.rest.short_way import ShortWay
from services.gateway.rest.status import status_router
from services.gateway.routing.agents import Agents
from services.gateway.routing.controllers import Controllers
from services.gateway.routing.placement import Placement
from services.gateway.routing.route_watch import RouteWatch
from services.gateway.routing.routes import ModelRoute
from services.gateway.runner import Runner
from services.gateway.sessions.hops import HopPolicy
from services.gateway.settings import GatewaySettings
from services.gateway.small_files import ModelTexts
from services.gateway.trace import Traces
from stoker import log, rpc
from stoker.background import Background, background
from stoker.clock import Clock, SystemClock
from stoker.ids import new_id
from stoker.v1 import inference_pb2_grpc

TEXT_THREADS = 2


class GatewayService:
    """See `stoker.serving.Service`."""

    def __init__(self, settings: GatewaySettings) -> None:
        self._settings = settings
        self._stack = AsyncExitStack()
        self._draining = False
        self._tasks: Background
        self._watch: RouteWatch
        self._runner: Runner
        self._texts: ModelTexts
        self._http: HttpServer | None = None
        self._http_task: asyncio.Task[None] | None = None
        self._grpc: rpc.Server

    async def start(self) -> None:
        """Bind both ports, follow the routes, serve."""
        settings, clock = self._settings, SystemClock()
        executor = ThreadPoolExecutor(TEXT_THREADS, thread_name_prefix="gateway-text")
        self._stack.callback(executor.shutdown, wait=False, cancel_futures=True)
        self._tasks = await self._stack.enter_async_context(background())
        controllers = Controllers(settings.controllers)
        self._stack.push_async_callback(controllers.close)
        self._watch = RouteWatch(
            controllers,
            gateway_id=settings.gateway_id or new_id("gateway"),
            clock=clock,
            on_route=self._prefetch,
        )
        traces = Traces(settings.kept_traces)
        self._runner = self._new_runner(controllers, traces, executor, clock)
        api_keys = ApiKeys(settings.api_keys)
        self._http = self._new_http(controllers, traces, api_keys, clock)
        grpc_port = await self._serve_grpc(api_keys)
        self._tasks.start(self._watch.run(), name="routes")
        self._http_task = self._tasks.start(self._http.run(), name="http")
        log.get().info("gateway.listening", address=self._http.address, grpc_port=grpc_port)

    def _new_runner(
        self, controllers: Controllers, traces: Traces, executor: Executor, clock: Clock
    ) -> Runner:
        """Return what runs the requests, with all that it asks."""
        settings = self._settings
        agents = Agents()
        self._stack.push_async_callback(agents.close)
        self._texts = ModelTexts(
            cache_dir=settings.cache_dir.expanduser(),
            disk_bytes=settings.cache_disk_bytes,
            models=settings.cache_models,
            executor=executor,
            start=self._tasks.start,
        )
        placement = Placement(
            self._watch.table,
            controllers,
            clock=clock,
            cold_timeout_seconds=settings.cold_timeout_seconds,
            patience_seconds=settings.controller_patience_seconds,
        )
        return Runner(
            watch=self._watch,
            placement=placement,
            agents=agents,
            texts=self._texts,
            traces=traces,
            executor=executor,
            clock=clock,
            timeout_seconds=settings.request_timeout_seconds,
            reattach_seconds=settings.reattach_seconds,
            hop_policy=HopPolicy(
                max_attempts=settings.max_attempts,
                max_hops=settings.max_hops,
                resume_timeout_seconds=settings.resume_timeout_seconds,
                ships_kv=settings.ship_kv,
            ),
        )

    def _new_http(
        self, controllers: Controllers, traces: Traces, api_keys: ApiKeys, clock: Clock
    ) -> HttpServer:
        """Return the REST face, bound."""
        settings = self._settings
        handlers = inference_handlers(self._runner, clock, settings.keepalive_seconds)
        app = build_app(
            [
                inference_router(handlers),
                models_router(self._watch),
                status_router(self._why_unready),
                admin_router(controllers, self._watch, traces),
            ]
        )
        edge = Edge(
            ShortWay(app, handlers),
            max_body_bytes=settings.max_body_bytes,
            api_keys=api_keys,
            max_requests=settings.max_requests,
        )
        return HttpServer(edge, settings.address)

    async def _serve_grpc(self, api_keys: ApiKeys) -> int:
        """Serve the gRPC face; return its port."""
        self._grpc = rpc.Server([SERVICE_NAME])
        inference_pb2_grpc.add_InferenceServicer_to_server(
            Inference(self._runner, self._watch, api_keys), self._grpc.grpc_server
        )
        port = self._grpc.bind(self._settings.grpc_address)
        await self._grpc.start()
        self._stack.push_async_callback(self._grpc.stop)
        return port

    async def stop_serving(self) -> None:
        """Answer 503 to readiness probes and to new requests."""
        self._draining = True
        self._runner.refuse_new()
        await self._grpc.set_serving(serving=False)

    async def drain(self, grace_seconds: float) -> None:
        """Let running requests end."""
        await self._runner.drain(grace_seconds)

    async def close(self) -> None:
        """Stop listening, cancel what runs, give everything back."""
        if self._http is not None:
            await self._http.close(self._http_task)
        await self._stack.aclose()

    def _prefetch(self, route: ModelRoute) -> None:
        self._texts.prefetch(route)

    def _why_unready(self) -> str | None:
        if self._draining:
            return "draining"
        return None if self._watch.table.synced else "no controller has told the routes yet"
