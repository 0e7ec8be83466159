"""The messages of Swarm's streams, and their checks. Nothing that arrives is trusted before it fits these.

A client opens a *session stream* to every server of its route: both sides say ``Hello``, the client sends ``Open``,
and the stream's life is the session's. By ``Link`` the client tells a server who its successor is; the
server dials it and opens a *link stream* (``Hello``, ``Attach``), over which it then sends on what it has computed.
So a ``Step`` goes client → S1 → … → Sn, and the last one answers the client with ``Output``. A server without a
successor answers the client instead (star mode), who relays. ``Replay`` brings a fresh server to the session's state.
Where a session begins as another did, the server is asked by name whether it knows the beginning (``Open.prefix``,
``Attach.prefix``), and ``Recall`` stands for what then need not be sent.
``Ping`` may come at any time and is answered by ``Pong``.

Servers that run mixture-of-experts blocks open an *expert stream* to every server of experts: ``Hello``,
``OpenExperts``, and then ``ComputeExperts`` for every block and step, answered by ``ExpertOutputs`` in any order.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from swarm.errors import ProtocolError
from swarm.page_names import NAME_BYTES, PAGE
from swarm.protocol.codec import CODECS
from swarm.protocol.frames import Buffer, Frame, encode_frame
from swarm.protocol.tensors import TensorHeader, decode_tensors, encode_tensors

PROTOCOL_VERSION = 2
STREAM_PROTOCOL = f"/swarm/session/{PROTOCOL_VERSION}"
"""The libp2p protocol id: peers of another major version do not even open a stream."""
LINK_PROTOCOL = f"/swarm/link/{PROTOCOL_VERSION}"
"""Likewise for streams from a server to its successor."""
EXPERTS_PROTOCOL = f"/swarm/experts/{PROTOCOL_VERSION}"
"""Likewise for streams to servers of experts."""

MAX_BATCH = 1024
MAX_POSITIONS = 1 << 24
MAX_STEP_POSITIONS = 2048
"""Of one step or replay, over all sequences: what a server must be able to compute at once."""
MAX_EXPERT_CALLS = 64
"""Under way on one expert stream."""
MAX_BLOCKS = 100_000
MAX_HOPS = 256
"""Servers that a step may pass."""
MAX_PREFIX = 1024
"""Pages that can be asked for by name."""

Seconds = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]
SessionToken = Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
"""Chosen by the client at random; who knows it may attach to the session."""


PageNames = Annotated[
    list[Annotated[bytes, Field(min_length=NAME_BYTES, max_length=NAME_BYTES)]], Field(max_length=MAX_PREFIX)
]
"""Of the pages that a session begins with (:mod:`swarm.page_names`)."""


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else " " for character in text)


def _known_codec(name: str) -> str:
    if name not in CODECS:
        raise ValueError(f"none of {', '.join(CODECS)}")
    return name


Codec = Annotated[str, AfterValidator(_known_codec)]
"""How hidden states are sent on (:mod:`swarm.protocol.codec`)."""


Reason = Annotated[str, Field(max_length=2000), AfterValidator(_printable)]
"""Text of a stranger for a person to read: no control characters, which could play with a terminal."""


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")


class Hello(_Message):
    """The first message of either side."""

    type: Literal["hello"] = "hello"
    version: int
    agent: str = Field(max_length=64)
    """Software and version, for people who look for a fault."""


class Open(_Message):
    """(client → server) Make room for a session on blocks ``[start, end)``."""

    type: Literal["open"] = "open"
    session: SessionToken
    model: str = Field(max_length=64)
    """The digest that names the model."""
    start: int = Field(ge=0, le=MAX_BLOCKS)
    end: int = Field(ge=1, le=MAX_BLOCKS)
    batch: int = Field(ge=1, le=MAX_BATCH)
    max_length: int = Field(ge=1, le=MAX_POSITIONS)
    """Positions per sequence to make room for."""
    standby: bool = False
    """Compute when idle, and send nothing until ``TakeOver``."""
    codec: Codec | None = None
    """How to send hidden states on; None: losslessly."""
    allow_degraded: bool = False
    """Rather leave out experts that nobody hosts than wait for them."""
    is_last: bool = False
    """These are the last blocks: results go to nobody but the client."""
    prefix: PageNames = []
    """What will come first. How much of it do you know?"""


class Opened(_Message):
    """(server → client) There is room."""

    type: Literal["opened"] = "opened"
    dtype: str = Field(max_length=16)
    """The precision in which hidden states are to be sent, and come back."""
    known: int = Field(default=0, ge=0, le=MAX_PREFIX)
    """So many pages of the prefix are known: they can be recalled."""


class Link(_Message):
    """(client → server) Send on what you compute to another server, or (no `peer_id`) to me."""

    type: Literal["link"] = "link"
    link: int = Field(ge=1)
    """The client's number for this link; newer links have higher ones."""
    peer_id: str | None = Field(default=None, max_length=128)
    addresses: list[Annotated[str, Field(max_length=256)]] = Field(default=[], max_length=8)
    session: SessionToken | None = None
    """The successor's session."""
    standby: bool = False
    """Not instead of the present successor, but besides."""
    fresh: bool = False
    """(without `peer_id`) the successor knows nothing yet: send me what it must be told."""


class Promote(_Message):
    """(client → server) The standby link `link` replaces the present one."""

    type: Literal["promote"] = "promote"
    link: int = Field(ge=1)


class Linked(_Message):
    """(server → client) The link stands."""

    type: Literal["linked"] = "linked"
    link: int = Field(ge=1)


class LinkLost(_Message):
    """(server → client) The successor could not be dialled, hung up, or fell silent."""

    type: Literal["link_lost"] = "link_lost"
    link: int = Field(ge=1)
    reason: Reason


class Attach(_Message):
    """(server → successor) I am the predecessor in this session."""

    type: Literal["attach"] = "attach"
    session: SessionToken
    prefix: PageNames = []
    """As in ``Open``."""


class Attached(_Message):
    """(successor → server) Welcome."""

    type: Literal["attached"] = "attached"
    fresh: bool
    """Send the session's whole state first: nothing has come yet."""
    known: int = Field(default=0, ge=0, le=MAX_PREFIX)
    """As in ``Opened``."""
    accepted: int | None = Field(default=None, ge=0)
    """(not fresh) The last step that it has from others: it has missed what comes after."""


class TakeOver(_Message):
    """(client → standby) You are no standby any more: send on what you compute."""

    type: Literal["take_over"] = "take_over"
    delivered: int = Field(ge=0)
    """The last step that needs no sending on."""


class HopTime(_Message):
    """Where the time of a step went on one server."""

    start: int = Field(ge=0, le=MAX_BLOCKS)
    end: int = Field(ge=1, le=MAX_BLOCKS)
    queue_s: Seconds
    """Waited for the device."""
    compute_s: Seconds
    """The device worked on it."""
    experts_s: Seconds = 0.0
    """Of that: it waited for servers of experts."""
    together: int = Field(default=1, ge=1, le=MAX_POSITIONS)
    """The sessions that it worked on in that time, this one included."""
    link_s: Seconds | None = None
    """From here to the successor, one way, as the link's pings showed it (0: none came back yet); None: through the
    client."""
    codec: Codec | None = None
    """How the result was sent on; None: losslessly."""
    degraded: bool = False
    """Experts were left out, in this step or an earlier one: the result is not the model's."""


class Step(_Message):
    """(client or predecessor → server) Run new positions. Tensors: ``hidden_states`` [batch, n, hidden]; optional
    ``position_ids`` [batch, n] int64 (default: those that follow) and ``mask`` [batch, n] uint8 (0 where there is
    padding; default: none)."""

    type: Literal["step"] = "step"
    sequence: int = Field(ge=1)
    """Counts the steps of the session; one that comes twice is run once and its result sent on twice."""
    position: int = Field(ge=0, le=MAX_POSITIONS)
    """Where the new positions begin. If the cache is longer, it is rolled back to here first."""
    reorder: Annotated[list[int], Field(max_length=MAX_BATCH)] | None = None
    """Which row of the cache each sequence of this step continues (beams); None: each its own."""
    wanted: int | None = Field(default=None, ge=0, le=MAX_POSITIONS)
    """The client needs what the last blocks make of the last so many positions only; None: of all."""
    hops: list[HopTime] = Field(default=[], max_length=MAX_HOPS)
    """The servers that it has passed."""
    tensors: list[TensorHeader] = Field(max_length=4)


class Replay(_Message):
    """(to a fresh server) Part of what the session has seen so far. Tensors as in ``Step``."""

    type: Literal["replay"] = "replay"
    sequence: int = Field(ge=0)
    """The last step that the state includes."""
    position: int = Field(ge=0, le=MAX_POSITIONS)
    last: bool
    """Nothing more is to come."""
    link: int = Field(default=0, ge=0)
    """(server → client) for the successor on this link."""
    tensors: list[TensorHeader] = Field(max_length=4)


class Recall(_Message):
    """(to a fresh server) The session begins with pages that you said you know. Like a ``Replay``, without tensors."""

    type: Literal["recall"] = "recall"
    sequence: int = Field(ge=0)
    """As in ``Replay``."""
    positions: int = Field(ge=PAGE, le=MAX_PREFIX * PAGE, multiple_of=PAGE)
    last: bool
    """Nothing more is to come."""


class Replayed(_Message):
    """(server → client) The replay is over: this server's state is that after step `sequence`. A standby that has
    been there from the first step on says so after that one."""

    type: Literal["replayed"] = "replayed"
    sequence: int = Field(ge=0)


class Output(_Message):
    """(server → client) The result of a step, or of its last positions, if the client wants only these. Tensor:
    ``hidden_states`` [batch, n, hidden]."""

    type: Literal["output"] = "output"
    sequence: int = Field(ge=1)
    hops: list[HopTime] = Field(max_length=MAX_HOPS)
    tensors: list[TensorHeader] = Field(max_length=4)


class OpenExperts(_Message):
    """(server → server of experts) Be ready to compute experts of a model."""

    type: Literal["open_experts"] = "open_experts"
    model: str = Field(pattern="^[0-9a-f]{64}$")


class ExpertsOpened(_Message):
    """(server of experts → server) I am."""

    type: Literal["experts_opened"] = "experts_opened"
    dtype: str = Field(max_length=16)
    """The precision in which hidden states are to be sent, and come back."""


class ComputeExperts(_Message):
    """(server → server of experts) Compute experts of one block. Tensors: ``hidden_states`` [tokens, hidden];
    ``tokens`` [n] int64, rows of these; ``experts`` [n] int64, what to compute for each."""

    type: Literal["compute_experts"] = "compute_experts"
    call: int = Field(ge=1)
    """Counts the calls on this stream."""
    block: int = Field(ge=0, le=MAX_BLOCKS)
    tensors: list[TensorHeader] = Field(max_length=3)


class ExpertOutputs(_Message):
    """(server of experts → server) The result of a call. Tensor: ``outputs`` [n, hidden], not weighted."""

    type: Literal["expert_outputs"] = "expert_outputs"
    call: int = Field(ge=1)
    queue_s: Seconds
    """Waited for the device."""
    compute_s: Seconds
    tensors: list[TensorHeader] = Field(max_length=1)


class Refusal(_Message):
    """(server → client) What was asked cannot be done; the session on this server, or the stream, is over."""

    type: Literal["refusal"] = "refusal"
    code: str = Field(max_length=32)
    """A key of :data:`swarm.errors.REMOTE_ERRORS`."""
    reason: Reason
    retry_after_s: Seconds | None = None


class Drain(_Message):
    """(server → client) I am leaving: move the session within the time given."""

    type: Literal["drain"] = "drain"
    within_s: Seconds


class Ping(_Message):
    """Are you there?"""

    type: Literal["ping"] = "ping"


class Pong(_Message):
    """I am."""

    type: Literal["pong"] = "pong"


class Close(_Message):
    """(client → server) The session is over; its cache can be freed."""

    type: Literal["close"] = "close"


Message = (
    Hello | Open | Opened | Link | Promote | Linked | LinkLost | Attach | Attached | TakeOver
    | Step | Replay | Recall | Replayed | Output | Refusal | Drain | Ping | Pong | Close
    | OpenExperts | ExpertsOpened | ComputeExperts | ExpertOutputs
)  # fmt: skip

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
