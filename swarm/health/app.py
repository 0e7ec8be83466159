"""The dashboard's web application: pages, JSON API, live events, metrics, badges."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from fastapi.responses import Response as PlainResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from swarm import __version__
from swarm.errors import DiskError
from swarm.health.badge import badge_svg
from swarm.health.board import Board
from swarm.health.history import KEPT_S, History
from swarm.health.past import NO_HISTORY, model_histories, server_detail
from swarm.health.presenting import Snapshot, everything, health_of, model_detail, models_view, overview
from swarm.health.prometheus import metrics_text
from swarm.health.rendering import Renderings
from swarm.health.views import (
    HistoryView,
    ModelDetailView,
    ModelsView,
    OverviewView,
    ServerDetailView,
    StateView,
    View,
)
from swarm.prometheus_text import CONTENT_TYPE
from swarm.web_pages import SECURITY_HEADERS, add_page

_PAGE = Path(__file__).parent / "page"
_PUBLIC = {"Access-Control-Allow-Origin": "*", "Cache-Control": "no-cache", "Vary": "Accept-Encoding"}
_KEEP_ALIVE_S = 15.0


_Responses = dict[int | str, dict[str, Any]]


class Failure(BaseModel):
    """What went wrong."""

    detail: str


_NOT_FOUND: _Responses = {404: {"model": Failure, "description": "It is not known here."}}
_BAD: _Responses = {400: {"model": Failure, "description": "A parameter is out of its range."}}


def health_app(board: Board, history: History) -> FastAPI:
    """Everything that is served over HTTP; whatever asks never waits for a look at the swarm."""
    app = FastAPI(
        title="Swarm health",
        version=__version__,
        description="How a swarm is, now and over the last 30 days. No address of any server is told.",
        docs_url=None,
        redoc_url=None,
    )
    renderings = Renderings(board)

    async def rendered(request: Request, name: str, make: Callable[[Snapshot], View | None]) -> Response:
        found = await asyncio.to_thread(renderings.get, name, make)
        if found is None:
            raise HTTPException(404, "It is not known here.")
        headers = {**_PUBLIC, "ETag": found.etag}
        if request.headers.get("if-none-match") == found.etag:
            return PlainResponse(status_code=304, headers=headers)
        if found.gzipped is not None and "gzip" in request.headers.get("accept-encoding", ""):
            return PlainResponse(
                found.gzipped, headers={**headers, "Content-Encoding": "gzip"}, media_type="application/json"
            )
        return PlainResponse(found.body, headers=headers, media_type="application/json")

    @app.get("/api/v1/overview", response_model=OverviewView, tags=["Now"])
    async def get_overview(request: Request) -> Response:
        """What the first page shows: models, the latest incidents, top contributors."""
        return await rendered(request, "overview", overview)

    @app.get("/api/v1/state", response_model=StateView, tags=["Now"])
    async def get_state(request: Request) -> Response:
        """Everything that is known now, with all servers."""
        return await rendered(request, "state", everything)

    @app.get("/api/v1/models", response_model=ModelsView, tags=["Now"])
    async def get_models(request: Request) -> Response:
        """All models that are watched, the worst first."""
        return await rendered(request, "models", models_view)

    @app.get("/api/v1/models/{model}", response_model=ModelDetailView, responses=_NOT_FOUND, tags=["Now"])
    async def get_model(request: Request, model: str) -> Response:
        """One model, by its digest, with its servers."""
        return await rendered(request, f"model {model}", lambda snapshot: model_detail(snapshot, model))

    @app.get("/api/v1/servers/{id}", response_model=ServerDetailView, responses=_NOT_FOUND, tags=["Now"])
    async def get_server(id: str) -> Response:
        """One server, by its peer id: what it hosts, and its past."""
        found = await asyncio.to_thread(server_detail, board.latest, history, id, time.time())
        if found is None:
            raise HTTPException(404, "No such server has been seen within 30 days.")
        return PlainResponse(found.model_dump_json(), headers=_PUBLIC, media_type="application/json")

    @app.get("/api/v1/history", response_model=HistoryView, responses=_BAD, tags=["Past"])
    async def get_history(
        hours: Annotated[float, Query(gt=0, le=KEPT_S / 3600, description="So far back", allow_inf_nan=False)] = 24,
        model: Annotated[str | None, Query(max_length=128, description="Digest of one model; default: all")] = None,
    ) -> Response:
        """Samples of every model, the finer the shorter the time, and what happened."""
        found = await asyncio.to_thread(model_histories, history, time.time(), hours, model)
        return PlainResponse(found.model_dump_json(), headers=_PUBLIC, media_type="application/json")

    @app.get(
        "/api/v1/events",
        response_class=StreamingResponse,
        responses={200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}},
        tags=["Now"],
    )
    async def get_events() -> StreamingResponse:
        """Server-sent events: an `overview` whenever the swarm was looked at, with the data of `/api/v1/overview`."""
        headers = {**_PUBLIC, "X-Accel-Buffering": "no"}
        return StreamingResponse(_events(board, renderings), media_type="text/event-stream", headers=headers)

    @app.get("/metrics", response_class=PlainTextResponse, tags=["Operator"])
    async def get_metrics() -> Response:
        """For Prometheus."""
        text = await asyncio.to_thread(lambda: metrics_text(overview(board.latest)))
        return PlainResponse(text, headers={"Content-Type": CONTENT_TYPE})

    @app.get(
        "/badge/{model:path}.svg",
        response_class=Response,
        responses={
            200: {"content": {"image/svg+xml": {"schema": {"type": "string"}}}},
            404: {
                "content": {"image/svg+xml": {"schema": {"type": "string"}}, "application/json": {}},
                "description": "An unknown model; no picture, if no model can have the name (it has several lines)",
            },
        },
        tags=["Now"],
    )
    async def get_badge(model: str) -> Response:
        """How a model is, by its digest or name, as a picture."""
        found = health_of(board.latest, model)
        svg = badge_svg(*found) if found else badge_svg(model, None)
        headers = {"Cache-Control": "no-cache", **SECURITY_HEADERS}
        return PlainResponse(svg, 200 if found else 404, headers, media_type="image/svg+xml")

    add_page(app, _PAGE)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        return JSONResponse({"detail": f"{first['loc'][-1]}: {first['msg']}"}, 400)

    @app.exception_handler(DiskError)
    async def unreadable(_: Request, error: DiskError) -> JSONResponse:
        return JSONResponse({"detail": NO_HISTORY}, 503)

    return app


async def _events(board: Board, renderings: Renderings) -> AsyncIterator[bytes]:
    sequence = -1
    while not board.closed:
        try:
            async with asyncio.timeout(_KEEP_ALIVE_S):
                sequence = (await board.newer_than(sequence)).sequence
        except TimeoutError:
            yield b": still here\n\n"
            continue
        if board.closed:
            return
        found = await asyncio.to_thread(renderings.get, "overview", overview)
        assert found is not None
        yield b"event: overview\ndata: " + found.body + b"\n\n"
