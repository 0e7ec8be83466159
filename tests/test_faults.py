"""What goes wrong between peers ends in a clear error, harms nobody else, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import QUESTION, SmolLM2
from tiny_models import save_tiny_model
from warm_start import WarmLoopback

from swarm.client import ClientSettings, Network
from swarm.commands.local_swarm import LocalPeer, LocalSwarm
from swarm.dht import Announcement
from swarm.errors import BootstrapFailed, NoRoute, PeerUnreachable, SwarmError
from swarm.models import open_checkpoint
from swarm.page_names import PAGE
from swarm.protocol.frames import MAX_PAYLOAD_BYTES, encode_frame
from swarm.protocol.messages import (
    LINK_PROTOCOL,
    PROTOCOL_VERSION,
    STREAM_PROTOCOL,
    Attach,
    Close,
    Hello,
    Link,
    Linked,
    LinkLost,
    Message,
    Open,
    Opened,
    Output,
    Refusal,
    Step,
    encode_message,
)
from swarm.transport.node import Node
from swarm.transport.watched_stream import WatchedStream

TINY_TOKENS = 256


@pytest.fixture(scope="module")
def server(swarm: LocalSwarm, tiny: str) -> LocalPeer:
    """One server that hosts all of it, with little KV cache."""
    return swarm.start_server(tiny, "--blocks", "0:4", "--kv-tokens", str(TINY_TOKENS))


@pytest.fixture(scope="module")
def model(server: LocalPeer, tiny: str, connect: Callable[..., Any]) -> Any:
    return connect(tiny, deadline_s=3.0)


async def announcement(swarm: LocalSwarm, model: str) -> Announcement:
    """What the (one) server of a model says of itself now."""
    network = await Network.join(ClientSettings(initial_peers=tuple(swarm.initial_peers)))
    try:
        (found,) = await network.servers(open_checkpoint(model).model_digest)
        return found
    finally:
        await network.leave()


class Opener:
    """A client without a swarm: one session stream, on which anything can be said."""

    def __init__(self, node: Node, server: LocalPeer, model: str, **fields: Any) -> None:
        request = {"start": 0, "end": 4, "batch": 1, "max_length": 8, "session": secrets.token_hex(16), **fields}
        self.request = Open(model=model, **request)
        self.stream = WatchedStream(node, server.peer_id, server.addresses, STREAM_PROTOCOL)
        self._heard: asyncio.Queue[tuple[Message, dict[str, torch.Tensor]]] = asyncio.Queue()
        self._task = asyncio.create_task(self.stream.run(lambda *heard: self._heard.put_nowait(heard)))
        self.stream.send(self.request)

    async def hear(self) -> tuple[Message, dict[str, torch.Tensor]]:
        """The next thing that the server says."""
        async with asyncio.timeout(15):
            return await self._heard.get()

    async def open(self) -> Opener:
        """Wait until there is room."""
        message, _ = await self.hear()
        assert isinstance(message, Opened), message
        return self

    async def hung_up(self) -> bool:
        """Wait until the server ends it."""
        async with asyncio.timeout(15):
            return isinstance((await asyncio.gather(self._task, return_exceptions=True))[0], PeerUnreachable)

    async def close(self) -> None:
        """Leave, if the server has not ended it."""
        self.stream.send(Close())
        await self.vanish()

    async def vanish(self) -> None:
        """Leave without a word."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


@contextlib.asynccontextmanager
async def stranger() -> AsyncIterator[Node]:
    """A node that belongs to nobody's swarm."""
    node = await Node.start(client_only=True)
    try:
        yield node
    finally:
        await node.stop()


async def converse(swarm: LocalSwarm, server: LocalPeer, *writes: list[Any], protocol: str = STREAM_PROTOCOL) -> bytes:
    """Send raw bytes to a server on a stream; return all it answers until it hangs up."""
    node = await Node.start(client_only=True)
    try:
        await node.connect(server.peer_id, server.addresses)
        reader, writer = await node.open_stream(server.peer_id, protocol)
        for buffers in writes:
            writer.writelines(buffers)
        async with asyncio.timeout(10):
            answer = await reader.read(-1)
        writer.close()
        return answer
    finally:
        await node.stop()


def still_serves(model: Any) -> bool:
    ids = torch.tensor([[1, 2, 3]])
    return bool(model.generate(ids, do_sample=False, max_new_tokens=3, min_new_tokens=3).shape == (1, 6))


HELLO = encode_message(Hello(version=PROTOCOL_VERSION, agent="test"))
TOKEN = "0" * 32
STEP = encode_message(Step(sequence=1, position=0, tensors=[]), {"hidden_states": torch.zeros(1, 1, 64)})


@pytest.mark.parametrize(
    "bytes_",
    [
        [b"GET / HTTP/1.1\r\nHost: example.org\r\n\r\n" * 4],
        [b"SWRM" + (12).to_bytes(4, "big") + (MAX_PAYLOAD_BYTES + 1).to_bytes(4, "big")],
        HELLO + encode_frame({"type": "format the disk"}),
        HELLO
        + encode_frame(
            {"type": "open", "session": TOKEN, "model": "x" * 64, "start": 3, "end": 2, "batch": -1, "max_length": 1}
        ),
        HELLO + STEP,
        STEP,
        encode_message(Hello(version=PROTOCOL_VERSION - 1, agent="test")),
        encode_message(Hello(version=99, agent="test")),
        HELLO + HELLO,
    ],
    ids=[
        "not our protocol",
        "frame over the limit",
        "unknown message",
        "impossible open",
        "step before open",
        "step before hello",
        "the last version",
        "version 99",
        "hello twice",
    ],
)
async def test_a_broken_stream_is_closed_and_nobody_else_notices(
    bytes_: list[bytes], swarm: LocalSwarm, server: LocalPeer, model: Any
) -> None:
    answer = await converse(swarm, server, bytes_)
    assert len(answer) < 200  # at most a hello
    assert server.process.poll() is None
    assert await asyncio.to_thread(still_serves, model)


async def test_a_server_refuses_another_model_and_blocks_that_it_does_not_host(server: LocalPeer, tiny: str) -> None:
    model = open_checkpoint(tiny).model_digest
    async with stranger() as node:
        for fields, code, words in [
            ({"model": "0" * 64}, "wrong_model", "different weights"),
            ({"start": 2, "end": 9}, "blocks_not_hosted", "hosts blocks [0, 4), not [2, 9)"),
            ({"start": 2, "end": 2}, "blocks_not_hosted", "not [2, 2)"),
            ({"max_length": 10_000}, "session_too_large", "more than this server has in all: 256"),
        ]:
            session = Opener(node, server, **{"model": model, **fields})
            message, _ = await session.hear()
            assert isinstance(message, Refusal) and message.code == code and words in message.reason
            assert message.retry_after_s is None  # it would not help
            assert await session.hung_up()


async def test_a_token_that_is_taken_opens_no_second_session(server: LocalPeer, tiny: str) -> None:
    model = open_checkpoint(tiny).model_digest
    async with stranger() as node:
        first = await Opener(node, server, model).open()
        second = Opener(node, server, model, session=first.request.session)
        assert await second.hung_up()
        first.stream.send(Step(sequence=1, position=0, tensors=[]), {"hidden_states": torch.zeros(1, 1, 64)})
        assert isinstance((await first.hear())[0], Output)
        await first.close()


@pytest.mark.parametrize(
    "bytes_",
    [
        HELLO + encode_message(Attach(session="f" * 32)),
        HELLO + STEP,
        HELLO + encode_message(Attach(session="f" * 32)) + STEP,
        HELLO + encode_frame({"type": "attach", "session": "../../etc/passwd"}),
        encode_message(Attach(session="f" * 32)),
        [b"GET / HTTP/1.1\r\nHost: example.org\r\n\r\n" * 4],
    ],
    ids=["wrong token", "no token", "wrong token and step", "no token at all", "no hello", "not our protocol"],
)
async def test_a_link_of_a_stranger_is_closed_and_the_session_goes_on(
    bytes_: list[Any], swarm: LocalSwarm, server: LocalPeer, tiny: str
) -> None:
    async with stranger() as node:
        session = await Opener(node, server, open_checkpoint(tiny).model_digest).open()
        session.stream.send(Step(sequence=1, position=0, tensors=[]), {"hidden_states": torch.ones(1, 1, 64)})
        assert isinstance((await session.hear())[0], Output)
        assert len(await converse(swarm, server, bytes_, protocol=LINK_PROTOCOL)) < 200
        session.stream.send(Step(sequence=2, position=1, tensors=[]), {"hidden_states": torch.ones(1, 1, 64)})
        message, _ = await session.hear()
        assert isinstance(message, Output) and message.sequence == 2
        await session.close()


async def test_a_predecessor_that_attaches_twice_or_talks_nonsense_loses_its_link_only(
    swarm: LocalSwarm, server: LocalPeer, tiny: str
) -> None:
    async with stranger() as node:
        session = await Opener(node, server, open_checkpoint(tiny).model_digest).open()
        attach = encode_message(Attach(session=session.request.session))
        for bytes_ in [HELLO + attach + attach, HELLO + attach + encode_message(Close())]:
            assert len(await converse(swarm, server, bytes_, protocol=LINK_PROTOCOL)) < 300
        session.stream.send(Step(sequence=1, position=0, tensors=[]), {"hidden_states": torch.ones(1, 1, 64)})
        assert isinstance((await session.hear())[0], Output)
        await session.close()


@pytest.mark.parametrize(
    "link",
    [
        Link(link=1, peer_id="not a peer id 0OIl", session=TOKEN),
        Link(link=1, peer_id="é", session=TOKEN),
        Link(link=1, peer_id="", session=TOKEN),
        Link(link=1, peer_id="Q" * 128, session=TOKEN),
        Link(link=1, peer_id="12D3KooWRE8mzAbLiPHb17uqHkoab9NUSjfeswJvYjvTuAVikvKg", session=TOKEN),
        Link(link=1, peer_id="12D3KooWRE8mzAbLiPHb17uqHkoab9NUSjfeswJvYjvTuAVikvKg", session=TOKEN,
             addresses=["/ip4/127.0.0.1/tcp/9", "", "/", "\x00", "/unix/etc", "/ip4/999.1.1.1/tcp/-1", "x" * 256]),
    ],
    ids=["no peer id", "not ASCII", "empty", "long", "nobody", "garbage addresses"],
)  # fmt: skip
async def test_a_link_to_nowhere_is_said_and_the_session_goes_on(link: Link, server: LocalPeer, tiny: str) -> None:
    async with stranger() as node:
        session = await Opener(node, server, open_checkpoint(tiny).model_digest).open()
        session.stream.send(link)
        message, _ = await session.hear()
        assert isinstance(message, LinkLost) and message.link == 1 and message.reason.isprintable()
        session.stream.send(Link(link=2))
        assert (await session.hear())[0] == Linked(link=2)
        session.stream.send(Step(sequence=1, position=0, tensors=[]), {"hidden_states": torch.ones(1, 1, 64)})
        assert isinstance((await session.hear())[0], Output)
        await session.close()


async def test_a_link_to_oneself_or_to_a_token_that_is_not_there_is_lost(server: LocalPeer, tiny: str) -> None:
    async with stranger() as node:
        session = await Opener(node, server, open_checkpoint(tiny).model_digest).open()
        for number, token in enumerate([session.request.session, "f" * 32], start=1):
            link = Link(link=number, peer_id=server.peer_id, addresses=server.addresses[:8], session=token)
            session.stream.send(link)
            message, _ = await session.hear()
            assert isinstance(message, LinkLost) and message.link == number
        await session.close()


async def test_a_server_whose_client_vanishes_frees_its_links_as_well(swarm: LocalSwarm, tmp_path: Path) -> None:
    save_tiny_model("qwen3", tmp_path)
    model = open_checkpoint(str(tmp_path)).model_digest
    servers = [swarm.start_server(str(tmp_path), "--blocks", blocks, wait=False) for blocks in ("0:2", "2:4")]
    for server in servers:
        await asyncio.to_thread(server.wait_until_ready)
    async with stranger() as node:
        last = await Opener(node, servers[1], model, start=2, end=4).open()
        idle = [open_sockets(server) for server in servers]
        first = await Opener(node, servers[0], model, start=0, end=2).open()
        token, addresses = last.request.session, servers[1].addresses[:8]
        first.stream.send(Link(link=1, peer_id=servers[1].peer_id, addresses=addresses, session=token))
        assert (await first.hear())[0] == Linked(link=1)
        first.stream.send(Step(sequence=1, position=0, tensors=[]), {"hidden_states": torch.ones(1, 1, 64)})
        message, _ = await last.hear()
        assert isinstance(message, Output) and [(hop.start, hop.end) for hop in message.hops] == [(0, 2), (2, 4)]
        assert [open_sockets(server) for server in servers] == [idle[0] + 2, idle[1] + 1]
        await first.vanish()
        async with asyncio.timeout(10):
            while [open_sockets(server) for server in servers] != idle:  # noqa: ASYNC110 - other processes' events
                await asyncio.sleep(0.1)
        last.stream.send(Step(sequence=2, position=1, tensors=[]), {"hidden_states": torch.ones(1, 1, 64)})
        assert isinstance((await last.hear())[0], Output)  # its own session lives on
        await last.close()


def open_sockets(peer: LocalPeer) -> int:
    """Of the server's process: each of its streams is one, to its p2pd."""
    count = 0
    for descriptor in Path(f"/proc/{peer.process.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed since it was listed
            count += os.readlink(descriptor).startswith("socket:")  # noqa: PTH115
    return count


async def test_the_cache_of_a_client_that_vanishes_is_freed(swarm: LocalSwarm, server: LocalPeer, tiny: str) -> None:
    script = f"""
import sys, torch
from swarm.client import AutoDistributedModelForCausalLM
model = AutoDistributedModelForCausalLM.from_pretrained({tiny!r}, initial_peers=sys.argv[1:])
session = model.inference_session(max_length=200)
session.step(torch.zeros(1, 3, model.config.hidden_size))
print("open", flush=True)
sys.stdin.read()
"""
    client = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, *swarm.initial_peers, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert client.stdout is not None and await client.stdout.readline() == b"open\n"
    await until(lambda record: record.sessions == 1 and record.free_kv_tokens == TINY_TOKENS - 13 * PAGE, swarm, tiny)
    client.kill()
    await client.wait()
    await until(lambda record: record.sessions == 0 and record.free_kv_tokens == TINY_TOKENS, swarm, tiny)


async def until(condition: Callable[[Announcement], bool], swarm: LocalSwarm, model: str) -> None:
    """Watch a server's announcements (renewed every 4 s) until one fulfils `condition`."""
    async with asyncio.timeout(20):
        while not condition(await announcement(swarm, model)):  # noqa: ASYNC110 - another process's event
            await asyncio.sleep(0.5)


def test_a_session_and_its_cache_end_when_the_last_reference_goes(model: Any, swarm: LocalSwarm, tiny: str) -> None:
    output = model(torch.tensor([[1, 2, 3]]), use_cache=True)
    assert asyncio.run(announcement(swarm, tiny))
    del output
    asyncio.run(until(lambda record: record.sessions == 0, swarm, tiny))


def test_missing_blocks_are_named_and_the_wait_is_bounded(
    swarm: LocalSwarm, connect: Callable[..., Any], tmp_path: Path
) -> None:
    save_tiny_model("qwen2", tmp_path)
    swarm.start_server(str(tmp_path), "--blocks", "0:1")
    model = connect(str(tmp_path), deadline_s=2.0)
    begun = time.monotonic()
    with pytest.raises(NoRoute, match="No server is available for blocks 1–3"):
        model.generate(torch.tensor([[1]]), max_new_tokens=2)
    assert 2 <= time.monotonic() - begun < 6


def test_servers_that_are_excluded_or_of_another_precision_are_not_used(
    server: LocalPeer, tiny: str, connect: Callable[..., Any]
) -> None:
    blocked = connect(tiny, deadline_s=0.5, blocked_servers=[server.peer_id])
    with pytest.raises(NoRoute, match="excluded by this client's settings"):
        blocked(torch.tensor([[1]]))
    other = connect(tiny, deadline_s=0.5, dtype=torch.bfloat16)
    with pytest.raises(NoRoute, match="computes in float32, this client wants bfloat16"):
        other(torch.tensor([[1]]))
    mixed = connect(tiny, dtype=torch.bfloat16, any_precision=True)
    assert mixed(torch.tensor([[1]])).logits.dtype == torch.bfloat16


def test_a_joining_server_is_waited_for(swarm: LocalSwarm, connect: Callable[..., Any], smollm2: SmolLM2) -> None:
    model = connect("smollm2")
    server = swarm.start_server("smollm2", "--blocks", "auto", "--threads", "1", wait=False)
    ids = model.generate(**smollm2.chat(QUESTION), do_sample=False, max_new_tokens=4, min_new_tokens=4)
    assert ids.tolist() == smollm2.greedy(QUESTION, 4).tolist()
    server.wait_until_ready()


def test_no_bootstrap_reachable_is_said_with_every_address(connect: Callable[..., Any], tiny: str) -> None:
    from swarm.client import AutoDistributedModelForCausalLM

    nobody = "/ip4/127.0.0.1/tcp/9/p2p/12D3KooWRE8mzAbLiPHb17uqHkoab9NUSjfeswJvYjvTuAVikvKg"
    with pytest.raises(BootstrapFailed, match="connection refused"):
        AutoDistributedModelForCausalLM.from_pretrained(tiny, initial_peers=[nobody])
    with pytest.raises(ValueError, match="not a peer's address"):
        AutoDistributedModelForCausalLM.from_pretrained(tiny, initial_peers=["example.org:1234"])


def test_the_server_command_explains_what_is_wrong(warm: WarmLoopback, tiny: str, swarm: LocalSwarm) -> None:
    port = swarm.bootstrap.addresses[0].split("/")[4]
    for arguments, expected in [
        (["--memory", "400MiB"], "only 400.0 MiB are allowed"),
        (["--blocks", "0:9"], "has blocks 0 to 3"),
        (["--device", "cuda:7"], "no device 'cuda:7'"),
        (["--host", "127.0.0.1", "--port", port], "Address already in use"),
        (["--initial-peers", "/ip4/127.0.0.1/tcp/9/p2p/12D3KooWRE8mzAbLiPHb17uqHkoab9NUSjfeswJvYjvTuAVikvKg"],
         "None of the initial peers answered"),
    ]:  # fmt: skip
        result = warm.run("swarm.commands.server", tiny, *arguments, timeout_s=60)
        assert (result.returncode, "Traceback" in result.stderr) == (1, False)
        assert expected in result.stderr
    assert "is not a span" in warm.run("swarm.commands.server", tiny, "--blocks", "3:1").stderr


def test_a_peer_that_does_not_become_ready_is_given_up_with_its_last_words(
    swarm: LocalSwarm, tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = tmp_path_factory.mktemp("slow")
    save_tiny_model("llama", directory)
    peer = swarm.start_server(str(directory), wait=False)
    peer.signal(signal.SIGSTOP)
    with pytest.raises(SwarmError, match=rf"{peer.name} was not ready within 0\.5 s; it printed nothing"):
        peer.wait_until_ready(timeout_s=0.5)
    peer.signal(signal.SIGCONT)
    peer.wait_until_ready()
    assert peer.addresses
    with pytest.raises(SwarmError, match=r"(?s)was not ready within 0\.5 s; it printed last:.*Press Ctrl-C to leave"):
        peer.wait_until_ready(timeout_s=0.5)
    peer.signal(signal.SIGTERM)
    with pytest.raises(SwarmError, match=r"(?s)ended with code 0 instead of becoming ready.*Left the swarm"):
        peer.wait_until_ready()


def test_the_second_interrupt_stops_at_once(swarm: LocalSwarm, tiny: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "swarm.commands.server", tiny, "--host", "127.0.0.1", "--drain-timeout", "60", "--json"],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    ready = next(event for event in map(json.loads, process.stdout) if event["event"] == "ready")
    peer = LocalPeer("server", process, Path(os.devnull), ready)

    async def hold_a_session_and_interrupt_twice() -> int:
        node = await Node.start(client_only=True)
        await Opener(node, peer, open_checkpoint(tiny).model_digest).open()
        os.killpg(process.pid, signal.SIGINT)
        await asyncio.sleep(0.5)
        assert process.poll() is None  # it waits for the session
        os.killpg(process.pid, signal.SIGINT)
        code = await asyncio.to_thread(process.wait, 10)
        await node.stop()
        return code

    assert asyncio.run(hold_a_session_and_interrupt_twice()) == 130
