"""Accept the streams of clients and of predecessors in their sessions, and end them when the server leaves."""

from __future__ import annotations

import asyncio
import contextlib
import logging

from swarm.errors import ProtocolError, first_of
from swarm.protocol.messages import Attach
from swarm.protocol.wire import Wire
from swarm.server.session_stream import Host, SessionStream
from swarm.transport.outgoing import write

logger = logging.getLogger(__name__)

_READ_BYTES = 256 * 1024
_OPEN_TIMEOUT_S = 30.0
_TASK_FAILURES = (OSError, TimeoutError)


class StreamServer:
    """Accepts session streams and link streams."""

    def __init__(self, host: Host) -> None:
        self.host = host

    async def handle_session(self, peer_id: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve a client's stream until its end; one that breaks the protocol loses this stream only."""
        stream = SessionStream(self.host, writer)
        try:
            await stream.serve(reader)
        except* ProtocolError as errors:
            logger.warning("closed a stream of %s: %s", peer_id, first_of(errors))
        except* _TASK_FAILURES:
            logger.info("%s vanished", peer_id)

    async def handle_link(self, peer_id: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Take what a predecessor in a session sends, until either has enough."""
        wire = Wire()
        session: SessionStream | None = None
        try:
            async with asyncio.timeout(_OPEN_TIMEOUT_S) as attaching:
                while data := await reader.read(_READ_BYTES):
                    for message, tensors in wire.receive(data):
                        if session is not None:
                            session.from_predecessor(message, tensors)
                        elif isinstance(message, Attach) and message.session in self.host.sessions:
                            attaching.reschedule(None)  # from here on the session's client is the judge
                            session = self.host.sessions[message.session]
                            session.predecessors.add(writer)
                            wire.send(await session.attach(message.prefix))
                        else:
                            raise ProtocolError("a link asks for a session that is not here")
                    write(writer, wire.take_outgoing())
                    await writer.drain()
        except ProtocolError as error:
            logger.warning("closed a link from %s: %s", peer_id, error)
        except _TASK_FAILURES:
            logger.info("the link from %s broke", peer_id)
        finally:
            if session is not None:
                session.predecessors.discard(writer)

    async def drain(self, within_s: float) -> None:
        """Take no new session, ask the present ones to move, and wait until they have, or `within_s` has passed."""
        if self.host.table is not None:
            self.host.table.draining = True
        for session in self.host.sessions.all():
            session.announce_drain(within_s)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await self.host.sessions.until_none()

    async def hang_up(self) -> None:
        """End the sessions that are still here, and wait until nothing is left of them."""
        for session in self.host.sessions.all():
            session.end()
        await self.host.sessions.until_none()
