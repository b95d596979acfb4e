"""`/v1/models`: what is deployed, in OpenAI's words."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from services.gateway.route_watch import RouteWatch
from services.gateway.routes import ModelRoute


def models_router(watch: RouteWatch) -> APIRouter:
    """Return the routes."""
    router = APIRouter(tags=["models"])

    @router.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        """List the deployed models, loaded or not."""
        return {"object": "list", "data": [_model(route) for route in watch.table.models()]}

    @router.get("/v1/models/{name:path}")
    async def get_model(name: str) -> dict[str, Any]:
        """Describe a deployed model."""
        return _model(await watch.find(name))

    return router


def _model(route: ModelRoute) -> dict[str, Any]:
    return {
        "id": route.name,
        "object": "model",
        "created": int(route.created_unix_seconds),
        "owned_by": "stoker",
        "max_model_len": route.context_tokens or None,
        "ready_replicas": len(route.replicas),
    }
