"""Serve a web application until told to stop: uvicorn, with an end to requests whose head never comes."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from swarm.errors import PortTaken

HEAD_TIMEOUT_S = 10.0
_STOP_TIMEOUT_S = 5
"""So long answers that are being made may take to end."""
_MOST_CONNECTIONS = 2048


def listening_socket(host: str, port: int) -> socket.socket:
    """A socket that listens there. Raises PortTaken if that is not possible."""
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen(512)
    except (OSError, OverflowError) as error:
        listening.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise PortTaken(f"Cannot listen on {host} port {port}: {reason}. Choose another with --port.") from error
    listening.setblocking(False)
    return listening


async def serve(
    app: Any, listening: socket.socket, ready: Callable[[], None], stopping: Callable[[], None] = lambda: None
) -> None:
    """Serve until SIGINT or SIGTERM, or until it is cancelled; answers that are being made have a few seconds to end.

    Args:
        ready: called when the first request can be answered.
        stopping: called when it is to end, so that answers without an end end.
    """
    config = uvicorn.Config(
        app,
        http=_PatientOnce,
        lifespan="off",
        log_level="error",
        access_log=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=_STOP_TIMEOUT_S,
        limit_concurrency=_MOST_CONNECTIONS,
        h11_max_incomplete_event_size=64 * 1024,
        server_header=False,
    )
    server = _Server(config, ready, stopping)
    serving = asyncio.create_task(server.serve(sockets=[listening]))
    try:
        await asyncio.shield(serving)
    except asyncio.CancelledError:
        server.should_exit = True
        await serving
        raise


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, ready: Callable[[], None], stopping: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready, self._stopping = ready, stopping

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._stopping()
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """On the loop, and not raised again afterwards: what was joined is left in peace."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.handle_exit, number, None)
        yield


class _PatientOnce(H11Protocol):
    """A connection whose next request's head must come within a time."""

    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait_for_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_waiting()
        elif self._head_timer is None:
            self._wait_for_head()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._stop_waiting()  # uvicorn's own keep-alive timer begins

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def _wait_for_head(self) -> None:
        self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._give_up)

    def _stop_waiting(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _give_up(self) -> None:
        self._head_timer = None
        if self.transport is not None and not self.transport.is_closing():
            self.transport.write(b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
            self.transport.close()
