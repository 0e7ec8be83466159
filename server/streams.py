"""Serve sessions: the bytes of their streams to their state machines, work to the compute thread, results on."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from swarm.errors import (
    CacheFull,
    Draining,
    ExpertsMissing,
    PeerError,
    ProtocolError,
    RemoteError,
    ServerFault,
    SessionTooLarge,
)
from swarm.page_names import PAGE
from swarm.protocol.messages import Attach, Attached, Drain, Message, Open, Opened, Refusal
from swarm.protocol.served_session import (
    Action,
    Compute,
    Dial,
    End,
    HangUp,
    ServedSession,
    Spent,
    ToClient,
    ToSuccessor,
    Work,
)
from swarm.protocol.tensors import dtype_name
from swarm.protocol.wire import Wire
from swarm.server.compute import ComputeThread
from swarm.server.crowd import Crowd
from swarm.server.experts.dispatch import ExpertDispatch
from swarm.server.links import OutgoingLink
from swarm.server.schedule import Waiting
from swarm.server.sessions import HeldSession, SessionTable, run_steps
from swarm.transport.node import Node
from swarm.transport.outgoing import write

logger = logging.getLogger(__name__)

_READ_BYTES = 256 * 1024
_WRITE_TIMEOUT_S = 30.0
_OPEN_TIMEOUT_S = 30.0
_MAX_UNREAD_BYTES = 256 * 1024 * 1024
"""A client that leaves more than this unread loses its session."""
_BUSY_FOR_S = 3.0
PART = 32
"""Positions of a prompt's piece that run at once while others' tokens come."""
_TOKENS_COME_FOR_S = 0.25
"""So long after the last one, the next is expected."""
_COMING_WITHIN_S = 1.0
"""If another session is about to bring what this one begins with, that is waited for as long as it gets on, …"""
_LET_IN_WITHIN_S = 60.0
"""… but no longer than this, …"""
_ATTACHED_WITHIN_S = 1.0
"""… and over a link, whose other end is pinging meanwhile, than this."""
_GRACE_S = 2.0
"""Experts are waited for so long, once in a session, before one that allows it goes on without them."""
_TASK_FAILURES = (OSError, TimeoutError)


class StreamServer:
    """Accepts session streams and link streams.

    Attributes:
        table: of the span that is hosted now; None while there is none.
    """

    def __init__(
        self,
        node: Node,
        table: SessionTable | None,
        compute: ComputeThread,
        hidden_size: int,
        dtype: torch.dtype,
        idle_timeout_s: float,
        experts: ExpertDispatch | None = None,
        experts_deadline_s: float = 0.0,
    ) -> None:
        """
        Args:
            experts: those of the hosted blocks that are elsewhere.
            experts_deadline_s: a step waits so long for some that nobody hosts.
        """
        self.table: SessionTable | None = table
        self._experts, self._experts_deadline_s = experts, experts_deadline_s
        self.node, self.compute = node, compute
        self.hidden_size, self.dtype, self.idle_timeout_s = hidden_size, dtype_name(dtype), idle_timeout_s
        self.sessions: dict[str, SessionStream] = {}
        """By token."""
        self._steps_under_way = 0
        self._last_step_at = float("-inf")
        self.turned_away = Crowd()
        """Those for whom there was no room lately."""
        self._no_session = asyncio.Event()
        self._no_session.set()
        self._progress = asyncio.Event()

    async def handle_session(self, peer_id: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve a client's stream until its end; one that breaks the protocol loses this stream only."""
        stream = SessionStream(self, writer)
        try:
            await stream.serve(reader)
        except* ProtocolError as errors:
            logger.warning("closed a stream of %s: %s", peer_id, _first(errors))
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
                        elif isinstance(message, Attach) and message.session in self.sessions:
                            attaching.reschedule(None)  # from here on the session's client is the judge
                            session = self.sessions[message.session]
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

    def is_busy(self) -> bool:
        """Whether a step is under way, or was a moment ago."""
        return self._steps_under_way > 0 or time.monotonic() - self._last_step_at < _BUSY_FOR_S

    async def drain(self, within_s: float) -> None:
        """Take no new session, ask the present ones to move, and wait until they have, or `within_s` has passed."""
        if self.table is not None:
            self.table.draining = True
        for session in list(self.sessions.values()):
            session.announce_drain(within_s)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await self._no_session.wait()

    async def hang_up(self) -> None:
        """End the sessions that are still here, and wait until nothing is left of them."""
        for session in list(self.sessions.values()):
            session.end()
        await self._no_session.wait()

    def opened(self, token: str, session: SessionStream) -> None:
        """A session has begun."""
        self.sessions[token] = session
        self._no_session.clear()

    def closed(self, token: str) -> None:
        """A session is over."""
        del self.sessions[token]
        self.got_on()
        if not self.sessions:
            self._no_session.set()

    def got_on(self) -> None:
        """A session has computed something, or is over: who waits for what it computes may look again."""
        self._progress.set()
        self._progress = asyncio.Event()

    async def wait_for_others(self, held: HeldSession, prefix: Sequence[bytes], within_s: float) -> None:
        """Wait until what other sessions are bringing of the pages `prefix` is known, as long as they get on."""
        prefix, until = held.of_use(prefix), time.monotonic() + within_s
        while (known := len(held.cache.known(prefix))) < len(prefix):
            if not any(other.brings(held, prefix, known) for other in self.sessions.values()):
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(_COMING_WITHIN_S, until - time.monotonic())):
                    await self._progress.wait()
            if time.monotonic() >= until:
                return

    def begin(
        self, table: SessionTable, held: HeldSession, work: Work, *, can_wait: bool
    ) -> asyncio.Future[tuple[torch.Tensor, Spent]]:
        """Have `work` computed for a session of `table`; wait for it with :meth:`result`.

        Raises:
            CacheFull: there is no room for it.
        """
        table.grow(held, work)
        waiting = Waiting(work.hidden_states.shape[:2].numel(), held.group(work), can_wait)
        begun = self.compute.begin((held, work), run_steps, waiting, id(held))
        if work.recalled and not can_wait:
            self.compute.expect(id(held))  # what comes after the beginning, of all who waited for it
        self._steps_under_way += 1
        begun.add_done_callback(self._step_ended)
        return begun

    def parts(self, held: HeldSession, work: Work) -> list[Work]:
        """What to run `work` as: while others' tokens come, in parts, between which theirs can run."""
        others_come = time.monotonic() - self.compute.last_short_at < _TOKENS_COME_FOR_S
        batch = work.hidden_states.shape[0]
        return work.split(max(1, PART // batch)) if others_come and held.group(work) is not None else [work]

    async def complete(
        self,
        table: SessionTable,
        held: HeldSession,
        parts: Sequence[Work],
        begun: asyncio.Future[tuple[torch.Tensor, Spent]],
        *,
        can_wait: bool,
    ) -> tuple[torch.Tensor, Spent]:
        """The result of `parts`, of which the first was begun.

        Raises:
            RemoteError: to be sent to the client.
        """
        output, spent = await self._complete(table, held, parts[0], begun)
        outputs = [output]
        for part in parts[1:]:
            output, more = await self._complete(table, held, part, self.begin(table, held, part, can_wait=can_wait))
            outputs.append(output)
            spent = spent.and_then(more)
        return torch.cat(outputs, dim=1) if len(outputs) > 1 else output, spent

    async def _complete(
        self, table: SessionTable, held: HeldSession, work: Work, begun: asyncio.Future[tuple[torch.Tensor, Spent]]
    ) -> tuple[torch.Tensor, Spent]:
        """The result of what was begun; if it lacks experts, it is begun again when they have come, or without them."""
        until = time.monotonic() + self._experts_deadline_s
        try:
            while True:
                try:
                    return await self._result(begun)
                except ExpertsMissing as error:
                    left_s = until - time.monotonic()
                    if self._experts is None or left_s <= 0:
                        raise
                    can_do_without = held.allows_degraded and held.leaves_out is None
                    held.leaves_out = None
                    if can_do_without:
                        left_s = 0.0 if held.is_degraded else min(_GRACE_S, left_s)
                    else:
                        logger.warning("a step waits: %s", error)
                    if not await self._experts.appear(error.block, error.experts, left_s):
                        if not can_do_without:
                            raise
                        held.leaves_out = self._experts.missing(held.span.layers)
                work = replace(work, reorder=None)  # that has been done
                begun = self.begin(table, held, work, can_wait=False)
        finally:
            held.leaves_out = None

    async def _result(self, begun: asyncio.Future[tuple[torch.Tensor, Spent]]) -> tuple[torch.Tensor, Spent]:
        try:
            return await begun
        except (RuntimeError, ValueError, IndexError, MemoryError) as error:
            # One session's failure (out of memory above all) must not end the others'.
            logger.exception("a step failed")
            reason = str(error).splitlines()[0] if str(error) else repr(error)
            raise ServerFault(f"the computation failed: {reason}") from error

    def _step_ended(self, _: object) -> None:
        self._steps_under_way -= 1
        self._last_step_at = time.monotonic()


class SessionStream:
    """One client's stream, the session on it, and the links that it keeps."""

    def __init__(self, server: StreamServer, writer: asyncio.StreamWriter) -> None:
        self._server, self._writer = server, writer
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
            for writer in self.predecessors:
                writer.close()
            if self._held is not None and self._table is not None:
                self._server.closed(self._token)
                self._table.close(self._held)
                self._server.compute.soon(self._held.cache.release)
            self._session = self._held = self._table = (
                None  # large; and the traceback of what ended this may live for long
            )

    def brings(self, held: HeldSession, prefix: Sequence[bytes], known: int) -> bool:
        """Whether it is at work on the next of the pages `prefix`, of which `held` would know so many."""
        if self._held is None or self._session is None or self._held is held or self._held.blocks != held.blocks:
            return False
        has_passed = self._session.computed_positions >= (known + 1) * PAGE
        if has_passed or time.monotonic() > self._got_on_at + _COMING_WITHIN_S:
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
            await self._server.wait_for_others(self._held, prefix, _ATTACHED_WITHIN_S)
        if self._session is None:
            raise ProtocolError("a link asks for a session that has just ended")
        fresh = self._session.attach()
        return Attached(fresh=fresh, known=self._known(prefix) if fresh else 0)

    def _known(self, prefix: Sequence[bytes]) -> int:
        """So many pages of what comes first can be recalled."""
        assert self._session is not None and self._held is not None
        self._session.known = self._held.begins_with(prefix)
        if self._session.known:
            self._server.compute.soon(self._held.hold_prefix)
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
            async with asyncio.timeout(self._server.idle_timeout_s):
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
        server = self._server
        if request.session in server.sessions:
            raise ProtocolError("a session with this token is open already")
        try:
            if server.table is None:
                raise Draining("this server is loading other blocks")
            self._held, self._table = server.table.open(request), server.table
        except RemoteError as error:
            merely_full = isinstance(error, CacheFull) and not isinstance(error, SessionTooLarge)
            retry_after_s = server.turned_away.retry_after_s(time.monotonic()) if merely_full else None
            self._wire.send(Refusal(code=error.code, reason=str(error)[:2000], retry_after_s=retry_after_s))
            self._ended.set()
            return
        self._token = request.session
        server.opened(request.session, self)
        self._session = ServedSession(request, server.hidden_size)
        if request.prefix:
            assert self._tasks is not None
            self._letting_in = self._tasks.create_task(self._let_in(request.prefix))
        else:
            self._wire.send(Opened(dtype=server.dtype))

    async def _let_in(self, prefix: Sequence[bytes]) -> None:
        assert self._held is not None
        await self._server.wait_for_others(self._held, prefix, _LET_IN_WITHIN_S)
        known = self._known(prefix)
        self._promised, self._got_on_at = prefix, time.monotonic()
        self._wire.send(Opened(dtype=self._server.dtype, known=known))
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
                    self._dial(link.link, OutgoingLink(self._server.node, link, self._held.names_for_next()))
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
        parts, can_wait = self._server.parts(self._held, work), self._session.standby
        try:
            begun = self._server.begin(self._table, self._held, parts[0], can_wait=can_wait)
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
            output, spent = await self._server.complete(self._table, self._held, parts, begun, can_wait=can_wait)
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
        self._server.got_on()
        if self._unread_bytes():
            self._tasks.create_task(self._flush())  # which ends the session of a client that does not read

    def _dial(self, number: int, link: OutgoingLink) -> None:
        assert self._tasks is not None
        self._links[number] = (link, self._tasks.create_task(self._keep_link(number, link)))

    async def _keep_link(self, number: int, link: OutgoingLink) -> None:
        def stands(fresh: bool, known: int) -> None:
            assert self._session is not None
            self._act(self._session.link_opened(number, fresh, known))

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


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
