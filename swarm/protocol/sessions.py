"""The two ends of a session stream as state machines: bytes in, events out.

Neither has a socket, a clock or a source of randomness. Whoever owns one feeds it the bytes that arrive,
acts on the events it returns, and writes what :meth:`take_outgoing` hands over.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

import torch

from swarm import __version__
from swarm.errors import REMOTE_ERRORS, ProtocolError, RemoteError
from swarm.protocol.frames import Buffer, FrameDecoder
from swarm.protocol.messages import (
    PROTOCOL_VERSION,
    Close,
    Drain,
    Hello,
    Message,
    Open,
    Opened,
    Output,
    Ping,
    Pong,
    Refusal,
    Step,
    decode_message,
    encode_message,
)
from swarm.protocol.tensors import dtype_name

_HELLO = Hello(version=PROTOCOL_VERSION, agent=f"swarm/{__version__}")


class _State(Enum):
    GREETING = auto()
    GREETED = auto()
    OPENING = auto()
    OPEN = auto()
    CLOSED = auto()


@dataclass(frozen=True)
class OpenRequested:
    """(server) A client asks for a session: answer with ``accept`` or ``refuse``."""

    request: Open


@dataclass(frozen=True)
class StepRequested:
    """(server) Run this step, then call ``send_output``."""

    step: Step
    hidden_states: torch.Tensor
    position_ids: torch.Tensor | None
    mask: torch.Tensor | None


@dataclass(frozen=True)
class SessionOpened:
    """(client) The server made room; hidden states travel as `dtype`."""

    dtype: str


@dataclass(frozen=True)
class OutputReceived:
    """(client) The result of step `sequence`."""

    sequence: int
    hidden_states: torch.Tensor
    queue_s: float
    compute_s: float


@dataclass(frozen=True)
class Refused:
    """(client) The server refused; `error` is ready to be raised."""

    error: RemoteError
    retry_after_s: float | None


@dataclass(frozen=True)
class DrainAnnounced:
    """(client) The server leaves in `within_s` seconds."""

    within_s: float


@dataclass(frozen=True)
class SessionEnded:
    """The other side closed the session."""


ServerEvent = OpenRequested | StepRequested | SessionEnded
ClientEvent = SessionOpened | OutputReceived | Refused | DrainAnnounced | SessionEnded


class _Wire:
    """Frames in and out, greetings, pings: what both ends do alike."""

    def __init__(self) -> None:
        self._decoder = FrameDecoder()
        self._outgoing: list[Buffer] = []

    def send(self, message: Message, tensors: dict[str, torch.Tensor] | None = None) -> None:
        self._outgoing += encode_message(message, tensors)

    def send_again(self, encoded: list[Buffer]) -> None:
        """Queue a message that was encoded before."""
        self._outgoing += encoded

    def take_outgoing(self) -> list[Buffer]:
        outgoing, self._outgoing = self._outgoing, []
        return outgoing

    def receive(self, data: Buffer) -> list[tuple[Message, dict[str, torch.Tensor]]]:
        """The messages in `data` that are not pings or pongs; pings are answered."""
        messages: list[tuple[Message, dict[str, torch.Tensor]]] = []
        for frame in self._decoder.feed(data):
            message, tensors = decode_message(frame)
            if isinstance(message, Ping):
                self.send(Pong())
            elif not isinstance(message, Pong):
                messages.append((message, tensors))
        return messages


class ServerSession:
    """The server's end of one session stream."""

    def __init__(self, hidden_size: int) -> None:
        self._wire = _Wire()
        self._state = _State.GREETING
        self._hidden_size = hidden_size
        self._dtype = ""
        self._batch = 0
        self._length = 0
        self._running: int | None = None
        self._last_output: tuple[int, list[Buffer]] | None = None
        self._output_queued = False

    def receive_data(self, data: Buffer) -> list[ServerEvent]:
        """Take the bytes that arrived.

        Raises:
            ProtocolError: the client broke the protocol: close the stream.
        """
        events: list[ServerEvent] = []
        for message, tensors in self._wire.receive(data):
            event = self._handle(message, tensors)
            if event is not None:
                events.append(event)
        return events

    def take_outgoing(self) -> list[Buffer]:
        """The buffers to write now."""
        self._output_queued = False
        return self._wire.take_outgoing()

    def accept(self, dtype: str) -> None:
        """Answer an :class:`OpenRequested`: there is room, and hidden states travel as `dtype`."""
        self._dtype, self._state = dtype, _State.OPEN
        self._wire.send(Opened(dtype=dtype))

    def refuse(self, error: RemoteError, retry_after_s: float | None = None) -> None:
        """Answer whatever was asked with a reason why not."""
        self._running = None
        self._wire.send(Refusal(code=error.code, reason=str(error)[:2000], retry_after_s=retry_after_s))

    def send_output(self, step: Step, hidden_states: torch.Tensor, queue_s: float, compute_s: float) -> None:
        """Answer a :class:`StepRequested` with its result ``[batch, n, hidden]``."""
        output = Output(sequence=step.sequence, queue_s=queue_s, compute_s=compute_s, tensors=[])
        buffers = encode_message(output, {"hidden_states": hidden_states})
        self._batch, self._length = hidden_states.shape[0], step.position + hidden_states.shape[1]
        self._running, self._last_output, self._output_queued = None, (step.sequence, buffers), False
        self._queue_last_output()

    def announce_drain(self, within_s: float) -> None:
        """Tell the client that this server is leaving."""
        if self._state is _State.OPEN:
            self._wire.send(Drain(within_s=within_s))

    def ping(self) -> None:
        """Ask for a sign of life."""
        self._wire.send(Ping())

    def _handle(self, message: Message, tensors: dict[str, torch.Tensor]) -> ServerEvent | None:
        match message, self._state:
            case Hello(), _State.GREETING:
                _check_version(message)
                self._state = _State.GREETED
                self._wire.send(_HELLO)
                return None
            case Open(), _State.GREETED:
                self._state, self._batch = _State.OPENING, message.batch
                return OpenRequested(message)
            case Step(), _State.OPEN:
                return self._handle_step(message, tensors)
            case Close(), _:
                self._state = _State.CLOSED
                return SessionEnded()
            case _:
                raise ProtocolError(f"unexpected message {message.type!r} while {self._state.name.lower()}")

    def _handle_step(self, step: Step, tensors: dict[str, torch.Tensor]) -> StepRequested | None:
        if self._last_output is not None and step.sequence == self._last_output[0]:
            self._queue_last_output()
            return None
        if step.sequence == self._running:
            return None
        if self._running is not None:
            raise ProtocolError(f"step {step.sequence} was sent before step {self._running} was answered")
        hidden_states = tensors.get("hidden_states")
        if hidden_states is None or hidden_states.dim() != 3 or hidden_states.shape[2] != self._hidden_size:
            raise ProtocolError(f"a step must carry hidden_states [batch, positions, {self._hidden_size}]")
        batch, count, _ = hidden_states.shape
        rows = self._batch if step.reorder is None else len(step.reorder)
        if batch != rows or batch == 0 or count == 0:
            raise ProtocolError(f"a step carries {batch} sequences of {count} positions; the session has {rows}")
        if step.reorder is not None and not all(0 <= row < self._batch for row in step.reorder):
            raise ProtocolError(f"a step reorders rows that do not exist (there are {self._batch})")
        if step.position > self._length:
            raise ProtocolError(f"a step begins at position {step.position}; the cache ends at {self._length}")
        if not hidden_states.is_floating_point():
            raise ProtocolError("a step's hidden_states are not floating-point numbers")
        for name, dtype in (("position_ids", torch.int64), ("mask", torch.uint8)):
            if name in tensors and (tuple(tensors[name].shape) != (batch, count) or tensors[name].dtype != dtype):
                raise ProtocolError(f"a step's {name} must be [{batch}, {count}] {dtype_name(dtype)}")
        self._running = step.sequence
        return StepRequested(step, hidden_states, tensors.get("position_ids"), tensors.get("mask"))

    def _queue_last_output(self) -> None:
        # Once per writing: who repeats a small step a thousand times must not make us queue a thousand large answers.
        if self._last_output is not None and not self._output_queued:
            self._wire.send_again(self._last_output[1])
            self._output_queued = True


class ClientSession:
    """The client's end of one session stream."""

    def __init__(self) -> None:
        self._wire = _Wire()
        self._state = _State.GREETING
        self._wire.send(_HELLO)

    def receive_data(self, data: Buffer) -> list[ClientEvent]:
        """Take the bytes that arrived.

        Raises:
            ProtocolError: the server broke the protocol: close the stream.
        """
        events: list[ClientEvent] = []
        for message, tensors in self._wire.receive(data):
            event = self._handle(message, tensors)
            if event is not None:
                events.append(event)
        return events

    def take_outgoing(self) -> list[Buffer]:
        """The buffers to write now."""
        return self._wire.take_outgoing()

    def open(self, request: Open) -> None:
        """Ask for a session; answered by :class:`SessionOpened` or :class:`Refused`."""
        self._wire.send(request)

    def step(self, step: Step, tensors: dict[str, torch.Tensor]) -> None:
        """Send a step; answered by :class:`OutputReceived` or :class:`Refused`."""
        self._wire.send(step, tensors)

    def ping(self) -> None:
        """Ask for a sign of life."""
        self._wire.send(Ping())

    def close(self) -> None:
        """Say that the session is over."""
        self._wire.send(Close())

    def _handle(self, message: Message, tensors: dict[str, torch.Tensor]) -> ClientEvent | None:
        match message, self._state:
            case Hello(), _State.GREETING:
                _check_version(message)
                self._state = _State.GREETED
                return None
            case Opened(), _State.GREETED:
                self._state = _State.OPEN
                return SessionOpened(message.dtype)
            case Output(), _State.OPEN:
                if "hidden_states" not in tensors:
                    raise ProtocolError("an output carries no hidden_states")
                return OutputReceived(message.sequence, tensors["hidden_states"], message.queue_s, message.compute_s)
            case Refusal(), _:
                error = REMOTE_ERRORS.get(message.code, RemoteError)(message.reason)
                return Refused(error, message.retry_after_s)
            case Drain(), _:
                return DrainAnnounced(message.within_s)
            case Close(), _:
                self._state = _State.CLOSED
                return SessionEnded()
            case _:
                raise ProtocolError(f"unexpected message {message.type!r} while {self._state.name.lower()}")


def _check_version(hello: Hello) -> None:
    if hello.version != PROTOCOL_VERSION:
        older = "the peer" if hello.version < PROTOCOL_VERSION else "this side"
        raise ProtocolError(
            f"the peer ({hello.agent!r}) speaks version {hello.version} of the protocol, this side version "
            f"{PROTOCOL_VERSION}: {older} must be updated"
        )
