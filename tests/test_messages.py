"""Messages and tensors arrive as they were sent; what does not fit its description is refused, by name."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.errors import FrameTooLarge, ProtocolError
from swarm.protocol.frames import MAX_PAYLOAD_BYTES, Buffer, Frame, FrameDecoder
from swarm.protocol.messages import (
    MAX_BATCH,
    MAX_HOPS,
    MAX_POSITIONS,
    Attach,
    Attached,
    Close,
    ComputeExperts,
    Drain,
    ExpertOutputs,
    ExpertsOpened,
    Hello,
    HopTime,
    Link,
    Linked,
    LinkLost,
    Message,
    Open,
    Opened,
    OpenExperts,
    Output,
    Ping,
    Pong,
    Promote,
    Recall,
    Refusal,
    Replay,
    Replayed,
    Step,
    TakeOver,
    decode_message,
    encode_message,
)
from swarm.protocol.tensors import DTYPES, TensorHeader, decode_tensors, dtype_name, encode_tensors

quick = settings(deadline=None, max_examples=150)

TOKEN = "0123456789abcdef" * 2
OPEN = Open(session=TOKEN, model="ab" * 32, start=3, end=7, batch=2, max_length=100)
HOP = HopTime(start=0, end=3, queue_s=0.25, compute_s=0.5, link_s=0.125, codec="int8")
STEP = Step(sequence=4, position=9, reorder=[1, 0], hops=[HOP], tensors=[])
REPLAY = Replay(sequence=4, position=9, last=True, link=2, tensors=[])
OUTPUT = Output(sequence=4, hops=[HOP], tensors=[])
LINK = Link(link=3, peer_id="12D3KooW", addresses=["/ip4/127.0.0.1/tcp/9"], session=TOKEN, standby=True)
MESSAGES: list[Message] = [
    Hello(version=1, agent="swarm/1.0"),
    OPEN,
    OPEN.model_copy(update={"standby": True, "codec": "int8"}),
    OPEN.model_copy(update={"prefix": [b"n" * 32, b"m" * 32]}),
    Opened(dtype="bfloat16"),
    Opened(dtype="bfloat16", known=2),
    LINK,
    Link(link=1, fresh=True),
    Promote(link=3),
    Linked(link=3),
    LinkLost(link=3, reason="it hung up"),
    Attach(session=TOKEN),
    Attach(session=TOKEN, prefix=[b"n" * 32]),
    Attached(fresh=True, known=1),
    TakeOver(delivered=0),
    STEP,
    Step(sequence=4, position=9, tensors=[]),
    REPLAY,
    Recall(sequence=4, positions=32, last=True),
    Replayed(sequence=0),
    OUTPUT,
    OPEN.model_copy(update={"allow_degraded": True}),
    Output(sequence=4, hops=[HOP.model_copy(update={"degraded": True})], tensors=[]),
    OpenExperts(model="ab" * 32),
    ExpertsOpened(dtype="float32"),
    ComputeExperts(call=1, block=3, tensors=[]),
    ExpertOutputs(call=1, queue_s=0.25, compute_s=0.5, tensors=[]),
    Refusal(code="cache_full", reason="no room", retry_after_s=5.0),
    Refusal(code="draining", reason="bye"),
    Drain(within_s=10.0),
    Ping(),
    Pong(),
    Close(),
]
TYPES = sorted({message.type for message in MESSAGES})
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=10)
    | st.binary(max_size=10),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=15,
)
SHAPES = st.lists(st.integers(0, 4), max_size=4)


def frame_of(buffers: list[Buffer]) -> Frame:
    (frame,) = FrameDecoder().feed(b"".join(bytes(buffer) for buffer in buffers))
    return frame


def arrived(
    message: Message, tensors: dict[str, torch.Tensor] | None = None
) -> tuple[Message, dict[str, torch.Tensor]]:
    return decode_message(frame_of(encode_message(message, tensors)))


def payload_of(parts: list[Buffer]) -> bytearray:
    return bytearray(b"".join(bytes(part) for part in parts))


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def random_bits(dtype: torch.dtype, shape: list[int], seed: int) -> torch.Tensor:
    """Any bits at all, NaNs and denormals included."""
    generator = torch.Generator().manual_seed(seed)
    count = math.prod(shape) * dtype.itemsize
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator).view(dtype).reshape(shape)


@given(st.lists(st.tuples(st.sampled_from(list(DTYPES)), SHAPES), max_size=4), st.integers(0, 2**32))
@quick
def test_tensors_arrive_bit_for_bit_whatever_their_types_and_shapes(
    kinds: list[tuple[str, list[int]]], seed: int
) -> None:
    sent = {str(index): random_bits(DTYPES[name], shape, seed + index) for index, (name, shape) in enumerate(kinds)}
    headers, parts = encode_tensors(sent)
    received = decode_tensors(headers, payload_of(parts))
    assert list(received) == list(sent)
    for name, tensor in sent.items():
        assert (received[name].dtype, received[name].shape) == (tensor.dtype, tensor.shape)
        assert bits(received[name]) == bits(tensor)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", [[], [0], [5], [0, 3], [3, 0], [2, 3], [1, 2, 3], [2, 3, 4], [2, 1, 2, 2]], ids=str)
def test_every_type_travels_in_every_number_of_dimensions(dtype: torch.dtype, shape: list[int]) -> None:
    tensor = random_bits(dtype, shape, seed=1)
    _, received = arrived(STEP, {"hidden_states": tensor})
    assert (received["hidden_states"].dtype, list(received["hidden_states"].shape)) == (dtype, shape)
    assert bits(received["hidden_states"]) == bits(tensor)


def test_transposed_and_strided_tensors_arrive_as_they_look() -> None:
    whole = torch.arange(24.0).reshape(2, 3, 4)
    sent = {"a": whole.transpose(0, 2), "b": whole[:, ::2, 1:], "c": whole[0].expand(2, 3, 4)}
    headers, parts = encode_tensors(sent)
    received = decode_tensors(headers, payload_of(parts))
    assert all(torch.equal(received[name], tensor) for name, tensor in sent.items())


def test_a_tensor_behind_an_odd_number_of_bytes_can_be_computed_with() -> None:
    headers, parts = encode_tensors({"odd": torch.ones(3, dtype=torch.uint8), "numbers": torch.arange(1000.0)})
    received = decode_tensors(headers, payload_of(parts))["numbers"]
    assert torch.equal(received * 2, torch.arange(1000.0) * 2)


def test_types_that_do_not_travel_are_refused_by_the_sender() -> None:
    with pytest.raises(ValueError, match="float64 tensors cannot be sent"):
        encode_tensors({"x": torch.zeros(1, dtype=torch.float64)})
    assert [DTYPES[dtype_name(dtype)] for dtype in DTYPES.values()] == list(DTYPES.values())


@pytest.mark.parametrize("missing", [-1, 1, 4])
def test_a_payload_of_another_length_than_its_tensors_is_refused(missing: int) -> None:
    header = TensorHeader(name="x", dtype="float32", shape=[2, 3])
    with pytest.raises(ProtocolError, match="longer than its frame" if missing > 0 else "belong to no tensor"):
        decode_tensors([header], bytearray(24 - missing))


@pytest.mark.parametrize(
    "shape",
    [
        [-1],
        [-2, -3],
        [-2, -4],  # as many numbers as there are bytes
        [0, -1],
        [2**40, 2**40],
        [2**63],
        [2**64 - 1] * 4,
        [0, 2**63],
        [2**64 - 1, 0],
        [0, 2**40, 2**40],
        [0, 2**26, 2**26, 2**26],
        [MAX_PAYLOAD_BYTES, 0, 2],
    ],
    ids=str,
)
def test_an_impossible_shape_is_refused_though_it_be_empty(shape: list[int]) -> None:
    header = TensorHeader(name="states", dtype="uint8", shape=shape)
    with pytest.raises(ProtocolError, match="'states'"):
        decode_tensors([header], bytearray(8))


@given(st.lists(st.integers(-2, 2**64 - 1) | st.integers(-1, 9), max_size=4), st.binary(max_size=64))
@quick
def test_no_shape_does_more_than_a_protocol_error(shape: list[int], payload: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        decode_tensors([TensorHeader(name="x", dtype="uint8", shape=shape)], bytearray(payload))


@pytest.mark.parametrize("dtype", ["complex64", "float64", "bool", "torch.float32", ""])
def test_an_unknown_type_of_tensor_is_refused(dtype: str) -> None:
    with pytest.raises(ProtocolError, match=f"unknown type '{dtype}'"):
        decode_tensors([TensorHeader(name="x", dtype=dtype, shape=[1])], bytearray(8))


def test_two_tensors_of_one_name_are_refused() -> None:
    header = TensorHeader(name="x", dtype="uint8", shape=[1])
    with pytest.raises(ProtocolError, match="'x' twice"):
        decode_tensors([header, header], bytearray(2))


@pytest.mark.parametrize("message", MESSAGES, ids=repr)
def test_every_message_arrives_as_it_was_sent(message: Message) -> None:
    assert arrived(message) == (message, {})


@pytest.mark.parametrize("message", [STEP, REPLAY, OUTPUT], ids=lambda message: message.type)
def test_a_message_brings_its_tensors(message: Message) -> None:
    states = torch.rand(2, 3, 4)
    received, tensors = arrived(message, {"hidden_states": states})
    assert received.model_copy(update={"tensors": []}) == message
    assert torch.equal(tensors["hidden_states"], states)


def test_a_message_of_a_later_version_may_have_further_fields() -> None:
    assert decode_message(Frame({"type": "ping", "colour": "blue"}, bytearray())) == (Ping(), {})


def test_tensors_too_large_for_a_frame_are_refused_by_the_sender() -> None:
    with pytest.raises(FrameTooLarge):
        encode_message(STEP, {"hidden_states": torch.empty(MAX_PAYLOAD_BYTES + 1, dtype=torch.uint8)})


def test_a_message_without_tensors_has_no_payload() -> None:
    with pytest.raises(ProtocolError, match="belong to no tensor"):
        decode_message(Frame({"type": "ping"}, bytearray(1)))


@pytest.mark.parametrize("header", [{}, {"type": "gossip"}, {"type": 7}, {"type": None}, {"type": ["hello"]}])
def test_a_message_of_no_known_type_is_refused(header: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError, match="malformed message: type"):
        decode_message(Frame(header, bytearray()))


def test_what_a_peer_sent_does_not_flood_the_log() -> None:
    with pytest.raises(ProtocolError) as caught:
        decode_message(Frame({"type": "x\n" * 30_000}, bytearray()))
    assert len(str(caught.value)) < 300 and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (message, field)
        for message in MESSAGES
        for field, info in type(message).model_fields.items()
        if info.is_required()
    ],
)
def test_a_missing_field_is_refused_by_name(message: Message, field: str) -> None:
    header = {name: value for name, value in message.model_dump().items() if name != field}
    with pytest.raises(ProtocolError, match=rf"{message.type}\.{field}: Field required"):
        decode_message(Frame(header, bytearray()))


@pytest.mark.parametrize(
    ("message", "field", "value"),
    [
        (OPEN, "batch", 0),
        (OPEN, "batch", MAX_BATCH + 1),
        (OPEN, "batch", "2"),
        (OPEN, "batch", 2.0),
        (OPEN, "batch", True),
        (OPEN, "start", -1),
        (OPEN, "end", 2**64 - 1),
        (OPEN, "max_length", MAX_POSITIONS + 1),
        (OPEN, "model", b"ab"),
        (OPEN, "model", "x" * 65),
        (OPEN, "session", TOKEN[1:]),
        (OPEN, "session", TOKEN + "0"),
        (OPEN, "session", TOKEN.upper()),
        (OPEN, "session", TOKEN[1:] + "\n"),
        (OPEN, "session", TOKEN + "\n"),
        (OPEN, "session", b"0" * 32),
        (OPEN, "session", "٠" * 32),
        (Attach(session=TOKEN), "session", "g" * 32),
        (LINK, "session", ""),
        (OPEN, "codec", "int4"),
        (OPEN, "codec", "compile"),
        (OPEN, "codec", 8),
        (OPEN, "standby", 1),
        (LINK, "link", 0),
        (LINK, "peer_id", "x" * 129),
        (LINK, "addresses", ["/ip4/127.0.0.1/tcp/9"] * 9),
        (LINK, "addresses", ["x" * 257]),
        (TakeOver(delivered=0), "delivered", -1),
        (REPLAY, "sequence", -1),
        (REPLAY, "link", -1),
        (STEP, "sequence", 0),
        (STEP, "hops", [HOP.model_dump()] * (MAX_HOPS + 1)),
        (OUTPUT, "hops", [HOP.model_dump()] * (MAX_HOPS + 1)),
        (OUTPUT, "hops", [{**HOP.model_dump(), "codec": "\x1b[2J"}]),
        (STEP, "position", MAX_POSITIONS + 1),
        (STEP, "reorder", [0] * (MAX_BATCH + 1)),
        (STEP, "reorder", ["0"]),
        (STEP, "tensors", [{"name": "x", "dtype": "uint8", "shape": [0]}] * 5),
        (STEP, "tensors", [{"name": "x", "dtype": "uint8", "shape": [0] * 5}]),
        (STEP, "tensors", [{"name": "x" * 33, "dtype": "uint8", "shape": [0]}]),
        (STEP, "tensors", [{"name": "x", "dtype": "uint8", "shape": [1.0]}]),
        (STEP, "tensors", {"name": "x"}),
        (Hello(version=1, agent=""), "agent", "x" * 65),
        (Hello(version=1, agent=""), "version", "1"),
        (Refusal(code="x", reason=""), "reason", "x" * 2001),
        (Refusal(code="x", reason=""), "retry_after_s", "soon"),
        (Drain(within_s=1.0), "within_s", None),
    ],
)
def test_a_field_of_the_wrong_type_or_over_its_limit_is_refused_by_name(
    message: Message, field: str, value: Any
) -> None:
    with pytest.raises(ProtocolError, match=rf"{message.type}\.{field}"):
        decode_message(Frame({**message.model_dump(), field: value}, bytearray()))


@pytest.mark.parametrize("seconds", [math.nan, math.inf, -math.inf, -0.25, 1e10])
@pytest.mark.parametrize(
    ("message", "field"),
    [
        (Drain(within_s=1.0), "within_s"),
        (Refusal(code="x", reason=""), "retry_after_s"),
        (OUTPUT, "queue_s"),
        (OUTPUT, "compute_s"),
        (STEP, "link_s"),
    ],
)
def test_times_that_are_none_are_refused(message: Message, field: str, seconds: float) -> None:
    header = message.model_dump()
    if "hops" in header:
        header["hops"] = [{**HOP.model_dump(), field: seconds}]
    else:
        header[field] = seconds
    with pytest.raises(ProtocolError, match=rf"{message.type}\.(hops\.0\.)?{field}"):
        decode_message(Frame(header, bytearray()))


@pytest.mark.parametrize("control", ["\x1b", "\x00", "\n", "\r", "\x07", "\x7f", "\x9b", "\u202e", "\u2028"], ids=ascii)
@pytest.mark.parametrize(
    "message", [Refusal(code="x", reason=""), LinkLost(link=1, reason="")], ids=lambda one: one.type
)
def test_control_characters_in_a_reason_become_blanks(message: Message, control: str) -> None:
    received, _ = decode_message(Frame({**message.model_dump(), "reason": f"a{control}[2Jé"}, bytearray()))
    assert isinstance(received, Refusal | LinkLost) and received.reason == "a [2Jé"


@given(
    st.dictionaries(st.text(max_size=8), VALUES, max_size=5),
    st.sampled_from([None, "?", *TYPES]),
    st.binary(max_size=16),
)
@quick
def test_no_map_does_more_than_a_protocol_error(header: dict[str, Any], type_: str | None, payload: bytes) -> None:
    if type_ is not None:
        header["type"] = type_
    with contextlib.suppress(ProtocolError):
        decode_message(Frame(header, bytearray(payload)))


@given(st.sampled_from(MESSAGES), st.data(), st.binary(max_size=16))
@quick
def test_no_values_in_the_right_fields_do_more_than_a_protocol_error(
    message: Message, data: st.DataObject, payload: bytes
) -> None:
    header = message.model_dump()
    for field in data.draw(st.sets(st.sampled_from(sorted(header)))):
        header[field] = data.draw(VALUES)
    with contextlib.suppress(ProtocolError):
        decode_message(Frame(header, bytearray(payload)))


@given(
    st.lists(
        st.fixed_dictionaries(
            {
                "name": st.sampled_from(["hidden_states", "mask", "x"]),
                "dtype": st.sampled_from([*DTYPES, "bool"]),
                "shape": st.lists(st.integers(0, 3) | st.integers(-(2**63), 2**64 - 1), max_size=5),
            }
        ),
        max_size=4,
    ),
    st.integers(0, 40),
)
@quick
def test_no_description_of_tensors_does_more_than_a_protocol_error(tensors: list[dict[str, Any]], size: int) -> None:
    with contextlib.suppress(ProtocolError):
        decode_message(Frame({**STEP.model_dump(), "tensors": tensors}, bytearray(size)))


def test_every_type_of_message_is_tested_here() -> None:
    assert sorted(one.model_fields["type"].default for one in Message.__args__) == TYPES
