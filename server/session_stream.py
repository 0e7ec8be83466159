"""One client's stream: its bytes to the session's state machine, work to the compute thread, results on."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from swarm.errors import CacheFull, Draining, PeerError, ProtocolError, RemoteError, SessionTooLarge
from swarm.page_names import PAGE
from swarm.protocol.messages import Attached, Drain, Message, Open, Opened, Refusal
from swarm.protocol.served_actions import Action, Compute, Dial, End, HangUp, Spent, ToClient, ToSuccessor, Work
from swarm.protocol.served_session import ServedSession
from swarm.protocol.wire import Wire
from swarm.server.crowd import Crowd
from swarm.server.links import OutgoingLink
from swarm.server.open_sessions import GETS_ON_WITHIN_S, OpenSessions
from swarm.server.sessions import HeldSession, SessionTable
from swarm.server.step_runner import StepRunner
from swarm.transport.node import Node
from swarm.transport.outgoing import write

logger = logging.getLogger(__name__)

_READ_BYTES = 256 * 1024
_WRITE_TIMEOUT_S = 30.0
_MAX_UNREAD_BYTES = 256 * 1024 * 1024
"""A client that leaves more than this unread loses its session."""
_LET_IN_WITHIN_S = 60.0
"""What another session brings is waited for no longer than this, …"""
_ATTACHED_WITHIN_S = 1.0
"""… and over a link, whose other end is pinging meanwhile, than this."""


@dataclass
class Host:
    """What the streams of a server have in common."""

    node: Node
    steps: StepRunner
    table: SessionTable | None
    """Of the span that is hosted now; None while there is none."""
    hidden_size: int
    dtype: str
    """The precision in which hidden states are to come, by name."""
    idle_timeout_s: float
    sessions: OpenSessions[SessionStream] = field(default_factory=OpenSessions)
    turned_away: Crowd = field(default_factory=Crowd)
    """Those for whom there was no room lately."""


class SessionStream:
    """One client's stream, the session on it, and the links that it keeps."""

    def __init__(self, host: Host, writer: asyncio.StreamWriter) -> None:
        self._host, self._writer = host, writer
        self._wire = Wire()
        self._session: ServedSession | None = None
        self._held: HeldSession | None = None
        self._table: SessionTable | None = None
        self._token = ""
        self._links: dict[int, tuple[OutgoingLink, asyncio.Task[None]]] = {}
        self._tasks: asyncio.TaskGroup | None = None
        self._computing: asyncio.Future[Any] | None = None
        self._ended = asyncio.Event()
        self._promised: Sequence[bytes] = ()  # pages that its client is going to send
        self._got_on_at = time.monotonic()
        self._letting_in: asyncio.Task[None] | None = None
        self.predecessors: set[asyncio.StreamWriter] = set()
        """Link streams that lead here."""

    async def serve(self, reader: asyncio.StreamReader) -> None:
        """Until the session ends."""
        try:
            async with asyncio.TaskGroup() as self._tasks:
                tasks = self._tasks
                reading = tasks.create_task(self._read(reader))
                await self._ended.wait()
                await self._flush()
                reading.cancel()
                if self._computing is not None:
                    self._computing.cancel()  # nobody waits for the result any more
                for _, task in self._links.values():
                    task.cancel()
                if self._letting_in is not None:
                    self._letting_in.cancel()
        finally:
            self._ended.set()  # also for work that is under way, if something went wrong
            for writer in self.predecessors:
                writer.close()
            if self._held is not None and self._table is not None:
                self._host.sessions.closed(self._token)
                self._table.close(self._held)
                self._host.steps.left(self._held)
                self._host.steps.compute.soon(self._held.cache.release)
            self._session = self._held = self._table = (
                None  # large; and the traceback of what ended this may live for long
            )

    def brings(self, held: HeldSession, prefix: Sequence[bytes], known: int) -> bool:
        """Whether it is at work on the next of the pages `prefix`, of which `held` would know so many."""
        if self._held is None or self._session is None or self._held is held or self._held.blocks != held.blocks:
            return False
        has_passed = self._session.computed_positions >= (known + 1) * PAGE
        if has_passed or time.monotonic() > self._got_on_at + GETS_ON_WITHIN_S:
            return False
        if self._promised[: known + 1] == prefix[: known + 1]:
            return True
        has_more = self._session.position >= (known + 1) * PAGE
        return known > 0 and has_more and self._held.cache.names == prefix[:known]

    async def attach(self, prefix: Sequence[bytes]) -> Attached:
        """A predecessor has come: it is told whether it must send the session's state first, and what is known of it.

        Args:
            prefix: names of the pages that will come first.
        """
        if self._held is not None:
            await self._host.sessions.wait_for_others(self._held, prefix, _ATTACHED_WITHIN_S)
        if self._session is None:
            raise ProtocolError("a link asks for a session that has just ended")
        if self._session.attach():
            return Attached(fresh=True, known=self._known(prefix))
        return Attached(fresh=False, accepted=self._session.accepted)

    def _known(self, prefix: Sequence[bytes]) -> int:
        """So many pages of what comes first can be recalled."""
        assert self._session is not None and self._held is not None
        self._session.known = self._held.begins_with(prefix)
        if self._session.known:
            self._host.steps.compute.soon(self._held.hold_prefix)
        return self._session.known // PAGE

    def from_predecessor(self, message: Message, tensors: dict[str, torch.Tensor]) -> None:
        """Take a message from a link stream.

        Raises:
            ProtocolError: close that stream.
        """
        if self._session is not None and not self._ended.is_set():
            self._act(self._session.from_predecessor(message, tensors))

    def announce_drain(self, within_s: float) -> None:
        """Ask the client to move."""
        self._act([ToClient(Drain(within_s=within_s))])

    def end(self) -> None:
        """Hang up; the client goes on elsewhere."""
        self._ended.set()

    async def _read(self, reader: asyncio.StreamReader) -> None:
        write(self._writer, self._wire.take_outgoing())
        while not self._ended.is_set():
            async with asyncio.timeout(self._host.idle_timeout_s):
                data = await reader.read(_READ_BYTES)
            if not data:
                self._ended.set()
                return
            try:
                for message, tensors in self._wire.receive(data):
                    if not self._ended.is_set():
                        self._handle(message, tensors)
            finally:
                await self._flush()

    def _handle(self, message: Message, tensors: dict[str, torch.Tensor]) -> None:
        if self._session is not None:
            self._act(self._session.from_client(message, tensors))
        elif isinstance(message, Open):
            self._open(message)
        else:
            raise ProtocolError(f"unexpected message {message.type!r} before a session was opened")

    def _open(self, request: Open) -> None:
        host = self._host
        if request.session in host.sessions:
            raise ProtocolError("a session with this token is open already")
        try:
            if host.table is None:
                raise Draining("this server is loading other blocks")
            self._held, self._table = host.table.open(request), host.table
        except RemoteError as error:
            merely_full = isinstance(error, CacheFull) and not isinstance(error, SessionTooLarge)
            retry_after_s = host.turned_away.retry_after_s(time.monotonic()) if merely_full else None
            self._wire.send(Refusal(code=error.code, reason=str(error)[:2000], retry_after_s=retry_after_s))
            self._ended.set()
            return
        self._token = request.session
        host.sessions.opened(request.session, self)
        self._session = ServedSession(request, host.hidden_size)
        if request.prefix:
            assert self._tasks is not None
            self._letting_in = self._tasks.create_task(self._let_in(request.prefix))
        else:
            self._wire.send(Opened(dtype=host.dtype))

    async def _let_in(self, prefix: Sequence[bytes]) -> None:
        assert self._held is not None
        await self._host.sessions.wait_for_others(self._held, prefix, _LET_IN_WITHIN_S)
        known = self._known(prefix)
        self._promised, self._got_on_at = prefix, time.monotonic()
        self._wire.send(Opened(dtype=self._host.dtype, known=known))
        await self._flush()

    def _act(self, actions: list[Action]) -> None:
        assert self._session is not None and self._tasks is not None
        for action in actions:
            match action:
                case Compute(work):
                    self._compute(work)
                case ToClient(message, tensors):
                    self._wire.send(message, tensors)
                case ToSuccessor(link, message, tensors):
                    if link in self._links:
                        self._links[link][0].send(message, tensors)
                case Dial(link):
                    assert self._held is not None
                    self._dial(link.link, OutgoingLink(self._host.node, link, self._held.names_for_next()))
                case HangUp(number):
                    if number in self._links:
                        self._links.pop(number)[1].cancel()
                case End():
                    self._ended.set()
        with contextlib.suppress(OSError):  # the reader notices
            write(self._writer, self._wire.take_outgoing())
        if self._unread_bytes() > _MAX_UNREAD_BYTES:
            logger.warning("closed a session whose client does not read")
            self._ended.set()

    def _compute(self, work: Work) -> None:
        """Begin at once, and send on at once: what is done between a message and the device, and after it, is time that
        a token takes."""
        assert self._session is not None and self._tasks is not None
        assert self._held is not None and self._table is not None
        parts, can_wait = self._host.steps.parts(self._table, self._held, work), self._session.standby
        try:
            begun = self._host.steps.begin(self._table, self._held, parts[0], can_wait=can_wait)
        except RemoteError as error:
            self._act(self._session.failed(error))
        else:
            self._computing = begun
            begun.add_done_callback(lambda _: self._first_part_done(parts, begun, can_wait))

    def _first_part_done(
        self, parts: Sequence[Work], begun: asyncio.Future[tuple[torch.Tensor, Spent]], can_wait: bool
    ) -> None:
        assert self._tasks is not None
        if begun.cancelled():
            return
        failed = begun.exception() is not None
        if self._ended.is_set():
            return
        if failed or len(parts) > 1:
            self._computing = self._tasks.create_task(self._complete(parts, begun, can_wait))
            return
        try:  # without a task of its own, as nearly always
            self._computed(*begun.result())
        except Exception as error:
            self._tasks.create_task(_raise(error))

    async def _complete(
        self, parts: Sequence[Work], begun: asyncio.Future[tuple[torch.Tensor, Spent]], can_wait: bool
    ) -> None:
        assert self._session is not None and self._table is not None and self._held is not None
        try:
            output, spent = await self._host.steps.complete(self._table, self._held, parts, begun, can_wait=can_wait)
        except RemoteError as error:
            self._act(self._session.failed(error))
        else:
            if not self._ended.is_set():
                self._computed(output, spent)

    def _computed(self, output: torch.Tensor, spent: Spent) -> None:
        assert self._session is not None and self._held is not None and self._tasks is not None
        for number, (link, _) in self._links.items():
            self._session.link_measured(number, link.one_way_s)
        self._session.degraded = self._held.is_degraded
        self._act(self._session.computed(output, spent))
        self._got_on_at = time.monotonic()
        self._host.sessions.got_on()
        if self._unread_bytes():
            self._tasks.create_task(self._flush())  # which ends the session of a client that does not read

    def _dial(self, number: int, link: OutgoingLink) -> None:
        assert self._tasks is not None
        self._links[number] = (link, self._tasks.create_task(self._keep_link(number, link)))

    async def _keep_link(self, number: int, link: OutgoingLink) -> None:
        def stands(welcome: Attached, known: int) -> None:
            assert self._session is not None
            self._act(self._session.link_opened(number, welcome.fresh, known, welcome.accepted))

        try:
            await link.run(stands)
        except PeerError as error:
            logger.info("lost a link: %s", error)
            if self._links.pop(number, None) is not None and self._session is not None:
                self._act(self._session.link_lost(number, str(error)))

    def _unread_bytes(self) -> int:
        return self._writer.transport.get_write_buffer_size()

    async def _flush(self) -> None:
        write(self._writer, self._wire.take_outgoing())
        if not self._unread_bytes():
            return
        async with asyncio.timeout(_WRITE_TIMEOUT_S):
            await self._writer.drain()


async def _raise(error: Exception) -> None:
    raise error
