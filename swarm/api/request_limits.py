"""What a request may weigh and how slowly it may come, before anything else looks at it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from swarm.api.failures import RequestFailed

MAX_BODY_BYTES = 4 * 1024 * 1024
BODY_TIMEOUT_S = 20.0


class RequestLimits:
    """ASGI middleware: reads the whole body first, at most so much of it, within so much time.

    Args:
        shape: an error's body, for a path.
        note: told the path and status of every response.
    """

    def __init__(
        self, app: ASGIApp, shape: Callable[[str, RequestFailed], dict[str, Any]], note: Callable[[str, int], None]
    ) -> None:
        self._app, self._shape, self._note = app, shape, note

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)

        async def noting(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = scope.get("route")  # its pattern: names that strangers made up are no labels
                self._note(getattr(route, "path", "other"), message["status"])
            await send(message)

        try:
            body = await self._body(scope, receive)
        except RequestFailed as failure:
            content = self._shape(scope["path"], failure)
            response = JSONResponse(content, failure.status, {**failure.headers, "Connection": "close"})
            return await response(scope, receive, noting)
        if body is None:
            return None
        given = False

        async def replay() -> Message:
            nonlocal given
            if not given:
                given = True
                return {"type": "http.request", "body": body, "more_body": False}
            return await receive()

        return await self._app(scope, replay, noting)

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        """All of it; None: the client hung up. Raises RequestFailed."""
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if not length.isdigit() or int(length) > MAX_BODY_BYTES:
            raise _too_large()
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    if len(body) > MAX_BODY_BYTES:
                        raise _too_large()
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            late = f"The request's body did not come within {BODY_TIMEOUT_S:g} s."
            raise RequestFailed(408, "invalid_request_error", late, "timeout") from None


def _too_large() -> RequestFailed:
    message = f"The request's body is larger than {MAX_BODY_BYTES // 1024**2} MiB."
    return RequestFailed(413, "invalid_request_error", message, "request_too_large")
