"""`/api/v1`: administration, passed on to the controller, and the traces of recent requests.

Bodies and answers are the protos' fields by name, as JSON.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from google.protobuf.json_format import MessageToDict, ParseDict, ParseError
from google.protobuf.message import Message

from services.gateway.rest.json_body import read_object
from services.gateway.routing.controllers import Controllers
from services.gateway.routing.route_watch import RouteWatch
from services.gateway.trace import Traces
from stoker.errors import InvalidRequest, NotFound
from stoker.v1 import controller_pb2, model_pb2

SEEN_PATIENCE_SECONDS = 2.0
"""How long a deployment waits to be in this gateway's own routes, so that the next request finds it."""


def admin_router(controllers: Controllers, watch: RouteWatch, traces: Traces) -> APIRouter:
    """Return the routes."""
    router = APIRouter(prefix="/api/v1", tags=["administration"])

    @router.get("/models")
    async def list_models() -> dict[str, Any]:
        """List the models with their specs and states."""
        return _plain(
            await controllers.call(lambda stub: stub.ListModels(controller_pb2.ListModelsRequest()))
        )

    @router.post("/models", openapi_extra=_SPEC_BODY)
    async def deploy(http: Request) -> dict[str, Any]:
        """Deploy a model, or change it when it exists. The body is a ModelSpec."""
        spec = _spec(read_object(await http.body()))
        request = controller_pb2.DeployRequest(spec=spec)
        answer = await controllers.call(lambda stub: stub.Deploy(request))
        await watch.wait_for(spec.name, SEEN_PATIENCE_SECONDS)
        return _plain(answer)

    @router.delete("/models/{name:path}")
    async def delete(name: str) -> dict[str, Any]:
        """Delete a model; its replicas are drained and stopped."""
        request = controller_pb2.DeleteModelRequest(name=name)
        return _plain(await controllers.call(lambda stub: stub.DeleteModel(request)))

    @router.get("/nodes")
    async def list_nodes() -> dict[str, Any]:
        """List the nodes with their latest reports."""
        return _plain(await controllers.call(lambda stub: stub.ListNodes(controller_pb2.ListNodesRequest())))

    @router.get("/replicas")
    async def list_replicas(model: str = "") -> dict[str, Any]:
        """List the replicas, of one model or of all."""
        request = controller_pb2.ListReplicasRequest(model=model)
        return _plain(await controllers.call(lambda stub: stub.ListReplicas(request)))

    @router.get("/status")
    async def get_status() -> dict[str, Any]:
        """Tell how the cluster is."""
        request = controller_pb2.GetClusterStatusRequest()
        return _plain(await controllers.call(lambda stub: stub.GetClusterStatus(request)))

    @router.get("/requests/{request_id}")
    async def get_request(request_id: str) -> dict[str, Any]:
        """Tell where a recent request's time went, stage by stage."""
        trace = traces.get(request_id)
        if trace is None:
            raise NotFound(f"request {request_id!r} is unknown to this gateway, or no longer remembered")
        return trace.to_json()

    return router


_SPEC_BODY: dict[str, Any] = {
    "requestBody": {"required": True, "content": {"application/json": {"schema": {"type": "object"}}}}
}


def _spec(fields: dict[str, Any]) -> model_pb2.ModelSpec:
    try:
        spec = ParseDict(fields, model_pb2.ModelSpec())
    except ParseError as error:
        raise InvalidRequest(f"the body is not a model spec: {error}") from error
    if not spec.name or not spec.checkpoint_uri:
        raise InvalidRequest("a model spec needs `name` and `checkpoint_uri`")
    return spec


def _plain(message: Message) -> dict[str, Any]:
    return MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
