"""The gateway's web application: dialects, chat page, health check, metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException

from swarm import __version__
from swarm.api.anthropic_dialect import anthropic_failure, anthropic_router
from swarm.api.failures import RequestFailed
from swarm.api.gateway import Gateway
from swarm.api.ollama_dialect import ollama_failure, ollama_router
from swarm.api.openai_dialect import openai_failure, openai_router
from swarm.api.request_limits import RequestLimits
from swarm.prometheus_text import CONTENT_TYPE
from swarm.web_pages import add_page

_PAGE = Path(__file__).parent / "page"


def gateway_app(gateway: Gateway) -> FastAPI:
    """Everything that is served over HTTP."""
    app = FastAPI(
        title="Swarm gateway",
        version=__version__,
        description="Language models of a swarm, behind the APIs of OpenAI, Anthropic and Ollama.",
        docs_url=None,
        redoc_url=None,
        responses={status: {"description": text, "content": {"application/json": {}}} for status, text in _ERRORS},
    )
    app.include_router(openai_router(gateway))
    app.include_router(anthropic_router(gateway))
    app.include_router(ollama_router(gateway))

    @app.get("/health", tags=["Operator"])
    async def health() -> JSONResponse:
        """That the gateway is up, and how busy."""
        running, waiting = gateway.load
        return JSONResponse({"status": "ok", "models": list(gateway.models), "running": running, "waiting": waiting})

    @app.get("/metrics", tags=["Operator"], response_class=PlainTextResponse)
    async def metrics() -> PlainTextResponse:
        """For Prometheus."""
        return PlainTextResponse(gateway.metrics.text(*gateway.load, gateway.models), media_type=CONTENT_TYPE)

    add_page(app, _PAGE)

    @app.exception_handler(RequestFailed)
    async def failed(request: Request, failure: RequestFailed) -> JSONResponse:
        return JSONResponse(_shaped(request.url.path, failure), failure.status, failure.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        failure = RequestFailed(400, "invalid_request_error", _sentence(error), "invalid_request")
        return JSONResponse(_shaped(request.url.path, failure), 400)

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        failure = RequestFailed(error.status_code, "invalid_request_error", f"{request.url.path}: {error.detail}")
        return JSONResponse(_shaped(request.url.path, failure), error.status_code, error.headers)

    def note(path: str, status: int) -> None:
        gateway.metrics.responses[path, status] += 1

    app.add_middleware(RequestLimits, shape=_shaped, note=note)
    return app


_ERRORS = (
    (400, "The request cannot be understood, or not be answered by this model."),
    (401, "The API key is missing or wrong."),
    (404, "There is no such model."),
    (408, "The request came too slowly."),
    (413, "The request is too large."),
    (429, "Too many requests: see Retry-After."),
    (502, "A server of the swarm failed."),
    (503, "The swarm cannot run this model now."),
)


def _shaped(path: str, failure: RequestFailed) -> dict[str, Any]:
    """An error as the clients of this path expect it."""
    if path.startswith("/v1/messages"):
        return anthropic_failure(failure)
    return ollama_failure(failure) if path.startswith("/api/") else openai_failure(failure)


def _sentence(error: RequestValidationError) -> str:
    """What is wrong, and where; nothing of the request is repeated beyond the names of fields."""
    shown = []
    for problem in error.errors()[:5]:
        place = ".".join(str(part)[:40] for part in problem["loc"] if part != "body")
        shown.append(f"{place}: {problem['msg']}" if place else problem["msg"])
    return "; ".join(shown)
