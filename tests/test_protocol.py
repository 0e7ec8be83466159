"""Frames, messages and the session's two state machines: exact round trips, and ProtocolError for all else."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import msgpack
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.errors import CacheFull, FrameTooLarge, ProtocolError
from swarm.protocol.frames import MAX_HEADER_BYTES, MAX_PAYLOAD_BYTES, Frame, FrameDecoder, encode_frame
from swarm.protocol.messages import Hello, Open, Step, decode_message, encode_message
from swarm.protocol.sessions import (
    ClientSession,
    DrainAnnounced,
    OpenRequested,
    OutputReceived,
    Refused,
    ServerSession,
    SessionEnded,
    SessionOpened,
    StepRequested,
)
from swarm.protocol.tensors import DTYPES, TensorHeader, decode_tensors, encode_tensors

HIDDEN = 8
JSON = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-(2**60), 2**60), st.floats(), st.text(max_size=8), st.binary(max_size=8)
    ),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


def joined(buffers: list[Any]) -> bytes:
    return b"".join(bytes(buffer) for buffer in buffers)


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[begin:end] for begin, end in itertools.pairwise(edges)]


@given(
    st.dictionaries(st.text(max_size=8), st.integers(0, 9), max_size=4),
    st.binary(max_size=300),
    st.lists(st.integers(0, 10**6)),
)
@settings(deadline=None)
def test_a_frame_survives_any_chunking(header: dict[str, int], payload: bytes, cuts: list[int]) -> None:
    decoder = FrameDecoder()
    data = joined(encode_frame(header, [payload])) * 2
    frames = [frame for piece in pieces(data, cuts) for frame in decoder.feed(piece)]
    assert frames == [Frame(header, bytearray(payload))] * 2


@given(st.binary(max_size=200))
def test_garbage_is_never_anything_but_a_protocol_error(data: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        list(FrameDecoder().feed(data))


@pytest.mark.parametrize(("header", "payload"), [(MAX_HEADER_BYTES + 1, 0), (10, MAX_PAYLOAD_BYTES + 1)])
def test_a_frame_over_the_limit_is_refused_before_it_arrives(header: int, payload: int) -> None:
    with pytest.raises(FrameTooLarge):
        list(FrameDecoder().feed(b"SWRM" + header.to_bytes(4, "big") + payload.to_bytes(4, "big")))


@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (2, 3, 4), (1, 2, 1, 3)])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_tensors_arrive_bit_for_bit(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = (torch.rand(shape) * 200).to(dtype)
    headers, parts = encode_tensors({"a": tensor, "b": tensor.flatten()})
    decoded = decode_tensors(headers, bytearray(joined(parts)))
    assert torch.equal(decoded["a"], tensor) and decoded["a"].dtype == dtype
    assert torch.equal(decoded["b"], tensor.flatten())


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [("float32", [3]), ("float32", [1]), ("float32", [-1, -2]), ("float32", [2**40, 2**40]), ("complex64", [1])],
)
def test_tensor_headers_that_do_not_fit_the_payload_are_refused(dtype: str, shape: list[int]) -> None:
    with pytest.raises(ProtocolError):
        decode_tensors([TensorHeader(name="x", dtype=dtype, shape=shape)], bytearray(8))


@given(
    st.dictionaries(st.text(max_size=8), JSON, max_size=5), st.sampled_from(["hello", "open", "step", "output", "?"])
)
@settings(deadline=None)
def test_no_header_does_more_than_a_protocol_error(header: dict[str, Any], type_: str) -> None:
    with contextlib.suppress(ProtocolError):
        decode_message(Frame({**header, "type": type_}, bytearray()))


def test_a_malformed_field_is_named() -> None:
    request = Open(model="m", start=0, end=1, batch=1, max_length=1).model_dump()
    with pytest.raises(ProtocolError, match="batch"):
        decode_message(Frame({**request, "batch": 10**9}, bytearray()))


class Pair:
    """A client's and a server's machine, joined by nothing but function calls."""

    def __init__(self) -> None:
        self.client, self.server = ClientSession(), ServerSession(HIDDEN)

    def to_server(self) -> list[Any]:
        return self.server.receive_data(joined(self.client.take_outgoing()))

    def to_client(self) -> list[Any]:
        return self.client.receive_data(joined(self.server.take_outgoing()))

    def open(self, batch: int = 2) -> Pair:
        self.client.open(Open(model="m", start=0, end=1, batch=batch, max_length=9))
        assert [type(event) for event in self.to_server()] == [OpenRequested]
        self.server.accept("float32")
        assert self.to_client() == [SessionOpened("float32")]
        return self

    def send(self, sequence: int, position: int, hidden_states: torch.Tensor, **fields: Any) -> list[Any]:
        step = Step(sequence=sequence, position=position, tensors=[], **fields)
        self.client.step(step, {"hidden_states": hidden_states})
        return self.to_server()

    def run(self, sequence: int, position: int, hidden_states: torch.Tensor, **fields: Any) -> list[Any]:
        (request,) = self.send(sequence, position, hidden_states, **fields)
        self.server.send_output(request.step, request.hidden_states * 2, 0.0, 0.0)
        return self.to_client()


def test_a_step_goes_there_and_back() -> None:
    states = torch.rand(2, 3, HIDDEN)
    (output,) = Pair().open().run(1, 0, states)
    assert isinstance(output, OutputReceived) and torch.equal(output.hidden_states, states * 2)


def test_a_duplicated_step_is_answered_twice_and_run_once() -> None:
    pair, states = Pair().open(), torch.rand(2, 3, HIDDEN)
    first = pair.run(1, 0, states)
    assert pair.send(1, 0, states) == []
    second = pair.to_client()
    assert torch.equal(first[0].hidden_states, second[0].hidden_states)


def test_rolling_back_and_changing_the_batch_are_ordinary_steps() -> None:
    pair = Pair().open()
    pair.run(1, 0, torch.rand(2, 3, HIDDEN))
    assert len(pair.run(2, 1, torch.rand(2, 2, HIDDEN))) == 1
    assert len(pair.run(3, 3, torch.rand(4, 1, HIDDEN), reorder=[0, 0, 1, 1])) == 1
    assert len(pair.run(4, 4, torch.rand(4, 1, HIDDEN))) == 1


@pytest.mark.parametrize(
    ("position", "shape", "reorder", "words"),
    [
        (5, (2, 1, HIDDEN), None, "the cache ends at 3"),
        (3, (2, 1, HIDDEN + 1), None, "must carry hidden_states"),
        (3, (3, 1, HIDDEN), None, "the session has 2"),
        (3, (2, 0, HIDDEN), None, "of 0 positions"),
        (3, (2, 1, HIDDEN), [0, 2], "rows that do not exist"),
    ],
)
def test_an_impossible_step_is_refused(
    position: int, shape: tuple[int, ...], reorder: list[int] | None, words: str
) -> None:
    pair = Pair().open()
    pair.run(1, 0, torch.rand(2, 3, HIDDEN))
    with pytest.raises(ProtocolError, match=words):
        pair.send(2, position, torch.rand(shape), reorder=reorder)


def test_a_step_before_the_last_was_answered_is_refused() -> None:
    pair = Pair().open()
    assert [type(event) for event in pair.send(1, 0, torch.rand(2, 1, HIDDEN))] == [StepRequested]
    with pytest.raises(ProtocolError, match="before step 1 was answered"):
        pair.send(2, 1, torch.rand(2, 1, HIDDEN))


def test_a_refusal_arrives_as_the_typed_error() -> None:
    pair = Pair()
    pair.client.open(Open(model="m", start=0, end=1, batch=1, max_length=1))
    pair.to_server()
    pair.server.refuse(CacheFull("no room"), retry_after_s=5.0)
    (refused,) = pair.to_client()
    assert isinstance(refused, Refused) and isinstance(refused.error, CacheFull)
    assert (str(refused.error), refused.retry_after_s) == ("no room", 5.0)


def test_pings_are_answered_and_farewells_arrive() -> None:
    pair = Pair().open()
    pair.client.ping()
    assert pair.to_server() == [] and len(pair.server._wire._outgoing) == 1
    pair.server.announce_drain(3.0)
    assert pair.to_client() == [DrainAnnounced(3.0)]
    pair.client.close()
    assert pair.to_server() == [SessionEnded()]


def test_another_version_is_told_who_must_update() -> None:
    with pytest.raises(ProtocolError, match=r"version 7 of the protocol.*must be updated"):
        ServerSession(HIDDEN).receive_data(joined(encode_message(Hello(version=7, agent="old"))))


@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=5), st.data())
@settings(deadline=None)
def test_mutated_client_bytes_do_no_more_than_a_protocol_error(flips: list[tuple[int, int]], data: Any) -> None:
    client = ClientSession()
    client.open(Open(model="m", start=0, end=1, batch=1, max_length=9))
    stream = bytearray(joined(client.take_outgoing()))
    client.step(Step(sequence=1, position=0, tensors=[]), {"hidden_states": torch.zeros(1, 2, HIDDEN)})
    stream += joined(client.take_outgoing())
    for where, value in flips:
        stream[where % len(stream)] = value
    server = ServerSession(HIDDEN)
    try:
        for piece in pieces(bytes(stream), data.draw(st.lists(st.integers(0, 10**6), max_size=3))):
            for event in server.receive_data(piece):
                if isinstance(event, OpenRequested):
                    server.accept("float32")
    except ProtocolError:
        pass


def test_a_header_that_is_no_map_is_refused() -> None:
    packed = msgpack.packb([1, 2])
    with pytest.raises(ProtocolError, match="not a map"):
        list(FrameDecoder().feed(b"SWRM" + len(packed).to_bytes(4, "big") + bytes(4) + packed))
