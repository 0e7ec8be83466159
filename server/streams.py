"""Serve one client's stream: bytes to the session's state machine, steps to the compute thread, results back."""

from __future__ import annotations

import asyncio
import contextlib
import logging

import torch

from swarm.errors import CacheFull, CannotRollBack, ProtocolError, RemoteError, ServerFault
from swarm.protocol.messages import Open
from swarm.protocol.sessions import OpenRequested, ServerSession, SessionEnded, StepRequested
from swarm.protocol.tensors import dtype_name
from swarm.server.compute import ComputeThread
from swarm.server.sessions import HeldSession, SessionTable

logger = logging.getLogger(__name__)

_READ_BYTES = 256 * 1024
_WRITE_TIMEOUT_S = 30.0
_RETRY_AFTER_S = 5.0


class StreamServer:
    """Accepts session streams for one span."""

    def __init__(
        self, table: SessionTable, compute: ComputeThread, hidden_size: int, dtype: torch.dtype, idle_timeout_s: float
    ) -> None:
        self._table, self._compute = table, compute
        self._hidden_size, self._dtype = hidden_size, dtype
        self._idle_timeout_s = idle_timeout_s
        self._streams: set[_Stream] = set()
        self._no_session = asyncio.Event()
        self._no_session.set()
        self.steps = 0
        """Steps computed since the start."""

    async def handle(self, peer_id: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve a stream until its end; a client that breaks the protocol loses this stream only."""
        stream = _Stream(self, ServerSession(self._hidden_size), writer)
        self._streams.add(stream)
        try:
            await stream.serve(reader)
        except* ProtocolError as errors:
            logger.warning("closed a stream of %s: %s", peer_id, errors.exceptions[0])
        except* (ConnectionError, TimeoutError):
            logger.info("%s vanished", peer_id)
        finally:
            self._streams.discard(stream)

    async def drain(self, within_s: float) -> None:
        """Take no new session, ask the present ones to move, and wait until they have, or `within_s` has passed."""
        self._table.draining = True
        for stream in list(self._streams):
            stream.announce_drain(within_s)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await self._no_session.wait()

    def open(self, request: Open) -> HeldSession:
        """Admit a session. Raises RemoteError: why not."""
        session = self._table.open(request)
        self._no_session.clear()
        return session

    def close(self, session: HeldSession) -> None:
        """Free a session."""
        self._table.close(session)
        if not len(self._table):
            self._no_session.set()

    async def run(self, session: HeldSession, request: StepRequested) -> tuple[torch.Tensor, float, float]:
        """Compute a step. Returns (hidden states, seconds waited, seconds computed).

        Raises:
            RemoteError: to be sent to the client.
        """
        self._table.grow(session, request)
        try:
            output, timed = await self._compute.run(lambda: session.run(request))
        except CannotRollBack:
            raise
        except (RuntimeError, ValueError, IndexError, MemoryError) as error:
            # One session's failure (out of memory above all) must not end the others'.
            logger.exception("a step failed")
            raise ServerFault(
                f"the computation failed: {str(error).splitlines()[0] if str(error) else error!r}"
            ) from error
        self.steps += 1
        return output, timed.queue_s, timed.compute_s

    @property
    def dtype(self) -> str:
        """The precision of hidden states on the wire."""
        return dtype_name(self._dtype)

    @property
    def idle_timeout_s(self) -> float:
        return self._idle_timeout_s


class _Stream:
    """One stream and the session on it."""

    def __init__(self, server: StreamServer, machine: ServerSession, writer: asyncio.StreamWriter) -> None:
        self._server, self._machine, self._writer = server, machine, writer
        self._session: HeldSession | None = None
        self._running: asyncio.Task[None] | None = None
        self._ended = False

    async def serve(self, reader: asyncio.StreamReader) -> None:
        try:
            async with asyncio.TaskGroup() as tasks:
                await self._read(reader, tasks)
                if self._running is not None:
                    self._running.cancel()  # nobody waits for its result any more
        finally:
            if self._session is not None:
                self._server.close(self._session)

    async def _read(self, reader: asyncio.StreamReader, tasks: asyncio.TaskGroup) -> None:
        while not self._ended:
            async with asyncio.timeout(self._server.idle_timeout_s):
                data = await reader.read(_READ_BYTES)
            if not data:
                return
            for event in self._machine.receive_data(data):
                match event:
                    case OpenRequested(request):
                        self._open(request)
                    case StepRequested():
                        self._running = tasks.create_task(self._step(event))
                    case SessionEnded():
                        self._ended = True
            await self._flush()

    def announce_drain(self, within_s: float) -> None:
        self._machine.announce_drain(within_s)
        self._writer.writelines(self._machine.take_outgoing())

    def _open(self, request: Open) -> None:
        try:
            self._session = self._server.open(request)
        except RemoteError as error:
            self._machine.refuse(error, _RETRY_AFTER_S if isinstance(error, CacheFull) else None)
            self._ended = True
        else:
            self._machine.accept(self._server.dtype)

    async def _step(self, request: StepRequested) -> None:
        assert self._session is not None
        try:
            output, queue_s, compute_s = await self._server.run(self._session, request)
        except RemoteError as error:
            self._machine.refuse(error)
        else:
            self._machine.send_output(request.step, output, queue_s, compute_s)
        await self._flush()

    async def _flush(self) -> None:
        self._writer.writelines(self._machine.take_outgoing())
        async with asyncio.timeout(_WRITE_TIMEOUT_S):
            await self._writer.drain()
