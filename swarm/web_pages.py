"""Pages that ship in the package: their files, and what browsers are told not to do with them."""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import FileResponse
from starlette.exceptions import HTTPException

SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_HEADERS = {**SECURITY_HEADERS, "Cache-Control": "no-cache"}


def add_page(app: FastAPI, directory: Path) -> None:
    """Serve ``index.html`` of `directory` at ``/``, and the files beside it under ``/page/``."""
    files = {path.name: path for path in directory.iterdir() if path.is_file()}

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(files["index.html"], headers=_HEADERS)

    @app.get("/page/{name}", include_in_schema=False)
    async def page_file(name: str) -> FileResponse:
        if name not in files:
            raise HTTPException(404)
        return FileResponse(files[name], headers=_HEADERS)
