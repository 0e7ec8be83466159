"""The messages of a session stream, and their checks. Nothing that arrives is trusted before it fits these.

A stream carries one session on one server: both sides say ``Hello``; the client sends ``Open`` and then
``Step`` after ``Step``, each answered by ``Output`` or ``Refusal``; ``Close`` or the end of the stream ends
it. ``Ping`` may come at any time and is answered by ``Pong``.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from swarm.errors import ProtocolError
from swarm.protocol.frames import Buffer, Frame, encode_frame
from swarm.protocol.tensors import TensorHeader, decode_tensors, encode_tensors

PROTOCOL_VERSION = 1
STREAM_PROTOCOL = f"/swarm/session/{PROTOCOL_VERSION}"
"""The libp2p protocol id: peers of another major version do not even open a stream."""

MAX_BATCH = 1024
MAX_POSITIONS = 1 << 24


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")


class Hello(_Message):
    """The first message of either side."""

    type: Literal["hello"] = "hello"
    version: int
    agent: str = Field(max_length=64)
    """Software and version, for people who look for a fault."""


class Open(_Message):
    """The client asks for a session on blocks ``[start, end)``."""

    type: Literal["open"] = "open"
    model: str = Field(max_length=64)
    """The digest that names the model."""
    start: int = Field(ge=0, le=100_000)
    end: int = Field(ge=1, le=100_000)
    batch: int = Field(ge=1, le=MAX_BATCH)
    max_length: int = Field(ge=1, le=MAX_POSITIONS)
    """Positions per sequence to make room for."""


class Opened(_Message):
    """The server has made room."""

    type: Literal["opened"] = "opened"
    dtype: str = Field(max_length=16)
    """The precision in which hidden states are to be sent, and come back."""


class Step(_Message):
    """Run new positions. Tensors: ``hidden_states`` [batch, n, hidden]; optional ``position_ids`` [batch, n] int64
    (default: those that follow) and ``mask`` [batch, n] uint8 (0 where there is padding; default: none)."""

    type: Literal["step"] = "step"
    sequence: int = Field(ge=0)
    """Counts the steps of this stream; a step that comes twice is answered twice and run once."""
    position: int = Field(ge=0, le=MAX_POSITIONS)
    """Where the new positions begin. If the cache is longer, it is rolled back to here first."""
    reorder: Annotated[list[int], Field(max_length=MAX_BATCH)] | None = None
    """Which row of the cache each sequence of this step continues (beams); None: each its own."""
    tensors: list[TensorHeader] = Field(max_length=3)


class Output(_Message):
    """The result of a step. Tensor: ``hidden_states`` [batch, n, hidden]."""

    type: Literal["output"] = "output"
    sequence: int = Field(ge=0)
    queue_s: float
    """Seconds that the step waited for the device."""
    compute_s: float
    """Seconds that the device worked on it."""
    tensors: list[TensorHeader] = Field(max_length=1)


class Refusal(_Message):
    """The server cannot do what was asked; the stream ends unless it answers a ``Step`` that can be repeated."""

    type: Literal["refusal"] = "refusal"
    code: str = Field(max_length=32)
    """A key of :data:`swarm.errors.REMOTE_ERRORS`."""
    reason: str = Field(max_length=2000)
    retry_after_s: float | None = None


class Drain(_Message):
    """The server is leaving: the client should move its session within the time given."""

    type: Literal["drain"] = "drain"
    within_s: float


class Ping(_Message):
    """Are you there?"""

    type: Literal["ping"] = "ping"


class Pong(_Message):
    """I am."""

    type: Literal["pong"] = "pong"


class Close(_Message):
    """The session is over; its cache can be freed."""

    type: Literal["close"] = "close"


Message = Hello | Open | Opened | Step | Output | Refusal | Drain | Ping | Pong | Close

_ANY_MESSAGE: TypeAdapter[Message] = TypeAdapter(Annotated[Message, Field(discriminator="type")])


def encode_message(message: Message, tensors: dict[str, torch.Tensor] | None = None) -> list[Buffer]:
    """The buffers to write for `message`; its ``tensors`` field is filled in here.

    Raises:
        FrameTooLarge: the tensors do not fit in one frame.
    """
    header: dict[str, Any] = message.model_dump(exclude_none=True)
    parts: list[Buffer] = []
    if tensors:
        headers, parts = encode_tensors(tensors)
        header["tensors"] = [one.model_dump() for one in headers]
    return encode_frame(header, parts)


def decode_message(frame: Frame) -> tuple[Message, dict[str, torch.Tensor]]:
    """The message in `frame`, and the tensors that it carries.

    Raises:
        ProtocolError: unknown type, missing or ill-typed field, tensors that do not fit the payload.
    """
    try:
        message = _ANY_MESSAGE.validate_python(frame.header)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "type"
        what = first["msg"] if first["type"] != "union_tag_invalid" else "unknown type"  # that text repeats the input
        raise ProtocolError(f"malformed message: {where}: {what}") from None
    return message, decode_tensors(getattr(message, "tensors", []), frame.payload)
