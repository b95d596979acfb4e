"""The asynchronous client: chat and complete through the gateway, administer through the controller."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from types import TracebackType
from typing import Any, Self

from stoker.client.connection import find_controller, find_gateway
from stoker.client.resuming import resuming
from stoker.rpc import cancelled_after, connect, translated
from stoker.v1 import (
    controller_pb2,
    controller_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    model_pb2,
    node_agent_pb2,
    node_agent_pb2_grpc,
)

DEFAULT_TIMEOUT_SECONDS = 600.0


MIGRATE_SECONDS = 600.0
"""A move may wait for a model to be loaded."""


class AsyncClient:
    """A client of a running cluster; use as an async context manager.

    Args:
        gateway: `host:port` of the gateway's gRPC face; default: see `stoker.client.connection`.
        controller: `host:port` of a controller; likewise.

    Every method raises a `stoker.errors.StokerError`: ModelNotFound, QueueFull, DeadlineExceeded, PeerError …
    """

    def __init__(self, *, gateway: str | None = None, controller: str | None = None) -> None:
        self.gateway = find_gateway(gateway)
        self.controller = find_controller(controller)
        self._gateway_channel = connect(self.gateway)
        self._controller_channel = connect(self.controller)
        self._inference = inference_pb2_grpc.InferenceStub(self._gateway_channel)
        self._admin = controller_pb2_grpc.ControllerStub(self._controller_channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close both channels."""
        await self._gateway_channel.close()
        await self._controller_channel.close()

    # --- inference ---

    async def chat(
        self,
        model: str,
        messages: Sequence[tuple[str, str]],
        *,
        timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
        idempotency_key: str | None = None,
        last_event_id: str | None = None,
        **sampling: Any,
    ) -> AsyncGenerator[inference_pb2.TextEvent, None]:
        """Yield the assistant's answer as it is generated.

        Args:
            model: A deployed model; a cold one is started.
            messages: (role, content) pairs, oldest first.
            timeout_seconds: For the whole answer, a start included.
            idempotency_key: 1 to 255 visible ASCII characters, new for each request. When the connection or
                the gateway is lost, ask again with the same arguments, of any gateway: it goes on.
            last_event_id: The `event_id` of the last event that came, when going on: what follows it is
                yielded. None = all of the answer.
            **sampling: Fields of `TextSampling`, e.g. `temperature=0.0`, `max_tokens=64`.

        Raises:
            InvalidRequest: Key or event id are none, or the event is of another request.
            IdempotencyKeyReused: The key began with other arguments.
            StreamLost: What came so far was made by weights that are not served any more.
        """
        request = inference_pb2.ChatRequest(
            model=model,
            messages=[inference_pb2.ChatMessage(role=role, content=content) for role, content in messages],
            sampling=inference_pb2.TextSampling(**sampling),
        )
        metadata = resuming(idempotency_key, last_event_id)
        with (
            translated(f"gateway {self.gateway}"),
            cancelled_after(
                self._inference.Chat(request, timeout=timeout_seconds, metadata=metadata)
            ) as events,
        ):
            async for event in events:
                yield event

    async def complete(
        self,
        model: str,
        prompt: str,
        *,
        timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
        idempotency_key: str | None = None,
        last_event_id: str | None = None,
        **sampling: Any,
    ) -> AsyncGenerator[inference_pb2.TextEvent, None]:
        """Yield the continuation of `prompt` as it is generated; arguments and errors as in `chat`."""
        request = inference_pb2.CompleteRequest(
            model=model, prompt=prompt, sampling=inference_pb2.TextSampling(**sampling)
        )
        metadata = resuming(idempotency_key, last_event_id)
        with (
            translated(f"gateway {self.gateway}"),
            cancelled_after(
                self._inference.Complete(request, timeout=timeout_seconds, metadata=metadata)
            ) as events,
        ):
            async for event in events:
                yield event

    # --- administration ---

    async def deploy(
        self, spec: model_pb2.ModelSpec, *, create_only: bool = False, dry_run: bool = False
    ) -> controller_pb2.DeployResponse:
        """Create or change a model; the checkpoint is checked first (headers only).

        Args:
            spec: What to deploy.
            create_only: Refuse when the model exists.
            dry_run: Check everything and answer what would be deployed; change nothing.
        """
        request = controller_pb2.DeployRequest(spec=spec, create_only=create_only, dry_run=dry_run)
        with translated(f"controller {self.controller}"):
            return await self._admin.Deploy(request, timeout=30)

    async def delete(self, name: str) -> None:
        """Delete a model; its replicas are drained and stopped."""
        with translated(f"controller {self.controller}"):
            await self._admin.DeleteModel(controller_pb2.DeleteModelRequest(name=name))

    async def models(self) -> Sequence[model_pb2.Model]:
        """Return what is deployed, by name."""
        with translated(f"controller {self.controller}"):
            return (await self._admin.ListModels(controller_pb2.ListModelsRequest())).models

    async def replicas(self, model: str = "") -> Sequence[node_agent_pb2.Replica]:
        """Return the replicas of a model, or all."""
        with translated(f"controller {self.controller}"):
            return (await self._admin.ListReplicas(controller_pb2.ListReplicasRequest(model=model))).replicas

    async def nodes(self) -> Sequence[controller_pb2.Node]:
        """Return the nodes the controller knows."""
        with translated(f"controller {self.controller}"):
            return (await self._admin.ListNodes(controller_pb2.ListNodesRequest())).nodes

    async def status(self) -> controller_pb2.ClusterStatus:
        """Return the cluster at a glance."""
        with translated(f"controller {self.controller}"):
            return await self._admin.GetClusterStatus(controller_pb2.GetClusterStatusRequest())

    async def explain(self, subject: str, *, limit: int = 0) -> Sequence[controller_pb2.ExplainedDecision]:
        """Return the decisions about a model, or for a request, the latest first; limit 0 = 10."""
        request = controller_pb2.ExplainRequest(subject=subject, limit=limit)
        with translated(f"controller {self.controller}"):
            return (await self._admin.Explain(request)).decisions

    async def migrate(
        self, subject: str, to_node_id: str, *, timeout_seconds: float = MIGRATE_SECONDS
    ) -> controller_pb2.MigrateResponse:
        """Move a model's replica, or one request's sessions, to a node while they stream.

        Args:
            subject: Name of a model, or id of a request that runs.
            to_node_id: The node.
            timeout_seconds: How long the model's start there may take; the move goes on beyond it.

        Raises:
            StokerError: Why it can't be moved; what runs goes on where it is.
        """
        request = controller_pb2.MigrateRequest(subject=subject, to_node_id=to_node_id)
        with translated(f"controller {self.controller}"):
            return await self._admin.Migrate(request, timeout=timeout_seconds)

    async def set_node_scheduling(
        self, node_id: str, scheduling: controller_pb2.NodeScheduling.ValueType
    ) -> controller_pb2.SetNodeSchedulingResponse:
        """Open, cordon or drain a node, which need not have joined; returns what still runs there."""
        request = controller_pb2.SetNodeSchedulingRequest(node_id=node_id, scheduling=scheduling)
        with translated(f"controller {self.controller}"):
            return await self._admin.SetNodeScheduling(request)

    async def events(
        self, *, limit: int = 0, follow: bool = False
    ) -> AsyncGenerator[controller_pb2.ClusterEvent, None]:
        """Yield the last events (limit 0 = 100), oldest first; with `follow` those to come, too."""
        request = controller_pb2.WatchEventsRequest(limit=limit, follow=follow)
        with (
            translated(f"controller {self.controller}"),
            cancelled_after(self._admin.WatchEvents(request)) as events,
        ):
            async for event in events:
                yield event

    async def acquire(
        self, model: str, *, timeout_seconds: float
    ) -> AsyncGenerator[controller_pb2.AcquireEvent, None]:
        """Start a replica of a cold model, as a request would; yields progress, ends when it is ready."""
        request = controller_pb2.AcquireRequest(model=model, timeout_seconds=timeout_seconds)
        with (
            translated(f"controller {self.controller}"),
            cancelled_after(self._admin.Acquire(request, timeout=timeout_seconds + 5)) as events,
        ):
            async for event in events:
                yield event

    async def logs(
        self, agent_address: str, replica_id: str, *, tail_lines: int, follow: bool
    ) -> AsyncGenerator[str, None]:
        """Yield the lines a replica's worker printed, from its node agent."""
        request = node_agent_pb2.ReadLogsRequest(replica_id=replica_id, tail_lines=tail_lines, follow=follow)
        async with connect(agent_address) as channel:
            with translated(f"node agent {agent_address}"):
                stub = node_agent_pb2_grpc.NodeAgentStub(channel)
                with cancelled_after(stub.ReadLogs(request, timeout=None if follow else 30)) as lines:
                    async for line in lines:
                        yield line.text
