"""The REST application: routers, error answers and the OpenAPI document, behind the edge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.staticfiles import StaticFiles

import stoker
from services.gateway.rest.errors import error_response
from services.gateway.rest.schema import ChatCompletionRequest, CompletionRequest
from stoker.errors import CallerError, InvalidRequest, NotFound, StokerError

DOCS_FILES_PATH = "/docs-files"
"""Where the documentation page's script and style lie: a browser without internet reads it too."""


class MethodNotAllowed(CallerError):
    """The path exists, for other methods."""

    code = "method_not_allowed"
    http_status = 405


def build_app(routers: Sequence[APIRouter]) -> FastAPI:
    """Return the application over these routers."""
    app = FastAPI(
        title="Stoker",
        version=stoker.__version__,
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    for router in routers:
        app.include_router(router)
    app.add_exception_handler(StokerError, _refuse)
    app.add_exception_handler(HTTPException, _refuse_path)
    app.add_exception_handler(RequestValidationError, _refuse_parameters)
    app.add_exception_handler(Exception, _own_fault)
    document = _describe(app)

    @app.get("/openapi.json", include_in_schema=False)
    async def show_openapi() -> Response:
        """Describe the API."""
        return JSONResponse(document)

    @app.get("/docs", include_in_schema=False)
    async def show_docs() -> Response:
        """Show the API to a browser."""
        return get_swagger_ui_html(
            openapi_url="/openapi.json",
            title=app.title,
            swagger_js_url=f"{DOCS_FILES_PATH}/swagger-ui-bundle.js",
            swagger_css_url=f"{DOCS_FILES_PATH}/swagger-ui.css",
            swagger_favicon_url=f"{DOCS_FILES_PATH}/favicon.png",
        )

    app.mount(DOCS_FILES_PATH, StaticFiles(packages=[("fastapi_offline", "static")]))
    return app


def _describe(app: FastAPI) -> dict[str, Any]:
    schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
    _, requests = models_json_schema(
        [(ChatCompletionRequest, "validation"), (CompletionRequest, "validation")],
        ref_template="#/components/schemas/{model}",
    )
    schema.setdefault("components", {}).setdefault("schemas", {}).update(requests["$defs"])
    return schema


async def _refuse(_: Request, error: Exception) -> Response:
    return error_response(error if isinstance(error, StokerError) else StokerError(str(error)))


async def _refuse_path(http: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else StokerError.http_status
    where = f"{http.method} {http.url.path[:200]}"
    if status == MethodNotAllowed.http_status:
        refusal: StokerError = MethodNotAllowed(f"method not allowed: {where}")
    elif status == NotFound.http_status:
        refusal = NotFound(f"unknown URL: {where}; /openapi.json lists what there is")
    else:
        refusal = InvalidRequest(f"{where}: {error}")
    response = error_response(refusal)
    if isinstance(error, HTTPException) and error.headers:
        response.headers.update(error.headers)
    return response


async def _refuse_parameters(_: Request, error: Exception) -> Response:
    first = error.errors()[0] if isinstance(error, RequestValidationError) else {"loc": (), "msg": str(error)}
    param = ".".join(str(part) for part in first["loc"][1:]) or None
    return error_response(InvalidRequest(f"{param}: {first['msg']}", param=param))


async def _own_fault(_: Request, __: Exception) -> Response:
    """Answer what nobody caught; it is raised further, and the edge writes it to the log."""
    return error_response(StokerError("the gateway failed inside; its log says more"))
