"""A wire gives what was sent, however it is chunked; whatever else arrives ends in a typed error and is not kept."""

from __future__ import annotations

import itertools
import tracemalloc
from collections.abc import Callable
from random import Random
from typing import Any

import msgpack
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.errors import FrameTooLarge, ProtocolError
from swarm.protocol.frames import MAX_HEADER_BYTES, MAX_PAYLOAD_BYTES, Buffer, FrameDecoder
from swarm.protocol.messages import (
    PROTOCOL_VERSION,
    Attach,
    Attached,
    Close,
    Drain,
    Hello,
    HopTime,
    Link,
    Linked,
    LinkLost,
    Message,
    Open,
    Opened,
    Output,
    Ping,
    Pong,
    Promote,
    Refusal,
    Replay,
    Replayed,
    Step,
    TakeOver,
    decode_message,
    encode_message,
)
from swarm.protocol.wire import Wire

TOKEN = "0123456789abcdef" * 2
HELLO = Hello(version=PROTOCOL_VERSION, agent="test")
OPEN = Open(session=TOKEN, model="ab" * 32, start=0, end=2, batch=2, max_length=100)
HOP = HopTime(start=0, end=2, queue_s=0.25, compute_s=0.5, link_s=0.125)
STATES = torch.arange(24.0).reshape(2, 3, 4)
MASK = torch.ones(2, 3, dtype=torch.uint8)
SAID: list[tuple[Message, dict[str, torch.Tensor]]] = [
    (OPEN, {}),
    (Opened(dtype="float32"), {}),
    (Link(link=1, peer_id="12D3KooW", addresses=["/ip4/127.0.0.1/tcp/9"], session=TOKEN), {}),
    (Linked(link=1), {}),
    (LinkLost(link=1, reason="it hung up"), {}),
    (Promote(link=1), {}),
    (Attach(session=TOKEN), {}),
    (Attached(fresh=True), {}),
    (TakeOver(delivered=1), {}),
    (Step(sequence=1, position=0, tensors=[]), {"hidden_states": STATES, "mask": MASK}),
    (Step(sequence=2, position=3, reorder=[1, 0], hops=[HOP], tensors=[]), {"hidden_states": STATES.half()}),
    (Replay(sequence=2, position=0, last=True, tensors=[]), {"hidden_states": STATES}),
    (Replayed(sequence=2), {}),
    (Output(sequence=2, hops=[HOP, HOP], tensors=[]), {"hidden_states": STATES}),
    (Refusal(code="cache_full", reason="no room", retry_after_s=5.0), {}),
    (Drain(within_s=3.0), {}),
    (Pong(), {}),
    (Close(), {}),
]
"""One of everything that either end says after the greeting; pings are answered by the wire itself."""
CUTS = st.lists(st.integers(0, 2**16), max_size=20)


def joined(buffers: list[Buffer]) -> bytes:
    return b"".join(bytes(buffer) for buffer in buffers)


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[begin:end] for begin, end in itertools.pairwise(edges)]


def encoded(*messages: Message) -> bytes:
    return b"".join(joined(encode_message(message)) for message in messages)


def messages_in(data: bytes) -> list[Message]:
    return [decode_message(frame)[0] for frame in FrameDecoder().feed(data)]


def greeted() -> Wire:
    wire = Wire()
    wire.receive(encoded(HELLO))
    wire.take_outgoing()
    return wire


def kept(wire: Wire) -> int:
    """Bytes that wait for the rest of their frame."""
    return len(wire._decoder._buffer)


def stream() -> bytes:
    """Everything that can be said, as one end writes it."""
    wire = Wire()
    for message, tensors in SAID:
        wire.send(Ping())
        wire.send(message, tensors)
    return joined(wire.take_outgoing())


STREAM = stream()


# Greetings and pings


def test_both_ends_greet_first() -> None:
    one, other = Wire(), Wire()
    greeting = joined(one.take_outgoing())
    (hello,) = messages_in(greeting)
    assert isinstance(hello, Hello) and hello.version == PROTOCOL_VERSION and hello.agent.startswith("swarm/")
    assert other.receive(greeting) == []
    assert messages_in(joined(other.take_outgoing())) == [hello]
    assert one.take_outgoing() == []


@pytest.mark.parametrize("message", [*(message for message, _ in SAID), Ping()], ids=lambda message: message.type)
def test_nothing_passes_before_the_greeting(message: Message) -> None:
    wire = Wire()
    with pytest.raises(ProtocolError, match=f"unexpected message '{message.type}' before a greeting"):
        wire.receive(encoded(message))
    assert messages_in(joined(wire.take_outgoing())) == messages_in(joined(Wire().take_outgoing()))  # no pong either


def test_a_second_greeting_is_refused() -> None:
    with pytest.raises(ProtocolError, match="unexpected message 'hello'"):
        Wire().receive(encoded(HELLO, HELLO))
    with pytest.raises(ProtocolError, match="unexpected message 'hello'"):
        greeted().receive(encoded(Pong(), HELLO))


@pytest.mark.parametrize(
    ("version", "who"), [(PROTOCOL_VERSION - 1, "the peer must be updated"), (99, "this side must be updated")]
)
def test_another_version_is_refused_and_who_must_update_is_said(version: int, who: str) -> None:
    with pytest.raises(ProtocolError, match=rf"'other/1'.*version {version} of the protocol.*{who}"):
        Wire().receive(encoded(Hello(version=version, agent="other/1")))


def test_an_agent_that_plays_with_the_terminal_is_quoted() -> None:
    with pytest.raises(ProtocolError) as caught:
        Wire().receive(encoded(Hello(version=1, agent="\x1b[2J\n")))
    assert str(caught.value).isprintable()


def test_pings_are_answered_with_pongs_and_handed_to_nobody() -> None:
    wire = greeted()
    assert wire.receive(encoded(Ping(), Ping())) == []
    assert messages_in(joined(wire.take_outgoing())) == [Pong(), Pong()]


def test_a_pong_is_handed_over_and_not_answered() -> None:
    wire = greeted()
    assert wire.receive(encoded(Pong())) == [(Pong(), {})]
    assert wire.take_outgoing() == []


def test_what_is_sent_leaves_once_and_in_order() -> None:
    wire = greeted()
    wire.send(Linked(link=1))
    wire.send(Linked(link=2))
    assert messages_in(joined(wire.take_outgoing())) == [Linked(link=1), Linked(link=2)]
    assert wire.take_outgoing() == []


def test_a_message_too_large_is_not_sent_in_part() -> None:
    wire = greeted()
    with pytest.raises(FrameTooLarge):
        wire.send(SAID[9][0], {"hidden_states": torch.empty(MAX_PAYLOAD_BYTES + 1, dtype=torch.uint8)})
    assert wire.take_outgoing() == []


# Chunks


@given(CUTS)
@settings(deadline=None, max_examples=60)
def test_everything_that_can_be_said_arrives_however_its_bytes_are_chunked(cuts: list[int]) -> None:
    wire = Wire()
    wire.take_outgoing()
    received = [one for piece in pieces(STREAM, cuts) for one in wire.receive(piece)]
    assert [message.model_copy(update={"tensors": []}) for message, _ in received] == [
        message.model_copy(update={"tensors": []}) for message, _ in SAID
    ]
    for (_, tensors), (_, sent) in zip(received, SAID, strict=True):
        assert tensors.keys() == sent.keys()
        assert all(torch.equal(tensors[name], sent[name]) for name in sent)
    assert messages_in(joined(wire.take_outgoing())) == [Pong()] * len(SAID)
    assert kept(wire) == 0


def test_bytes_arrive_one_by_one() -> None:
    wire = Wire()
    received = [one for byte in STREAM for one in wire.receive(bytes([byte]))]
    assert len(received) == len(SAID)


# Fuzzing


def mutated(random: Random, data: bytes) -> bytes:
    """A few bytes flipped, set, inserted, removed, repeated, or the rest cut off."""
    mutant = bytearray(data)
    for _ in range(random.randint(1, 4)):
        at = random.randrange(len(mutant)) if mutant else 0
        match random.randrange(6):
            case 0 if mutant:
                mutant[at] ^= 1 << random.randrange(8)
            case 1 if mutant:
                mutant[at] = random.choice([0, 1, 0x7F, 0x80, 0xC0, 0xC1, 0xFF])
            case 2:
                mutant[at:at] = random.randbytes(random.randint(1, 4))
            case 3:
                del mutant[at : at + random.randint(1, 4)]
            case 4:
                mutant[at:at] = mutant[at : at + random.randint(1, 30)]
            case 5 if random.random() < 0.2:
                del mutant[at:]
    return bytes(mutant)


_LEAVES: list[Callable[[Random], Any]] = [
    lambda _: None,
    lambda random: random.random() < 0.5,
    lambda random: random.choice([0, 1, -1, 2**31, 2**63 - 1, -(2**63), 2**64 - 1]),
    lambda random: random.randint(0, 5),
    lambda random: random.choice([0.0, -1.0, 0.5, 1e300, float("nan"), float("inf")]),
    lambda random: random.choice(["", "float32", "int8", TOKEN, "x" * 3000, "\x1b\n", "hidden_states", "\udcff"[:0]]),
    lambda random: random.randbytes(random.randint(0, 5)),
]


def anything(random: Random, depth: int = 0) -> Any:
    """Any value that msgpack can carry."""
    kind = random.randrange(10)
    if kind == 0 and depth < 3:
        return [anything(random, depth + 1) for _ in range(random.randint(0, 4))]
    if kind == 1 and depth < 3:
        return {str(random.randrange(5)): anything(random, depth + 1) for _ in range(random.randint(0, 3))}
    return random.choice(_LEAVES)(random)


def structured(random: Random) -> bytes:
    """A frame whose header is nearly that of a message; its payload fits, or does not."""
    message, _ = random.choice(SAID)
    header = message.model_dump()
    for field in list(header):
        if random.random() < 0.3:
            header[field] = anything(random)
    if "tensors" in header and random.random() < 0.8:
        header["tensors"] = [
            {
                "name": random.choice(["hidden_states", "mask", "scales", "x"]),
                "dtype": random.choice(["float32", "int8", "uint8", "int64", "bool"]),
                "shape": [random.choice([0, 1, 2, 3, 4, 2**40, -1]) for _ in range(random.randint(0, 4))],
            }
            for _ in range(random.randint(0, 3))
        ]
    packed = msgpack.packb(header)
    payload = bytes(random.choice([0, 0, 4, 24, 96]))
    sizes = (len(packed), len(payload))
    if random.random() < 0.1:
        sizes = (random.choice([0, len(packed) + 1, 2**32 - 1]), random.choice([0, 5, MAX_PAYLOAD_BYTES + 1]))
    return b"SWRM" + b"".join(size.to_bytes(4, "big") for size in sizes) + packed + payload


def garbage(random: Random) -> bytes:
    """Random bytes, often behind a prefix that announces them."""
    data = random.randbytes(random.randint(0, 60))
    match random.randrange(3):
        case 0:
            return data
        case 1:
            return b"SWRM" + len(data).to_bytes(4, "big") + bytes(4) + data
        case _:
            return b"SWRM" + bytes(2) + random.randbytes(2) + bytes(random.choice([2, 0])) + random.randbytes(4) + data


ALONE = [b"".join(bytes(part) for part in encode_message(message, tensors)) for message, tensors in SAID]
FUZZ: dict[str, tuple[int, Callable[[Random], bytes]]] = {
    "garbage": (40_000, garbage),
    "mutants": (40_000, lambda random: mutated(random, random.choice(ALONE))),
    "structured": (40_000, structured),
}


@pytest.mark.parametrize("kind", FUZZ)
def test_no_bytes_do_more_than_a_protocol_error_or_are_kept_beyond_the_limits(kind: str) -> None:
    rounds, make = FUZZ[kind]
    random, passed, refused, wire = Random(f"wire {kind}"), 0, 0, greeted()
    fed = 0
    for number in range(rounds):
        data = make(random)
        cut = random.randrange(len(data) + 1)
        try:
            for piece in (data[:cut], data[cut:]):
                fed += len(piece)
                passed += len(wire.receive(piece))
                assert kept(wire) <= min(fed, 12 + MAX_HEADER_BYTES + MAX_PAYLOAD_BYTES)
        except ProtocolError as error:  # FrameTooLarge is one
            assert str(error).isprintable() and len(str(error)) < 400
            refused += 1
            assert kept(wire) <= fed
        else:
            if number % 4:
                continue  # what follows may complete it
        wire, fed = greeted(), 0
    assert refused > rounds / 20
    assert passed > rounds / 50 or kind == "garbage"


@given(CUTS, st.integers(0, 2**32))
@settings(deadline=None, max_examples=200)
def test_a_mutated_conversation_does_no_more_than_a_protocol_error(cuts: list[int], seed: int) -> None:
    wire = Wire()
    try:
        for piece in pieces(mutated(Random(seed), STREAM), cuts):
            wire.receive(piece)
    except ProtocolError as error:
        assert str(error)


@pytest.mark.parametrize(
    ("header_bytes", "payload_bytes"),
    [(MAX_HEADER_BYTES + 1, 0), (0, MAX_PAYLOAD_BYTES + 1), (2**32 - 1, 2**32 - 1)],
)
def test_a_frame_that_announces_too_much_is_refused_before_its_body_is_kept(
    header_bytes: int, payload_bytes: int
) -> None:
    prefix = b"SWRM" + header_bytes.to_bytes(4, "big") + payload_bytes.to_bytes(4, "big")
    body, wire = bytes(256 * 1024), greeted()
    tracemalloc.start()
    try:
        with pytest.raises(FrameTooLarge):
            wire.receive(prefix)
        for _ in range(40):  # whoever goes on feeding it does not fill the memory
            with pytest.raises(FrameTooLarge):
                wire.receive(body)
            assert kept(wire) <= len(prefix)
        assert tracemalloc.get_traced_memory()[1] < 4 * len(body)
    finally:
        tracemalloc.stop()


def test_a_frame_that_ends_in_an_error_leaves_nothing_behind() -> None:
    wire, packed = greeted(), b"\xc1" * 1000
    with pytest.raises(ProtocolError, match="not msgpack"):
        wire.receive(b"SWRM" + len(packed).to_bytes(4, "big") + (5000).to_bytes(4, "big") + packed + bytes(5000))
    assert kept(wire) == 0
