"""Serve the dashboard until told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn

from swarm.errors import PortTaken

_MOST_CONNECTIONS = 2048
_STOP_TIMEOUT_S = 2


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


async def serve(app: Any, listening: socket.socket, ready: Callable[[], None], stopping: Callable[[], None]) -> None:
    """Serve until SIGINT or SIGTERM.

    Args:
        ready: called when the first request can be answered.
        stopping: called when it is to end, so that answers without an end end.
    """
    config = uvicorn.Config(
        app,
        lifespan="off",
        log_level="error",
        access_log=False,
        timeout_graceful_shutdown=_STOP_TIMEOUT_S,
        limit_concurrency=_MOST_CONNECTIONS,
        server_header=False,
    )
    await _Server(config, ready, stopping).serve(sockets=[listening])


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
        """On the loop, and not raised again afterwards: what was begun is ended in peace."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.handle_exit, number, None)
        yield
