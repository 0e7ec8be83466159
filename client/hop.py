"""One session on one server: the stream, its heartbeat, and one step at a time."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass

import torch

from swarm.client.settings import ClientSettings
from swarm.dht import Announcement
from swarm.errors import PeerUnreachable, ProtocolError, SwarmError
from swarm.protocol.messages import STREAM_PROTOCOL, Open, Step
from swarm.protocol.sessions import (
    ClientSession,
    DrainAnnounced,
    OutputReceived,
    Refused,
    SessionEnded,
    SessionOpened,
)
from swarm.protocol.tensors import DTYPES
from swarm.routing import Leg
from swarm.transport.heartbeat import Heartbeat
from swarm.transport.node import Node

_READ_BYTES = 256 * 1024
_TICK_S = 0.25
_BUSY_PING_S = 0.5
_IDLE_PING_S = 10.0


@dataclass(frozen=True)
class HopTiming:
    """Where the time of one step went on one server, in seconds."""

    peer_id: str
    start: int
    end: int
    total_s: float
    """As the client saw it: network, waiting and computing."""
    queue_s: float
    compute_s: float


class Hop:
    """Blocks ``[start, end)`` of a session, on one server. Made by :meth:`open`.

    Attributes:
        length: positions in the server's cache.
        draining: the server said that it is leaving.
        pending_reorder: rows to continue from, to be sent with the next step.
    """

    def __init__(
        self, leg: Leg, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, settings: ClientSettings
    ) -> None:
        self.peer_id, self.start, self.end = leg.peer_id, leg.start, leg.end
        self.length = 0
        self.draining = False
        self.pending_reorder: torch.Tensor | None = None
        self._reader, self._writer = reader, writer
        self._machine = ClientSession()
        self._heartbeat = Heartbeat(_BUSY_PING_S, settings.peer_timeout_s, time.monotonic())
        self._answer: asyncio.Future[SessionOpened | OutputReceived] | None = None
        self._failure: SwarmError | None = None
        self._dtype = torch.float32
        self._sequence = 0
        self._tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._watch())]

    @classmethod
    async def open(
        cls,
        node: Node,
        server: Announcement,
        leg: Leg,
        *,
        model: str,
        batch: int,
        max_length: int,
        settings: ClientSettings,
    ) -> Hop:
        """Dial a server and open a session on it.

        Raises:
            PeerUnreachable: it cannot be dialled, or hung up.
            RemoteError: it refused.
        """
        await node.connect(server.peer_id, server.addresses, timeout_s=settings.connect_timeout_s)
        reader, writer = await node.open_stream(server.peer_id, STREAM_PROTOCOL, timeout_s=settings.connect_timeout_s)
        hop = cls(leg, reader, writer, settings)
        try:
            hop._machine.open(Open(model=model, start=leg.start, end=leg.end, batch=batch, max_length=max_length))
            opened = await hop._ask()
            if not isinstance(opened, SessionOpened) or opened.dtype not in DTYPES:
                raise ProtocolError(f"{server.peer_id} answered an open with something else")
            hop._dtype = DTYPES[opened.dtype]
        except BaseException:
            await hop.abandon()
            raise
        return hop

    @property
    def is_alive(self) -> bool:
        return self._failure is None

    async def step(
        self,
        position: int,
        hidden_states: torch.Tensor,
        position_ids: torch.Tensor | None,
        mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor, HopTiming]:
        """Run new positions ``[batch, n, hidden]`` that begin at `position`; returns the same shape and dtype.

        Raises:
            PeerUnreachable: the server died or fell silent; the session must go on elsewhere.
            RemoteError: it refused.
        """
        rows = self.pending_reorder.tolist() if self.pending_reorder is not None else None
        tensors = {"hidden_states": hidden_states.to(self._dtype)}
        if position_ids is not None:
            tensors["position_ids"] = position_ids
        if mask is not None:
            tensors["mask"] = mask
        self._sequence += 1
        begun = time.perf_counter()
        self._machine.step(Step(sequence=self._sequence, position=position, reorder=rows, tensors=[]), tensors)
        output = await self._ask()
        if not isinstance(output, OutputReceived) or output.sequence != self._sequence:
            raise ProtocolError(f"{self.peer_id} answered another step than it was asked")
        if output.hidden_states.shape != hidden_states.shape:
            raise ProtocolError(f"{self.peer_id} answered with a tensor of another shape")
        self.pending_reorder, self.length = None, position + hidden_states.shape[1]
        timing = HopTiming(
            self.peer_id, self.start, self.end, time.perf_counter() - begun, output.queue_s, output.compute_s
        )
        return output.hidden_states.to(hidden_states.dtype), timing

    async def close(self) -> None:
        """End the session politely, so that its cache is freed at once."""
        with contextlib.suppress(OSError):
            self._machine.close()
            self._flush()
        await self.abandon()

    async def abandon(self) -> None:
        """Drop the stream."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._fail(PeerUnreachable(f"the session on {self.peer_id} was closed"))
        self._writer.close()

    async def _ask(self) -> SessionOpened | OutputReceived:
        if self._failure is not None:
            raise self._failure
        self._answer = asyncio.get_running_loop().create_future()
        self._heartbeat.heard(time.monotonic())
        try:
            self._flush()
            return await self._answer
        finally:
            self._answer = None

    def _flush(self) -> None:
        # Backpressure is the answer: a session has one message under way at a time.
        self._writer.writelines(self._machine.take_outgoing())

    async def _read(self) -> None:
        try:
            while data := await self._reader.read(_READ_BYTES):
                self._heartbeat.heard(time.monotonic())
                for event in self._machine.receive_data(data):
                    match event:
                        case SessionOpened() | OutputReceived():
                            if self._answer is not None and not self._answer.done():
                                self._answer.set_result(event)
                        case Refused(error):
                            self._fail(error)
                        case DrainAnnounced():
                            self.draining = True
                        case SessionEnded():
                            return
                self._flush()
        except (OSError, ProtocolError) as error:
            self._fail(PeerUnreachable(f"{self.peer_id} broke off: {error}"))
        finally:
            self._fail(PeerUnreachable(f"{self.peer_id} hung up"))

    async def _watch(self) -> None:
        while self._failure is None:
            await asyncio.sleep(_TICK_S)
            now = time.monotonic()
            self._heartbeat.interval_s = _BUSY_PING_S if self._answer is not None else _IDLE_PING_S
            if self._heartbeat.is_dead(now):
                self._fail(PeerUnreachable(f"{self.peer_id} has been silent for {self._heartbeat.timeout_s:g} s"))
            elif self._heartbeat.should_ask(now):
                self._machine.ping()
                self._flush()

    def _fail(self, error: SwarmError) -> None:
        """Remember why this hop is of no more use (the first reason counts) and tell whoever waits."""
        self._failure = self._failure or error
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(self._failure)
