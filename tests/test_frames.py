"""Frames survive any chunking of the stream; whatever is no frame is refused, and what is too large is never kept."""

from __future__ import annotations

import contextlib
import itertools
from array import array
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.errors import FrameTooLarge, ProtocolError
from swarm.protocol.frames import MAX_HEADER_BYTES, MAX_PAYLOAD_BYTES, Buffer, Frame, FrameDecoder, encode_frame

quick = settings(deadline=None, max_examples=100)

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=10)
    | st.binary(max_size=10),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=15,
)
HEADERS = st.dictionaries(st.text(max_size=10), VALUES, max_size=5)
FRAMES = st.lists(st.tuples(HEADERS, st.lists(st.binary(max_size=100), max_size=3)), min_size=1, max_size=4)
CUTS = st.lists(st.integers(0, 2**16), max_size=12)


def joined(buffers: list[Buffer]) -> bytes:
    return b"".join(bytes(buffer) for buffer in buffers)


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[begin:end] for begin, end in itertools.pairwise(edges)]


def prefix(header_bytes: int, payload_bytes: int) -> bytes:
    return b"SWRM" + header_bytes.to_bytes(4, "big") + payload_bytes.to_bytes(4, "big")


def with_header(packed: bytes) -> bytes:
    return prefix(len(packed), 0) + packed


@given(FRAMES, CUTS)
@quick
def test_frames_arrive_as_they_were_sent_however_the_bytes_are_chunked(
    sent: list[tuple[dict[str, Any], list[bytes]]], cuts: list[int]
) -> None:
    stream = b"".join(joined(encode_frame(header, parts)) for header, parts in sent)
    decoder = FrameDecoder()
    received = [frame for piece in pieces(stream, cuts) for frame in decoder.feed(piece)]
    assert received == [Frame(header, bytearray(b"".join(parts))) for header, parts in sent]


def test_a_frame_arrives_byte_by_byte_and_not_before_its_last_byte() -> None:
    stream, decoder = joined(encode_frame({"type": "x"}, [b"payload"])), FrameDecoder()
    for byte in stream[:-1]:
        assert list(decoder.feed(bytes([byte]))) == []
    assert list(decoder.feed(stream[-1:])) == [Frame({"type": "x"}, bytearray(b"payload"))]


def test_a_payload_is_not_copied_and_its_size_is_counted_in_bytes() -> None:
    numbers = memoryview(array("d", [1.0, 2.0]))
    buffers = encode_frame({}, [numbers])
    assert buffers[1] is numbers
    (frame,) = FrameDecoder().feed(joined(buffers))
    assert frame.payload == numbers.tobytes()


def test_a_received_payload_belongs_to_its_frame_alone() -> None:
    decoder = FrameDecoder()
    stream = joined(encode_frame({}, [b"aaaa"])) + joined(encode_frame({}, [b"bbbb"]))
    first, second = decoder.feed(stream)
    first.payload[:] = b"zzzz"
    assert second.payload == b"bbbb"


@given(st.binary(max_size=300), CUTS)
@quick
def test_garbage_is_refused_or_waited_upon(garbage: bytes, cuts: list[int]) -> None:
    decoder = FrameDecoder()
    with contextlib.suppress(ProtocolError):
        for piece in pieces(garbage, cuts):
            assert list(decoder.feed(piece)) == []


@given(st.binary(max_size=300))
@quick
def test_a_garbage_header_is_refused_or_a_map(garbage: bytes) -> None:
    try:
        frames = list(FrameDecoder().feed(with_header(garbage)))
    except ProtocolError:
        return
    assert all(isinstance(frame.header, dict) for frame in frames)


@given(st.binary(min_size=12, max_size=40).filter(lambda data: not data.startswith(b"SWRM")))
@quick
def test_a_stranger_is_told_apart_by_the_first_twelve_bytes(data: bytes) -> None:
    with pytest.raises(ProtocolError, match="does not speak Swarm's protocol"):
        list(FrameDecoder().feed(data))


@pytest.mark.parametrize(
    ("header_bytes", "payload_bytes"),
    [(MAX_HEADER_BYTES + 1, 0), (0, MAX_PAYLOAD_BYTES + 1), (2**32 - 1, 2**32 - 1)],
)
def test_a_frame_over_the_limits_is_refused_when_it_is_announced(header_bytes: int, payload_bytes: int) -> None:
    decoder, announced = FrameDecoder(), prefix(header_bytes, payload_bytes)
    assert list(decoder.feed(announced[:11])) == []
    with pytest.raises(FrameTooLarge, match="over the limit"):
        list(decoder.feed(announced[11:]))


def test_nothing_of_a_frame_over_the_limits_is_kept() -> None:
    decoder = FrameDecoder()
    for _ in range(3):
        with pytest.raises(FrameTooLarge):
            list(decoder.feed(prefix(10, MAX_PAYLOAD_BYTES + 1) + bytes(1000)))
        assert len(decoder._buffer) <= len(prefix(0, 0))


def test_frames_before_one_over_the_limits_still_arrive() -> None:
    arriving = FrameDecoder().feed(joined(encode_frame({"a": 1})) + prefix(0, MAX_PAYLOAD_BYTES + 1))
    assert next(arriving) == Frame({"a": 1}, bytearray())
    with pytest.raises(FrameTooLarge):
        next(arriving)


def test_frames_at_the_limits_pass() -> None:
    header = {"": b""}
    header[""] = bytes(MAX_HEADER_BYTES - len(msgpack.packb({"": bytes(2**15)})) + 2**15)
    assert len(msgpack.packb(header)) == MAX_HEADER_BYTES
    buffers = encode_frame(header, [bytes(MAX_PAYLOAD_BYTES)])
    decoder = FrameDecoder()
    frames = [frame for buffer in buffers for frame in decoder.feed(buffer)]
    assert frames[0].header == header and len(frames[0].payload) == MAX_PAYLOAD_BYTES


def test_no_frame_is_written_that_no_peer_would_take() -> None:
    half = bytes(MAX_PAYLOAD_BYTES // 2)
    with pytest.raises(FrameTooLarge):
        encode_frame({}, [half, half, b"x"])
    with pytest.raises(FrameTooLarge):
        encode_frame({"text": "x" * MAX_HEADER_BYTES})


@pytest.mark.parametrize("header", [None, 1, "text", [["type", "hello"]], b"bytes"])
def test_a_header_that_is_no_map_is_refused(header: Any) -> None:
    with pytest.raises(ProtocolError, match="not a map"):
        list(FrameDecoder().feed(with_header(msgpack.packb(header))))


@pytest.mark.parametrize(
    "packed",
    [
        b"",
        b"\xc1",  # never used
        b"\xdf\xff\xff\xff\xff",  # a map of four billion entries, none of which follows
        b"\xa5ab",  # a text that ends too soon
        b"\x80\x80",  # two maps
        b"\x81\xa1a\xa1\xff",  # not UTF-8
        b"\x81\x01\x01",  # a key that is a number
        b"\x81\x93\x01\x02\x03\x01",  # a key that is a list
        b"\x91" * 60_000 + b"\x00",  # nested without end
        b"\x81\xa1a\xd7\xff" + b"\xff" * 8,  # an impossible timestamp
    ],
)
def test_a_header_that_is_not_msgpack_is_refused(packed: bytes) -> None:
    with pytest.raises(ProtocolError, match="not msgpack"):
        list(FrameDecoder().feed(with_header(packed)))
