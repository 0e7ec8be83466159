"""Servers measure the ways to each other, and nobody can make one of them send or take floods."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator

import pytest
from test_faults import stranger

from swarm.dht import Announcement, State
from swarm.dht.announcement import MAX_RTTS
from swarm.errors import PeerError, PeerUnreachable, ProtocolError
from swarm.server.neighbours import NetworkSpeed, latest, likely_neighbours, summarize
from swarm.transport.measuring import (
    COMMAND,
    DOWNLOAD,
    MAX_PINGS,
    MEASURE_PROTOCOL,
    MIN_TRANSFER_BYTES,
    PING,
    REFUSED,
    UPLOAD,
    MeasuredLink,
    MeasuringServer,
    measure_link,
)
from swarm.transport.measuring_limits import (
    AT_ONCE,
    BURST,
    MAX_TRANSFER_BYTES,
    PEER_INTERVAL_S,
    REFILL_S,
    MeasuringLimits,
)
from swarm.transport.node import Node
from tests.netlab import Laboratory, Link, netlab_available

LOOPBACK = ["/ip4/127.0.0.1/tcp/0"]
FULL_UPLOAD = COMMAND.pack(UPLOAD, MAX_TRANSFER_BYTES) + bytes(MAX_TRANSFER_BYTES)
FULL_DOWNLOAD = COMMAND.pack(DOWNLOAD, MAX_TRANSFER_BYTES)
NONSENSE = COMMAND.pack(b"X", 0)


# whom to let in


def let_in(limits: MeasuringLimits, peer_id: str, now: float) -> bool:
    """A measurement that is over at once."""
    if not limits.begin(peer_id, now):
        return False
    limits.end()
    return True


def test_a_peer_measures_once_in_a_while() -> None:
    limits = MeasuringLimits()
    assert let_in(limits, "a", 1000.0)
    assert not let_in(limits, "a", 1000.0 + PEER_INTERVAL_S - 1)
    assert let_in(limits, "b", 1000.0 + PEER_INTERVAL_S - 1)
    assert let_in(limits, "a", 1000.0 + PEER_INTERVAL_S)


def test_few_measure_at_once() -> None:
    limits = MeasuringLimits()
    assert [limits.begin(str(number), 1000.0) for number in range(AT_ONCE + 1)] == [True] * AT_ONCE + [False]
    limits.end()
    assert limits.begin("another", 1000.0)


def test_however_many_names_a_stranger_has_the_whole_is_limited_and_little_is_remembered() -> None:
    limits, seconds = MeasuringLimits(), 3600
    admitted = sum(
        let_in(limits, f"{second} {name}", 1000.0 + second) for second in range(seconds) for name in range(9)
    )
    assert admitted <= BURST + seconds / REFILL_S + 1
    assert len(limits._let_in_at) <= BURST + PEER_INTERVAL_S / REFILL_S


# whom to measure


def server(peer_id: str, start: int, end: int, state: State = State.ONLINE) -> Announcement:
    return Announcement(
        peer_id=peer_id, model="ab" * 32, state=state, num_blocks=9, start=start, end=end, dtype="float32",
        throughput=1.0, free_kv_tokens=7, version="0", issued_at=0.0,
    )  # fmt: skip


def test_successors_come_first_then_predecessors_then_all_others() -> None:
    servers = [
        server("me", 3, 6), server("twin", 3, 6), server("before", 0, 3), server("overlaps before", 1, 4),
        server("after", 6, 9), server("overlaps after", 5, 8), server("leaving", 6, 9, State.DRAINING),
        server("loading", 6, 9, State.JOINING),
    ]  # fmt: skip
    order = [one.peer_id for one in likely_neighbours("me", 3, 6, servers)]
    assert order == ["after", "overlaps after", "before", "overlaps before", "twin"]


def test_servers_choose_differently_among_many_equals() -> None:
    servers = [server(f"after {number}", 6, 9) for number in range(100)]
    choices = {tuple(one.peer_id for one in likely_neighbours(f"me {me}", 3, 6, servers)) for me in range(5)}
    assert len(choices) == 5
    assert all(len(choice) == MAX_RTTS for choice in choices)


def test_the_fastest_transfer_tells_most_and_whoever_is_gone_tells_nothing() -> None:
    measured = {"a": MeasuredLink(0.02, 1e6, 3e6), "b": MeasuredLink(0.03, 2e6), "gone": MeasuredLink(0.01, 9e9, 9e9)}
    assert summarize(["b", "unknown", "a"], measured) == NetworkSpeed({"b": 0.03, "a": 0.02}, 2e6, 3e6)
    assert list(summarize(["b", "a"], measured).rtts_s) == ["b", "a"]
    assert summarize([], measured) == NetworkSpeed()


def test_what_could_not_be_measured_is_as_it_was() -> None:
    before = MeasuredLink(0.02, 1e6, 3e6)
    assert latest(None, None) is None
    assert latest(before, None) == before
    assert latest(None, before) == before
    assert latest(before, MeasuredLink(0.05)) == MeasuredLink(0.05, 1e6, 3e6)
    assert latest(before, MeasuredLink(0.05, 5e6, 6e6)) == MeasuredLink(0.05, 5e6, 6e6)


# real streams


class Measured:
    """A node that lets itself be measured."""

    def __init__(self, node: Node, addresses: list[str]) -> None:
        self.node, self.addresses = node, addresses
        self.busy = False

    async def converse(self, said: bytes, *, name: Node | None = None) -> bytes:
        """What a stranger hears who says `said`, until the stream ends."""
        async with contextlib.AsyncExitStack() as stack:
            node = name or await stack.enter_async_context(stranger())
            await node.connect(self.node.peer_id, self.addresses)
            reader, writer = await node.open_stream(self.node.peer_id, MEASURE_PROTOCOL)
            stack.callback(writer.close)
            with contextlib.suppress(OSError):  # it may hang up before it has heard all
                writer.write(said)
                await writer.drain()
            heard = b""
            async with asyncio.timeout(15):
                with contextlib.suppress(OSError):
                    while data := await reader.read(65536):
                        heard += data
            return heard


@pytest.fixture
async def measured() -> AsyncIterator[Measured]:
    node = await Node.start(listen=LOOPBACK)
    try:
        there = Measured(node, await node.addresses())
        await node.serve(MEASURE_PROTOCOL, MeasuringServer(lambda: there.busy).handle)
        yield there
    finally:
        await node.stop()


async def test_a_link_is_measured_both_ways(measured: Measured) -> None:
    async with stranger() as node:
        link = await measure_link(node, measured.node.peer_id, measured.addresses, transfers=True)
    assert 0 < link.round_trip_s < 0.05
    assert link.upload_bytes_per_s is not None and link.upload_bytes_per_s > 1e6
    assert link.download_bytes_per_s is not None and link.download_bytes_per_s > 1e6


async def test_a_busy_server_tells_how_far_away_it_is_and_no_more(measured: Measured) -> None:
    measured.busy = True
    async with stranger() as node:
        link = await measure_link(node, measured.node.peer_id, measured.addresses, transfers=True)
    assert link == MeasuredLink(link.round_trip_s)
    assert await measured.converse(FULL_DOWNLOAD) == COMMAND.pack(REFUSED, 0)


async def test_whoever_comes_again_too_soon_is_refused(measured: Measured) -> None:
    async with stranger() as node:
        await measure_link(node, measured.node.peer_id, measured.addresses, transfers=False)
        with pytest.raises(PeerError, match="does not want to be measured now"):
            await measure_link(node, measured.node.peer_id, measured.addresses, transfers=False)
        assert await measured.converse(FULL_DOWNLOAD, name=node) == COMMAND.pack(REFUSED, 0)


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.1\r\nHost: example.org\r\n\r\n",
        NONSENSE,
        COMMAND.pack(REFUSED, 0),
        COMMAND.pack(DOWNLOAD, 0),
        COMMAND.pack(DOWNLOAD, MIN_TRANSFER_BYTES - 1),
        COMMAND.pack(DOWNLOAD, MAX_TRANSFER_BYTES + 1),
        COMMAND.pack(DOWNLOAD, 2**64 - 1),
        COMMAND.pack(UPLOAD, 7) + bytes(7),
        COMMAND.pack(UPLOAD, MAX_TRANSFER_BYTES + 1) + bytes(MAX_TRANSFER_BYTES + 1),
        COMMAND.pack(UPLOAD, 2**64 - 1) + bytes(MAX_TRANSFER_BYTES),
    ],
    ids=[
        "not our protocol", "unknown command", "a refusal", "nothing", "next to nothing", "a byte too many",
        "everything", "too little", "a byte too many up", "a flood",
    ],
)  # fmt: skip
async def test_a_request_beyond_the_limits_closes_its_stream_only(said: bytes, measured: Measured) -> None:
    assert await measured.converse(said) == b""
    async with stranger() as node:
        link = await measure_link(node, measured.node.peer_id, measured.addresses, transfers=True)
    assert link.download_bytes_per_s


@pytest.mark.parametrize(
    ("said", "heard_bytes"),
    [
        (COMMAND.pack(PING, 7) * (MAX_PINGS + 5), MAX_PINGS * COMMAND.size),
        (FULL_DOWNLOAD * 2, COMMAND.size + MAX_TRANSFER_BYTES),
        (COMMAND.pack(DOWNLOAD, MAX_TRANSFER_BYTES - MIN_TRANSFER_BYTES) * 2,
         COMMAND.size + MAX_TRANSFER_BYTES - MIN_TRANSFER_BYTES),
        (FULL_UPLOAD + COMMAND.pack(UPLOAD, MIN_TRANSFER_BYTES), 2 * COMMAND.size),
    ],
    ids=["pings", "downloads", "almost downloads", "uploads"],
)  # fmt: skip
async def test_one_stream_gets_no_more_than_one_measurement(said: bytes, heard_bytes: int, measured: Measured) -> None:
    assert len(await measured.converse(said)) == heard_bytes


async def test_strangers_with_many_names_get_no_more_than_the_burst(measured: Measured) -> None:
    refusal = COMMAND.pack(REFUSED, 0)
    answers = [await measured.converse(FULL_DOWNLOAD + NONSENSE) for _ in range(BURST + 3)]
    assert [answer == refusal for answer in answers] == [False] * BURST + [True] * 3
    assert sum(map(len, answers)) == BURST * (COMMAND.size + MAX_TRANSFER_BYTES) + 3 * len(refusal)


async def test_whoever_says_nothing_makes_room_for_others_soon(measured: Measured) -> None:
    begun = time.monotonic()
    silent = [asyncio.create_task(measured.converse(b"")) for _ in range(AT_ONCE)]
    assert await asyncio.gather(*silent) == [b""] * AT_ONCE
    assert 4 < time.monotonic() - begun < 15
    async with stranger() as node:
        await measure_link(node, measured.node.peer_id, measured.addresses, transfers=False)


# peers that lie


async def answers_with(node: Node, answer: bytes) -> None:
    """Whatever is asked on a measuring stream of `node`, it says this."""

    async def handle(_: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(COMMAND.size)
        writer.write(answer)
        await writer.drain()
        await reader.read()

    await node.serve(MEASURE_PROTOCOL, handle)


@pytest.mark.parametrize(
    "answer", [COMMAND.pack(PING, 0), COMMAND.pack(UPLOAD, 0), b"X" * 2**20], ids=["early", "otherwise", "a flood"]
)
async def test_an_answer_without_the_question_is_worth_nothing(answer: bytes) -> None:
    node = await Node.start(listen=LOOPBACK)
    try:
        await answers_with(node, answer)
        async with stranger() as asking:
            with pytest.raises(ProtocolError, match="something else"):
                await measure_link(asking, node.peer_id, await node.addresses(), transfers=True)
    finally:
        await node.stop()


async def test_a_peer_that_does_not_know_the_protocol_or_is_not_there_is_unreachable() -> None:
    node = await Node.start(listen=LOOPBACK)
    addresses = await node.addresses()
    async with stranger() as asking:
        try:
            with pytest.raises(PeerUnreachable):
                await measure_link(asking, node.peer_id, addresses, transfers=True)
        finally:
            await node.stop()
        with pytest.raises(PeerUnreachable):
            await measure_link(asking, node.peer_id, addresses, transfers=True)


# links that are known


@pytest.fixture
def lab() -> Iterator[Laboratory]:
    if reason := netlab_available():
        pytest.skip(reason)
    with Laboratory(["here", "there"], Link(delay_s=0.025, bandwidth_bps=20e6)) as laboratory:
        yield laboratory


async def test_a_link_is_found_to_be_as_it_is(lab: Laboratory) -> None:
    with lab.inside("there"):
        there = await Node.start(listen=[f"/ip4/{lab.host('there').address}/tcp/0"])
    with lab.inside("here"):
        here = await Node.start(client_only=True)
    try:
        await there.serve(MEASURE_PROTOCOL, MeasuringServer(lambda: False).handle)
        link = await measure_link(here, there.peer_id, await there.addresses(), transfers=True)
    finally:
        await here.stop()
        await there.stop()
    assert 0.050 <= link.round_trip_s < 0.075
    for rate in (link.upload_bytes_per_s, link.download_bytes_per_s):
        assert rate is not None and 0.4 * 2.5e6 < rate < 1.2 * 2.5e6
