"""Probes and meters: `/health`, `/livez`, `/readyz`, `/metrics`, `/version`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import JSONResponse, Response

import stoker

UNREADY_STATUS = 503


def status_router(why_unready: Callable[[], str | None]) -> APIRouter:
    """Return the routes.

    Args:
        why_unready: Tells why no traffic should come here, None when it should. Never depends on a model.
    """
    router = APIRouter(tags=["status"])

    @router.get("/health")
    @router.get("/livez")
    async def is_alive() -> dict[str, str]:
        """Answer 200 while the process lives."""
        return {"status": "ok"}

    @router.get("/readyz")
    async def is_ready() -> Response:
        """Answer 200 when traffic may come, 503 while starting or draining."""
        reason = why_unready()
        if reason is None:
            return JSONResponse({"status": "ready"})
        return JSONResponse({"status": "unready", "reason": reason}, status_code=UNREADY_STATUS)

    @router.get("/metrics")
    async def show_metrics() -> Response:
        """Show the metrics, for Prometheus."""
        return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)

    @router.get("/version")
    async def show_version() -> dict[str, Any]:
        """Tell the version."""
        return {"version": stoker.__version__}

    return router
