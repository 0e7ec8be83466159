"""p2pd, which carries everything that peers say to one another: what becomes of its answers, and of those it leaves."""

from __future__ import annotations

import asyncio
import json
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from typing import Any

import psutil
import pytest

from benchmarks.directory import member
from benchmarks.directory_nodes import MODEL
from swarm.client import ClientSettings, Network
from swarm.commands.local_swarm import LocalPeer, LocalSwarm
from swarm.dht import Directory
from swarm.errors import DaemonDied
from swarm.models import open_checkpoint
from swarm.transport.node import Node

SOON_S = 10.0


@pytest.fixture
async def asked_and_asking() -> AsyncIterator[tuple[str, Node, Directory]]:
    """The peer id of a node of a directory, and a client of it."""
    async with member([]) as (asked, _), member(await asked.addresses(), client_only=True) as (asking, directory):
        yield asked.peer_id, asking, directory


async def test_calls_that_are_given_up_as_their_answers_come_leave_others_theirs(
    asked_and_asking: tuple[str, Node, Directory],
) -> None:
    """One call of hivemind's that was, among some dozens, left the process deaf to the whole directory."""
    asked, asking, directory = asked_and_asking
    end = time.monotonic() + 3
    while time.monotonic() < end:
        calls = [asyncio.create_task(directory.ping(asked)) for _ in range(8)]
        await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
        await give_up(*calls)
    assert await directory.ping(asked) is not None
    asking.check_daemon()


async def test_a_look_up_that_is_given_up_leaves_nothing_behind(
    asked_and_asking: tuple[str, Node, Directory],
) -> None:
    _, _, directory = asked_and_asking
    await directory.servers(MODEL)
    before = asyncio.all_tasks()
    for tenths in range(20):
        look_up = asyncio.create_task(directory.servers(MODEL))
        await asyncio.sleep(tenths / 10_000)
        await give_up(look_up)
    left = asyncio.all_tasks() - before
    _, unfinished = await asyncio.wait(left, timeout=SOON_S) if left else (left, left)
    assert not unfinished


async def give_up(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def kill_daemon(peer: LocalPeer) -> None:
    """SIGKILL for the p2pd of a process."""
    (daemon,) = (one for one in psutil.Process(peer.process.pid).children(recursive=True) if "p2pd" in one.name())
    daemon.kill()


async def test_a_client_without_a_daemon_says_so_and_does_not_call_the_swarm_empty(
    swarm: LocalSwarm, tiny: str
) -> None:
    await asyncio.to_thread(swarm.start_server, tiny)
    network = await Network.join(ClientSettings(initial_peers=tuple(swarm.initial_peers)))
    try:
        digest = open_checkpoint(tiny).model_digest
        assert await network.servers(digest)
        psutil.Process(network._node.daemon_pid).kill()
        async with asyncio.timeout(SOON_S):
            with pytest.raises(DaemonDied, match="p2pd, the network daemon of this program, has died"):
                async with network.while_daemon_lives():
                    await asyncio.Event().wait()
            with pytest.raises(DaemonDied):
                await network.servers(digest)
    finally:
        async with asyncio.timeout(SOON_S):
            await network.leave()


def test_a_gateway_without_a_daemon_answers_what_it_was_asked_and_ends(swarm: LocalSwarm, tiny: str) -> None:
    gateway = swarm.start_gateway("smollm2")
    assert gateway.ready is not None
    kill_daemon(gateway)
    body = json.dumps({"model": "smollm2", "prompt": "Hello", "max_tokens": 4}).encode()
    request = urllib.request.Request(
        f"{gateway.ready['url']}/v1/completions", body, {"Content-Type": "application/json"}
    )
    with pytest.raises(urllib.error.URLError) as failed:
        urllib.request.urlopen(request, timeout=SOON_S)
    if isinstance(failed.value, urllib.error.HTTPError):  # or it listens no more
        assert failed.value.code in (502, 503)
    assert gateway.process.wait(SOON_S) == 1
    assert "p2pd, the network daemon of this program, has died" in gateway.log.read_text()


def test_servers_and_bootstrap_peers_end_with_their_daemons(swarm: LocalSwarm, tiny: str) -> None:
    for peer in (swarm.start_server(tiny), swarm.bootstrap):
        kill_daemon(peer)
        assert peer.process.wait(SOON_S) == 1
        assert "p2pd, the network daemon of this program, has died" in peer.log.read_text()
        assert "Traceback" not in peer.log.read_text()
