"""What goes wrong between peers ends in a clear error, harms nobody else, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import QUESTION, SmolLM2
from tiny_models import save_tiny_model

from swarm.client import ClientSettings, Network
from swarm.client.hop import Hop
from swarm.commands.local_swarm import LocalPeer, LocalSwarm
from swarm.dht import Announcement, State
from swarm.errors import BlocksNotHosted, BootstrapFailed, CacheFull, NoRoute, WrongModel
from swarm.models import open_checkpoint
from swarm.protocol.frames import MAX_PAYLOAD_BYTES, encode_frame
from swarm.protocol.messages import STREAM_PROTOCOL, Hello, encode_message
from swarm.routing import Leg
from swarm.transport.node import Node

TINY_TOKENS = 256


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny random llama with 4 blocks."""
    directory = tmp_path_factory.mktemp("tiny")
    save_tiny_model("llama", directory)
    return str(directory)


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


async def converse(swarm: LocalSwarm, server: LocalPeer, *writes: list[Any]) -> bytes:
    """Send raw bytes to a server on a session stream; return all it answers until it hangs up."""
    node = await Node.start(client_only=True)
    try:
        await node.connect(server.peer_id, server.addresses)
        reader, writer = await node.open_stream(server.peer_id, STREAM_PROTOCOL)
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


HELLO = encode_message(Hello(version=1, agent="test"))


@pytest.mark.parametrize(
    "bytes_",
    [
        [b"GET / HTTP/1.1\r\nHost: example.org\r\n\r\n" * 4],
        [b"SWRM" + (12).to_bytes(4, "big") + (MAX_PAYLOAD_BYTES + 1).to_bytes(4, "big")],
        HELLO + encode_frame({"type": "format the disk"}),
        HELLO + encode_frame({"type": "open", "model": "x" * 64, "start": 3, "end": 2, "batch": -1, "max_length": 1}),
        encode_message(Hello(version=99, agent="test")),
        HELLO + HELLO,
    ],
    ids=["not our protocol", "frame over the limit", "unknown message", "impossible open", "version 99", "hello twice"],
)
async def test_a_broken_stream_is_closed_and_nobody_else_notices(
    bytes_: list[bytes], swarm: LocalSwarm, server: LocalPeer, model: Any
) -> None:
    answer = await converse(swarm, server, bytes_)
    assert len(answer) < 200  # at most a hello
    assert server.process.poll() is None
    assert await asyncio.to_thread(still_serves, model)


async def test_a_server_refuses_another_model_and_blocks_that_it_does_not_host(
    swarm: LocalSwarm, server: LocalPeer, tiny: str
) -> None:
    record = await announcement(swarm, tiny)
    node = await Node.start(client_only=True)
    request = {"batch": 1, "max_length": 8, "settings": ClientSettings()}
    try:
        with pytest.raises(WrongModel, match="different weights"):
            await Hop.open(node, record, Leg(server.peer_id, 0, 4), model="0" * 64, **request)
        with pytest.raises(BlocksNotHosted, match=r"hosts blocks \[0, 4\), not \[2, 9\)"):
            await Hop.open(node, record, Leg(server.peer_id, 2, 9), model=record.model, **request)
        with pytest.raises(CacheFull, match="positions of KV cache"):
            await Hop.open(
                node, record, Leg(server.peer_id, 0, 4), model=record.model, **{**request, "max_length": 10_000}
            )
    finally:
        await node.stop()


def test_a_session_that_does_not_fit_says_so_within_the_deadline(model: Any) -> None:
    begun = time.monotonic()
    with pytest.raises(NoRoute, match="positions of KV cache are more than"):
        model.generate(torch.tensor([[1]]), max_new_tokens=TINY_TOKENS * 4)
    assert time.monotonic() - begun < 8


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
    await until(lambda record: record.sessions == 1 and record.free_kv_tokens == TINY_TOKENS - 200, swarm, tiny)
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
    with pytest.raises(NoRoute, match="computes in float32, this client in bfloat16"):
        other(torch.tensor([[1]]))
    mixed = connect(tiny, dtype=torch.bfloat16, any_precision=True)
    assert mixed(torch.tensor([[1]])).logits.dtype == torch.bfloat16


def test_a_joining_server_is_waited_for(swarm: LocalSwarm, connect: Callable[..., Any], smollm2: SmolLM2) -> None:
    model = connect("smollm2")
    server = swarm.start_server("smollm2", "--blocks", "auto", wait=False)
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


def run_server(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "swarm.commands.server", *arguments], capture_output=True, text=True, timeout=60
    )


def test_the_server_command_explains_what_is_wrong(tiny: str, swarm: LocalSwarm) -> None:
    port = swarm.bootstrap.addresses[0].split("/")[4]
    for arguments, expected in [
        (["--memory", "500MiB"], "only 500.0 MiB are allowed"),
        (["--blocks", "0:9"], "has blocks 0 to 3"),
        (["--device", "cuda:7"], "no device 'cuda:7'"),
        (["--host", "127.0.0.1", "--port", port], "Address already in use"),
        (["--initial-peers", "/ip4/127.0.0.1/tcp/9/p2p/12D3KooWRE8mzAbLiPHb17uqHkoab9NUSjfeswJvYjvTuAVikvKg"],
         "None of the initial peers answered"),
    ]:  # fmt: skip
        result = run_server(tiny, *arguments)
        assert (result.returncode, "Traceback" in result.stderr) == (1, False)
        assert expected in result.stderr
    assert "is not a span" in run_server(tiny, "--blocks", "3:1").stderr


def test_the_second_interrupt_stops_at_once(swarm: LocalSwarm, tiny: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "swarm.commands.server", tiny, "--host", "127.0.0.1", "--drain-timeout", "60", "--json"],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    ready = next(event for event in map(json.loads, process.stdout) if event["event"] == "ready")

    async def hold_a_session_and_interrupt_twice() -> int:
        node = await Node.start(client_only=True)
        record = Announcement(
            peer_id=ready["peer_id"],
            model=open_checkpoint(tiny).model_digest,
            state=State.ONLINE,
            num_blocks=4,
            start=0,
            end=4,
            dtype="float32",
            throughput=1,
            free_kv_tokens=1,
            version="",
            issued_at=0,
            addresses=ready["addresses"],
        )
        leg, settings = Leg(record.peer_id, 0, 4), ClientSettings()
        await Hop.open(node, record, leg, model=record.model, batch=1, max_length=8, settings=settings)
        os.killpg(process.pid, signal.SIGINT)
        await asyncio.sleep(0.5)
        assert process.poll() is None  # it waits for the session
        os.killpg(process.pid, signal.SIGINT)
        code = await asyncio.to_thread(process.wait, 10)
        await node.stop()
        return code

    assert asyncio.run(hold_a_session_and_interrupt_twice()) == 130
