"""A stream that we opened to a peer: dialled, kept under watch, and given up when the peer falls silent."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence

import torch

from swarm.errors import PeerUnreachable, SwarmError, first_of
from swarm.protocol.messages import Message, Ping, Pong
from swarm.protocol.wire import Wire
from swarm.transport.heartbeat import Heartbeat
from swarm.transport.node import Node
from swarm.transport.outgoing import write

_READ_BYTES = 256 * 1024
_TICK_S = 0.25
_BUSY_PING_S = 0.5
_IDLE_PING_S = 10.0
_BUSY_FOR_S = 5.0

OnMessage = Callable[[Message, dict[str, torch.Tensor]], None]


class WatchedStream:
    """Speaks Swarm's frames over a raw libp2p stream; :meth:`run` it for as long as it is wanted.

    Attributes:
        expecting: something is expected from the peer: watch closely, as for a while after anything was sent.
    """

    def __init__(
        self,
        node: Node,
        peer_id: str,
        addresses: Sequence[str],
        protocol: str,
        *,
        peer_timeout_s: float = 2.0,
        connect_timeout_s: float = 5.0,
    ) -> None:
        """
        Args:
            peer_timeout_s: give the peer up when a ping has gone unanswered for so long (and some round trips).
        """
        self.peer_id = peer_id
        self.expecting = False
        self._node, self._addresses, self._protocol = node, addresses, protocol
        self._connect_timeout_s = connect_timeout_s
        self._wire = Wire()
        self._writer: asyncio.StreamWriter | None = None
        self._heartbeat = Heartbeat(_BUSY_PING_S, peer_timeout_s)
        self._last_sent = self._last_ping = time.monotonic()

    @property
    def one_way_s(self) -> float | None:
        """How long a message takes to the peer, as the last pings showed it."""
        round_trip_s = self._heartbeat.round_trip_s
        return round_trip_s / 2 if round_trip_s is not None else None

    def send(self, message: Message, tensors: dict[str, torch.Tensor] | None = None) -> None:
        """Send a message; what is sent before the stream stands waits for that."""
        self._last_sent = time.monotonic()
        self._wire.send(message, tensors)
        self._flush()

    async def run(self, on_message: OnMessage) -> None:
        """Dial, and hand over what the peer says (but for pongs). Ends only by raising, or cancelled.

        Raises:
            PeerUnreachable: the peer cannot be dialled, hung up, or fell silent.
            SwarmError: the peer spoke nonsense, or `on_message` raised it.
        """
        timeout_s = self._connect_timeout_s
        await self._node.connect(self.peer_id, self._addresses, timeout_s=timeout_s)
        reader, writer = await self._node.open_stream(self.peer_id, self._protocol, timeout_s=timeout_s)
        self._writer = writer
        try:
            self._ping(time.monotonic())
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._watch())
                tasks.create_task(self._read(reader, on_message))
        except* SwarmError as errors:
            raise first_of(errors) from None
        except* OSError as errors:
            raise PeerUnreachable(f"{self.peer_id} broke off: {errors.exceptions[0]}") from None
        finally:
            self._writer = None
            writer.close()

    async def _read(self, reader: asyncio.StreamReader, on_message: OnMessage) -> None:
        while data := await reader.read(_READ_BYTES):
            received = self._wire.receive(data)
            now = time.monotonic()
            if any(isinstance(message, Pong) for message, _ in received):
                self._heartbeat.answered(now)
            self._heartbeat.heard(now)
            self._flush()
            for message, tensors in received:
                if not isinstance(message, Pong):
                    on_message(message, tensors)
        raise PeerUnreachable(f"{self.peer_id} hung up")

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            now = time.monotonic()
            busy = self.expecting or now - self._last_sent < _BUSY_FOR_S
            self._heartbeat.interval_s = _BUSY_PING_S if busy else _IDLE_PING_S
            if self._heartbeat.is_dead(now):
                raise PeerUnreachable(f"{self.peer_id} has been silent for {self._heartbeat.timeout_s:g} s")
            # Whoever only listens would be taken for gone by the peer.
            was_mute = now - max(self._last_sent, self._last_ping) >= _IDLE_PING_S
            if self._heartbeat.should_ask(now) or was_mute:
                self._ping(now)

    def _ping(self, now: float) -> None:
        self._last_ping = now
        self._heartbeat.asked(now)
        self._wire.send(Ping())
        self._flush()

    def _flush(self) -> None:
        # A session has only so much under way: that is the limit on what is buffered here.
        if self._writer is not None:
            with contextlib.suppress(OSError):  # the reader notices
                write(self._writer, self._wire.take_outgoing())
