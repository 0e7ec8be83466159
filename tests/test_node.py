"""The libp2p node on real sockets: identity, ports, daemons that die with their parents."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from swarm.errors import PeerUnreachable, PortTaken, SwarmError
from swarm.transport.identity import Identity, IdentityError, verify
from swarm.transport.node import Node

LOOPBACK = ["/ip4/127.0.0.1/tcp/0"]


def test_an_identity_persists_is_private_and_signs(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "identity.key"
    identity = Identity.load_or_create(path)
    assert Identity.load_or_create(path).peer_id == identity.peer_id
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    signature = identity.sign(b"hello")
    assert verify(identity.peer_id, b"hello", signature)
    assert not verify(identity.peer_id, b"hullo", signature)
    assert not verify(Identity.load_or_create(tmp_path / "other").peer_id, b"hello", signature)
    assert not verify("not a peer id", b"hello", signature)
    path.chmod(0o600)
    path.write_bytes(b"nonsense")
    with pytest.raises(IdentityError, match="Move it away"):
        Identity.load_or_create(path)


def test_an_identity_that_a_full_disk_has_no_room_for_is_a_clear_error(full_disk: Path) -> None:
    path = full_disk / "identity.key"
    with pytest.raises(IdentityError, match=r"identity\.key cannot be used: .*No space left"):
        Identity.load_or_create(path)
    (full_disk / "filling").unlink()
    assert Identity.load_or_create(path).peer_id == Identity.load_or_create(path).peer_id


async def test_a_node_that_a_full_disk_has_no_room_for_is_a_clear_error(
    full_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(full_disk))
    with pytest.raises(SwarmError, match="No space left"):
        await Node.start(client_only=True)
    assert [entry.name for entry in await asyncio.to_thread(os.scandir, full_disk)] == ["filling"]
    monkeypatch.setattr(tempfile, "tempdir", str(full_disk / "nowhere"))
    with pytest.raises(SwarmError, match="no room for a temporary identity"):
        await Node.start(client_only=True)


async def test_streams_carry_megabytes_and_a_stranger_is_unreachable(tmp_path: Path) -> None:
    identity = Identity.load_or_create(tmp_path / "identity.key")
    server, client = await Node.start(identity=identity, listen=LOOPBACK), await Node.start(client_only=True)
    try:

        async def echo(peer_id: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            assert peer_id == client.peer_id
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()

        await server.serve("/test/echo", echo)
        assert (await server.addresses())[0].endswith(f"/p2p/{identity.peer_id}")
        await client.bootstrap(await server.addresses())
        reader, writer = await client.open_stream(server.peer_id, "/test/echo")
        data = os.urandom(5_000_000)
        writer.write(data)
        assert await reader.readexactly(len(data)) == data
        with pytest.raises(PeerUnreachable, match="opened no stream"):
            await client.open_stream(server.peer_id, "/test/nothing")
        with pytest.raises(PeerUnreachable):
            await client.connect(Identity.load_or_create(tmp_path / "x").peer_id, ["/ip4/127.0.0.1/tcp/9"])
    finally:
        await client.stop()
        await server.stop()


def assert_out_of_reach_of_other_users(socket_path: Path) -> None:
    assert stat.S_ISSOCK(socket_path.stat().st_mode)
    directory = socket_path.parent.stat()
    assert (stat.S_IMODE(directory.st_mode), directory.st_uid) == (0o700, os.getuid())


async def test_the_daemons_control_socket_is_private_and_gone_afterwards() -> None:
    node = await Node.start(client_only=True)
    socket_path = Path(str(node._daemon.control_address).removeprefix("/unix"))
    try:
        assert_out_of_reach_of_other_users(socket_path)
    finally:
        await node.stop()
    assert not await asyncio.to_thread(socket_path.parent.exists)


async def test_a_taken_port_is_noticed_even_if_p2pd_would_share_it() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        with pytest.raises(PortTaken, match="--port"):
            await Node.start(listen=[f"/ip4/127.0.0.1/tcp/{holder.getsockname()[1]}"])
    first = await Node.start(listen=LOOPBACK)
    try:
        port = (await first.addresses())[0].split("/")[4]
        with pytest.raises(PortTaken, match=port):
            await Node.start(listen=[f"/ip4/127.0.0.1/tcp/{port}"])
    finally:
        await first.stop()


def test_the_daemon_dies_with_its_parent_even_on_sigkill() -> None:
    script = """
import asyncio
from swarm.transport.node import Node
async def main():
    node = await Node.start(client_only=True)
    print(node.daemon_pid, flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    daemon = psutil.Process(int(parent.stdout.readline()))
    assert "p2pd" in daemon.name()
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 5
    while daemon.is_running() and daemon.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "p2pd outlived its parent"
        time.sleep(0.02)
