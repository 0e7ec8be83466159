"""A stream under watch over real sockets: who only listens still shows that it is there."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import pytest
import uvloop

from swarm.errors import PeerUnreachable
from swarm.protocol.messages import STREAM_PROTOCOL, Ping, Replayed
from swarm.protocol.wire import Wire
from swarm.transport import watched_stream
from swarm.transport.node import Node
from swarm.transport.outgoing import write
from swarm.transport.watched_stream import WatchedStream

LISTEN = ("/ip4/127.0.0.1/tcp/0",)


class Listener(Wire):
    """A peer's end that counts pings."""

    pings = 0

    def count(self, data: bytes) -> None:
        self.pings += data.count(Ping().type.encode())


async def test_a_client_that_only_listens_still_pings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watched_stream, "_IDLE_PING_S", 0.3)
    wire, heard = Listener(), []

    async def chatter(_: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Says something all the time, and answers nothing."""
        for _ in range(100):
            wire.send(Replayed(sequence=1))
            writer.writelines(wire.take_outgoing())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.03):
                    wire.count(await reader.read(1024))

    server, client = await Node.start(listen=LISTEN), await Node.start(client_only=True)
    try:
        await server.serve(STREAM_PROTOCOL, chatter)
        stream = WatchedStream(client, server.peer_id, await server.addresses(), STREAM_PROTOCOL)
        with pytest.raises(PeerUnreachable, match="hung up"):
            await stream.run(lambda message, _: heard.append(message))
    finally:
        await client.stop()
        await server.stop()
    assert len(heard) == 100
    assert 4 <= wire.pings <= 20


def test_writing_to_a_stream_that_was_closed_a_moment_ago_is_a_broken_connection(tmp_path: Path) -> None:
    async def write_too_late() -> None:
        server = await asyncio.start_unix_server(lambda reader, writer: None, tmp_path / "socket")
        _, writer = await asyncio.open_unix_connection(tmp_path / "socket")
        writer.transport.abort()
        await asyncio.sleep(0.01)
        try:
            with pytest.raises(ConnectionResetError):
                write(writer, [b"too late"])
        finally:
            server.close()

    uvloop.run(write_too_late())
