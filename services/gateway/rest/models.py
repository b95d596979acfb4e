"""`/v1/models`: what is deployed, in OpenAI's words."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from services.gateway.routing.route_watch import RouteWatch
from services.gateway.routing.routes import ModelRoute


def models_router(watch: RouteWatch) -> APIRouter:
    """Return the routes."""
    router = APIRouter(tags=["models"])

    @router.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        """List the deployed models, loaded or not, each also with every one of its adapters."""
        found = [_model(route, name) for route in watch.table.models() for name in route.names]
        return {"object": "list", "data": found}

    @router.get("/v1/models/{name:path}")
    async def get_model(name: str) -> dict[str, Any]:
        """Describe a deployed model."""
        return _model(await watch.find(name), name)

    return router


def _model(route: ModelRoute, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": int(route.created_unix_seconds),
        "owned_by": "stoker",
        "max_model_len": route.context_tokens or None,
        "ready_replicas": len(route.replicas),
        "parent": None if name == route.name else route.name,
    }
