"""A session: activations through all blocks of a model, over servers that may die at any moment.

What is to be done is decided by :class:`~swarm.protocol.routed_session.RoutedSession`; here it is done: servers are
looked up and dialled, their streams watched, and whoever waits for a step is told.
"""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
import time
from collections.abc import Coroutine
from dataclasses import dataclass, replace
from typing import Any

import torch

from swarm.client.server_view import ServerView, Wish
from swarm.client.settings import ClientSettings
from swarm.client.timing import HopTiming, StepTiming
from swarm.errors import (
    REMOTE_ERRORS,
    CacheFull,
    ExpertsMissing,
    Forgotten,
    NoRoom,
    NoRoute,
    PeerError,
    RemoteError,
    SessionClosed,
    SessionTooLarge,
)
from swarm.models import Checkpoint
from swarm.protocol.messages import MAX_STEP_POSITIONS, STREAM_PROTOCOL, Close, Message, Open, Opened, Refusal
from swarm.protocol.routed_actions import (
    Action,
    CloseHop,
    Delivered,
    FindRoute,
    FindStandby,
    OpenHop,
    Place,
    Replaced,
    ToHop,
)
from swarm.protocol.routed_session import RoutedSession
from swarm.protocol.tensors import DTYPES
from swarm.routing import PROFILES, Leg, Profile
from swarm.transport.node import Node
from swarm.transport.watched_stream import WatchedStream

logger = logging.getLogger(__name__)

_RETRY_S = 0.25
_VIEW_AGE_S = 2.0
_VIEW_AGE_IN_RECOVERY_S = 30.0
_LOOK_AFTER_S = 2.0
_SEND_AGAIN_S = 20.0
"""A step that nobody has answered for so long, though all servers are alive, is sent once more."""
_STUCK_S = 300.0
"""After so long it is given to other servers, and after as long again given up. Long prompts come back in pieces."""
_BYTES_PER_NUMBER = 4
_MIN_CHUNK, _CHUNKS = 64, 16
"""Prefill travels in pieces, so that all servers of a route work at once."""


@dataclass(frozen=True)
class Recovery:
    """One replacement of a lost server."""

    lost: str
    """The peer id of the server that was lost."""
    start: int
    end: int
    reason: str
    replayed_positions: int
    pause_s: float
    """From the moment the loss was noticed (while a step was under way) until the session could go on."""
    by_standby: bool = False
    """A server that had been kept up to date took over."""
    noticed_at: float | None = None
    """When the loss was noticed (``time.monotonic()``); None: nobody had to wait, the server left between two steps."""


@dataclass(frozen=True)
class _Ahead:
    """A step that was begun before it was asked for."""

    position: int
    hidden_states: torch.Tensor
    """``[1, 1, hidden]``"""
    results: list[asyncio.Future[Delivered]]

    def is_of(self, position: int, hidden_states: torch.Tensor) -> bool:
        """Whether this is the step that is asked for."""
        mine = self.hidden_states
        return position == self.position and mine.dtype == hidden_states.dtype and torch.equal(mine, hidden_states)


class Session:
    """KV caches along a route, for one batch of sequences. Not for concurrent use.

    Attributes:
        recoveries: what was lost and replaced so far.
        last_step: where the time of the last step went.
        reroutes: how often it left servers that worked, for a much better way.
        taken_ahead: how many steps had been begun when they were asked for (:meth:`step_ahead`).
        ahead_in_vain: how many were begun that nobody asked for.
    """

    def __init__(
        self,
        node: Node,
        view: ServerView,
        checkpoint: Checkpoint,
        dtype: str,
        settings: ClientSettings,
        max_length: int,
    ) -> None:
        self._node, self._view, self._checkpoint, self._settings = node, view, checkpoint, settings
        self._max_length = max_length
        self._salt = secrets.token_hex(8)
        self._machine = RoutedSession(
            checkpoint.num_blocks,
            checkpoint.hidden_size,
            lambda: secrets.token_hex(16),
            chain=settings.chain,
            standbys=settings.redundancy > 1,
            codec=settings.activation_codec,
            dtype=DTYPES[dtype],
        )
        self._position = 0
        self._batch = 0
        self._pending_reorder: torch.Tensor | None = None
        self._streams: dict[int, tuple[WatchedStream, asyncio.Task[None]]] = {}
        self._errands: set[asyncio.Task[None]] = set()
        self._awaited: dict[int, asyncio.Future[Delivered]] = {}  # by sequence numbers: what was not delivered yet
        self._ahead: _Ahead | None = None
        self._looking_after: asyncio.Task[None] | None = None
        self._search: asyncio.Task[None] | None = None
        self._opened: set[int] = set()  # hops
        self._too_small: dict[str, str] = {}  # servers, by peer id, and what they said
        self._without_room_since: float | None = None
        self._new_positions = 0  # of the step that is under way
        self._better_way = False
        self._next_reroute = time.monotonic()
        self._step_begun = self._last_progress = self._last_sent_again = 0.0  # time.monotonic()
        self._left_as_stuck = False  # in the step that is under way
        self._closed = False
        self.recoveries: list[Recovery] = []
        self._ways_s: dict[int, float | None] = {}  # to the servers of hops, as the view knows them
        self.last_step = StepTiming(0.0)
        self.reroutes = self.taken_ahead = self.ahead_in_vain = 0

    @property
    def position(self) -> int:
        """Positions that the caches hold; the next step begins here."""
        return self._position

    @property
    def batch(self) -> int:
        """Sequences that the caches hold."""
        return self._batch

    @property
    def route(self) -> tuple[Leg, ...]:
        """The servers in use now."""
        return tuple(_leg(place) for place in self._machine.places)

    @property
    def standbys(self) -> tuple[Leg, ...]:
        """The servers that could take over at once."""
        return tuple(_leg(place) for place in self._machine.standbys)

    @property
    def relayed(self) -> tuple[int, ...]:
        """The block boundaries at which hidden states pass through this client, not straight from server to server."""
        return self._machine.relayed

    @property
    def last_timings(self) -> tuple[HopTiming, ...]:
        """Where the time of the last step went, server by server."""
        return self.last_step.hops

    async def step(
        self,
        hidden_states: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        *,
        wanted: int | None = None,
    ) -> torch.Tensor:
        """Run new positions through all blocks.

        Args:
            hidden_states: ``[batch, n, hidden]`` as they enter block 0.
            position_ids: ``[batch, n]`` int64; default: those that follow.
            mask: ``[batch, n]`` uint8, 0 where there is padding; default: no padding.
            wanted: only the last so many positions need to come back; default: all.

        Returns:
            ``[batch, n or wanted, hidden]`` as they leave the last block.

        Raises:
            NoRoute: some blocks had no server until the deadline (NoRoom: none that had room, or ever will). The
                session stays as it was before the step.
            ExpertsMissing: nobody hosted some experts until the servers' deadline. Likewise: repeat the step later.
            SessionClosed: it was closed.
        """
        if self._closed:
            raise SessionClosed("this session has been closed; start another")
        hidden_states = hidden_states.detach().to("cpu")
        batch, count, _ = hidden_states.shape
        if batch != self._batch and self._position > 0:
            raise ValueError(f"this session holds {self._batch} sequences, the step has {batch}")
        position_ids = _unless_default(position_ids, self._position, batch, count)
        mask = None if mask is None or bool(mask.all()) else mask.detach().to("cpu", torch.uint8).expand(batch, count)
        old_batch = self._batch
        is_plain = position_ids is None and mask is None and self._pending_reorder is None
        ahead = self._take_ahead(hidden_states if is_plain else None)
        try:
            results = ahead or self._begin(hidden_states, position_ids, mask, wanted)
            delivered = [await results[0]]
            self._pending_reorder = None  # all servers have done it
            delivered += [await result for result in results[1:]]
        except BaseException:
            self._batch = old_batch
            self._give_up()
            raise
        self._position += count
        self._new_positions = 0
        self.last_step = self._passed(delivered)
        outputs = [one.hidden_states.to(hidden_states.dtype) for one in delivered]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    def step_ahead(self, hidden_states: torch.Tensor) -> None:
        """Begin with what is likely to be the next step, before it is asked for.

        If it is what :meth:`step` is given next, that has a start; if not, servers roll it back.

        Args:
            hidden_states: ``[1, 1, hidden]`` as they enter block 0, of the position that follows.
        """
        has_room = self._position < self._max_length
        is_at_rest = not self._awaited and self._ahead is None and self._pending_reorder is None
        is_to_change = self._better_way or self._machine.is_left  # which takes less time between two steps
        if self._closed or not has_room or not is_at_rest or is_to_change or self._batch != 1:
            return
        hidden_states = hidden_states.detach().to("cpu")
        self._ahead = _Ahead(self._position, hidden_states, self._begin(hidden_states, None, None, None))

    def roll_back(self, position: int) -> None:
        """Forget the positions from `position` on; the servers follow with the next step.

        Raises:
            ValueError: there are no positions that far.
        """
        if not 0 <= position <= self._position:
            raise ValueError(f"cannot go to position {position}: the session holds positions 0 to {self._position}")
        self._position = position

    def reorder(self, rows: torch.Tensor) -> None:
        """Let sequence i go on as what sequence ``rows[i]`` was; the servers follow with the next step."""
        rows = rows.to("cpu", torch.int64)
        if self._position == 0:
            return
        self._pending_reorder = rows if self._pending_reorder is None else self._pending_reorder[rows]
        self._batch = len(rows)

    async def close(self) -> None:
        """Free the caches on all servers."""
        self._closed = True
        self._give_up()
        errands = list(self._errands)
        for task in errands:
            task.cancel()
        await asyncio.gather(*errands, return_exceptions=True)

    # --- doing what the machine says

    def _begin(
        self,
        hidden_states: torch.Tensor,
        position_ids: torch.Tensor | None,
        mask: torch.Tensor | None,
        wanted: int | None,
    ) -> list[asyncio.Future[Delivered]]:
        """Let a step be sent, and give what will hold its results, piece by piece."""
        batch, count, _ = hidden_states.shape
        self._step_begun = self._last_progress = time.monotonic()
        if self._looking_after is None:
            self._looking_after = self._errand(self._look_after())
        self._max_length = max(self._max_length, self._position + count)
        self._new_positions, self._left_as_stuck = count, False
        if self._better_way:
            self._reroute()
        self._batch = batch
        reorder = self._pending_reorder.tolist() if self._pending_reorder is not None and self._position else None
        results = []
        for begin, end in _chunks(batch, count):
            future: asyncio.Future[Delivered] = asyncio.get_running_loop().create_future()
            sequence, actions = self._machine.submit(
                self._position + begin,
                reorder if begin == 0 else None,
                hidden_states[:, begin:end],
                position_ids[:, begin:end] if position_ids is not None else None,
                mask[:, begin:end] if mask is not None else None,
                _wanted_of_piece(begin, end, count, wanted),
            )
            self._awaited[sequence] = future
            results.append(future)
            self._do(actions)
        self._expect(True)
        return results

    def _take_ahead(self, hidden_states: torch.Tensor | None) -> list[asyncio.Future[Delivered]] | None:
        """The results of the step ahead, if it is this one, ``[1, 1, hidden]``; if not, nobody waits for them."""
        ahead, self._ahead = self._ahead, None
        if ahead is None:
            return None
        if hidden_states is not None and ahead.is_of(self._position, hidden_states):
            self.taken_ahead += 1
            return ahead.results
        self.ahead_in_vain += 1
        self._awaited.clear()
        return None

    def _do(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case ToHop(hop, message, tensors):
                    self._streams[hop][0].send(message, tensors)
                case Delivered(sequence):
                    self._last_progress = time.monotonic()
                    if (future := self._awaited.pop(sequence, None)) is not None and not future.done():
                        future.set_result(action)
                    self._expect(bool(self._awaited))
                case FindRoute(start, end):
                    self._search = self._errand(self._find_route(start, end))
                case FindStandby():
                    self._errand(self._find_standby(action))
                case OpenHop():
                    self._open(action)
                case CloseHop(hop):
                    self._close(hop)
                case Replaced():
                    self._last_progress = time.monotonic()
                    self._note(action)

    def _expect(self, something: bool) -> None:
        for stream, _ in self._streams.values():
            stream.expecting = something

    def _errand(self, errand: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(errand)
        self._errands.add(task)
        task.add_done_callback(self._errand_done)
        return task

    def _errand_done(self, task: asyncio.Task[None]) -> None:
        self._errands.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        """Tell whoever waits for a step; if nobody does yet, it will be tried again."""
        if self._ahead is not None:
            logger.info("a step that was begun ahead has failed: %s", error)
            self._ahead = None
            self._give_up()
        for future in self._awaited.values():
            if not future.done():
                future.set_exception(error)
                future.exception()  # one of them is enough to be seen

    def _give_up(self) -> None:
        """Leave all servers, and the line for room on them."""
        if self._search is not None:
            self._search.cancel()
        self._has_room()
        self._awaited.clear()
        self._do(self._machine.abort())

    async def _find_route(self, start: int, end: int) -> None:
        """Find servers for the blocks ``[start, end)``; those who wait are told if there are none by the deadline.

        Who finds only servers that are full gives back what it holds on others, lest two sessions wait for one another
        for ever, and waits for its turn.
        """
        deadline_s = self._settings.deadline_s
        max_age_s = _VIEW_AGE_IN_RECOVERY_S if self._machine.is_recovering else _VIEW_AGE_S
        while True:
            await self._view.refresh(max_age_s=max_age_s)
            if not self._machine.is_recovering:
                await self._view.measure_links()
            wish = self._wish()
            legs = self._view.route(start, end, salt=self._salt, wish=wish)
            now = time.monotonic()
            if legs is None and self._view.is_merely_full(start, end, wish):
                if self._machine.hops:
                    self._do(self._machine.close())
                    return self._do(self._machine.send_again())  # which begins by looking for a whole route
                await self._wait_for_room(wish, now)
            elif legs is None and self._view.is_too_small(start, end, wish):
                raise NoRoom(
                    f"This session asks for more KV cache than servers of {self._checkpoint.name} have:\n"
                    f"{self._view.explain_room(start, end, wish)}\n"
                    "Ask for a shorter session (max_length, max_new_tokens), or for fewer sequences at once."
                )
            elif legs is None and now < self._last_progress + deadline_s:  # all that is known was tried: wait for news
                await asyncio.sleep(min(_RETRY_S, self._last_progress + deadline_s - now))
                max_age_s = 0.0
            elif now >= self._last_progress + deadline_s:
                raise NoRoute(
                    f"{self._view.explain(start, end)}\nWaited {deadline_s:g} s. "
                    "`swarm status` shows the whole picture; deadline_s=… waits longer."
                )
            else:
                assert legs is not None
                return self._do(self._machine.route_found(tuple(self._place(leg) for leg in legs)))

    async def _wait_for_room(self, wish: Wish, now: float) -> None:
        """Until it may be worth asking for room again. Raises NoRoom if that takes too long."""
        patience_s, line = self._settings.patience_for_room_s, self._view.line
        self._last_progress = now  # they answer, they are merely full
        self._without_room_since = self._without_room_since or now
        left_s = self._without_room_since + patience_s - now
        if left_s <= 0:
            raise NoRoom(
                f"Servers of {self._checkpoint.name} have no room for this session:\n"
                f"{self._view.explain_room(0, self._checkpoint.num_blocks, wish)}\n"
                f"Waited {patience_s:g} s. Try again later, or ask for a shorter session (max_length, max_new_tokens); "
                "room_deadline_s=… waits longer, and one more swarm-server makes room."
            )
        line.join(self)
        wait_s = self._view.ask_again_in_s() if line.is_first(self) else _VIEW_AGE_S
        await line.wait(self, min(wait_s, left_s))

    def _has_room(self) -> None:
        """It need not wait for room, or not any longer."""
        self._without_room_since = None
        self._view.line.leave(self)

    def _wish(self) -> Wish:
        waits_for_others = not self._view.line.is_first(self)
        return Wish(self._batch * self._max_length, waits_for_others, self._too_small, self._salt, self._profile())

    def _profile(self) -> Profile:
        """What is still to be done, once all that was delivered has been told to new servers."""
        position_bytes = float(_BYTES_PER_NUMBER * self._checkpoint.hidden_size)
        if self._settings.profile is not None:
            return replace(PROFILES[self._settings.profile], position_bytes=position_bytes)
        told = self._position + self._new_positions
        return Profile(max(1, self._max_length - told), told, max(1, self._batch), position_bytes)

    async def _look_for_a_better_way(self) -> None:
        """See whether the next step should begin by changing servers; a session at rest does not look."""
        every_s, now = self._settings.reroute_every_s, time.monotonic()
        if every_s is None or now < self._next_reroute or now - self._last_progress > every_s:
            return
        self._next_reroute = now + every_s * random.uniform(0.5, 1.5)
        await self._view.refresh(max_age_s=every_s / 2)
        wish, route = self._wish(), self.route
        if self._machine.is_recovering or not route or route[0].start > 0:
            return
        if route[-1].end == self._checkpoint.num_blocks:
            remaining = replace(wish, profile=replace(wish.profile, prompt_positions=0.0))
            self._better_way = self._view.has_better_way(route, remaining, self._position)

    def _reroute(self) -> None:
        """Between two steps: leave all servers; the step that begins finds others, and tells them everything."""
        self._better_way = False
        if self._machine.is_recovering or not self._machine.hops:
            return
        logger.info("there is a much better way than over %s", ", ".join(leg.peer_id for leg in self.route))
        self.reroutes += 1
        self._do(self._machine.close())

    async def _find_standby(self, wanted: FindStandby) -> None:
        wish = self._wish()
        for max_age_s in (_VIEW_AGE_IN_RECOVERY_S, _VIEW_AGE_S):  # a look-up slows tokens down
            await self._view.refresh(max_age_s=max_age_s)
            leg = self._view.standby(wanted.start, wanted.end, without=wanted.without, salt=self._salt, wish=wish)
            if leg is not None:
                break
        if leg is not None:
            self._do(self._machine.standby_found(wanted.start, self._place(leg)))
        elif wanted.leaving is not None and self._view.route(
            wanted.start, wanted.end, salt=self._salt, without=wanted.leaving
        ):  # not one server, but several can follow
            self._view.penalize(wanted.leaving, RemoteError("it is leaving"))
            self._do(self._machine.lost(wanted.hop, "it is leaving", time.monotonic()))

    def _place(self, leg: Leg) -> Place:
        return Place(leg.peer_id, leg.start, leg.end, tuple(self._view.server(leg.peer_id).addresses[:8]))

    def _open(self, action: OpenHop) -> None:
        place, settings = action.place, self._settings
        stream = WatchedStream(
            self._node,
            place.peer_id,
            place.addresses,
            STREAM_PROTOCOL,
            peer_timeout_s=settings.peer_timeout_s,
            connect_timeout_s=settings.connect_timeout_s,
        )
        stream.expecting = bool(self._awaited)
        stream.send(
            Open(
                session=action.token,
                model=self._checkpoint.model_digest,
                start=place.start,
                end=place.end,
                batch=self._batch,
                max_length=self._max_length,
                standby=action.standby,
                codec=settings.activation_codec,
                allow_degraded=settings.allow_degraded,
                is_last=place.end == self._checkpoint.num_blocks,
                prefix=list(action.prefix),
            )
        )
        self._streams[action.hop] = (stream, self._errand(self._keep(action.hop, stream)))
        self._view.session_opened(place.peer_id, self._salt)

    async def _keep(self, hop: int, stream: WatchedStream) -> None:
        def heard(message: Message, tensors: dict[str, torch.Tensor]) -> None:
            if isinstance(message, Refusal):
                error = REMOTE_ERRORS.get(message.code, RemoteError)(message.reason)
                if isinstance(error, CacheFull):
                    self._note_full(stream.peer_id, error, message.retry_after_s)
                raise error
            self._do(self._machine.received(hop, message, tensors))
            if isinstance(message, Opened):
                self._opened.add(hop)
                if not self._machine.is_recovering and self._machine.hops.keys() <= self._opened:
                    self._has_room()

        try:
            await stream.run(heard)
        except (PeerError, RemoteError) as error:
            if not isinstance(error, (CacheFull, ExpertsMissing, Forgotten)):  # that one is well
                logger.info("lost %s: %s", stream.peer_id, error)
                self._view.penalize(stream.peer_id, error)
            if isinstance(error, ExpertsMissing):  # another server would not find them, either
                self._fail(error)
            self._do(self._machine.lost(hop, str(error), time.monotonic()))

    def _note_full(self, peer_id: str, error: CacheFull, retry_after_s: float | None) -> None:
        logger.info("%s: %s", peer_id, error)
        if isinstance(error, SessionTooLarge):
            self._too_small[peer_id] = str(error)
        else:
            self._view.found_full(peer_id, self._wish(), str(error), retry_after_s)

    def _close(self, hop: int) -> None:
        stream, task = self._streams.pop(hop)
        self._opened.discard(hop)
        if all(other.peer_id != stream.peer_id for other, _ in self._streams.values()):
            self._view.session_closed(stream.peer_id, self._salt)
        if task is not asyncio.current_task():
            stream.send(Close())
            task.cancel()
            self._view.room_freed(stream.peer_id)

    async def _look_after(self) -> None:
        """What is done from time to time, as long as the session lives."""
        while True:
            await asyncio.sleep(_LOOK_AFTER_S)
            self._do(self._machine.look_for_standbys())
            await self._look_for_a_better_way()
            now = time.monotonic()
            if not self._awaited or not (self._search is None or self._search.done()):
                continue
            if now - self._last_progress > _STUCK_S:
                self._leave_stuck_servers(now)
            elif now - max(self._last_progress, self._last_sent_again) > _SEND_AGAIN_S:
                self._last_sent_again = now
                self._do(self._machine.send_again())

    def _leave_stuck_servers(self, now: float) -> None:
        """They answer pings and nothing else. Which one it is, nobody can tell: others are asked, once."""
        error = RemoteError(f"nothing came of a step for {_STUCK_S:g} s, although it answers pings")
        peers = [place.peer_id for place in self._machine.places]
        for peer_id in peers:
            self._view.penalize(peer_id, error)
        if self._left_as_stuck:
            self._fail(NoRoute(f"Servers of {self._checkpoint.name} do not get on: {error} ({', '.join(peers)})."))
            return
        logger.info("leaving %s: %s", ", ".join(peers), error)
        self._left_as_stuck, self._last_progress = True, now
        self._do(self._machine.close())
        self._do(self._machine.send_again())  # which begins by looking for a whole route

    def _note(self, replaced: Replaced) -> None:
        place, lost_at = replaced.place, replaced.lost_at
        pause_s = time.monotonic() - max(lost_at, self._step_begun) if lost_at is not None else 0.0
        replayed = 0 if replaced.by_standby else self._machine.length
        self.recoveries.append(
            Recovery(
                place.peer_id, place.start, place.end, replaced.reason, replayed, pause_s, replaced.by_standby, lost_at
            )
        )

    def _passed(self, delivered: list[Delivered]) -> StepTiming:
        """The step has passed all servers: the view is told what is new about them."""
        total_s, hops = self._last_progress - self._step_begun, self._machine.hops
        ways_s = {number: self._streams[number][0].one_way_s for number in hops}
        if ways_s != self._ways_s:
            for number, place in hops.items():
                self._view.worked(place.peer_id, self._salt, ways_s[number])
            self._ways_s = ways_s
        return StepTiming(
            total_s,
            [one.hops for one in delivered],
            {place.start: place.peer_id for place in hops.values()},
            {place.start: ways_s[number] or 0.0 for number, place in hops.items()},
        )


def _leg(place: Place) -> Leg:
    return Leg(place.peer_id, place.start, place.end)


def _chunks(batch: int, count: int) -> list[tuple[int, int]]:
    """Pieces ``[begin, end)`` of a step of `count` positions: small enough, and enough to keep every server busy."""
    each = min(max(_MIN_CHUNK, -(-count // _CHUNKS)), max(1, MAX_STEP_POSITIONS // batch))
    return [(begin, min(begin + each, count)) for begin in range(0, count, each)]


def _wanted_of_piece(begin: int, end: int, count: int, wanted: int | None) -> int | None:
    """How many of the `wanted` last of `count` positions are in the piece ``[begin, end)``; None: all are wanted."""
    return max(0, end - max(begin, count - wanted)) if wanted is not None and wanted < count else None


def _unless_default(ids: torch.Tensor | None, position: int, batch: int, count: int) -> torch.Tensor | None:
    """Position ids, unless they simply count on from `position`."""
    if ids is None:
        return None
    if ids.numel() == 1 and batch * count == 1 and int(ids) == position:  # as of nearly all tokens
        return None
    ids = ids.detach().to("cpu", torch.int64).expand(batch, count)
    return None if torch.equal(ids, torch.arange(position, position + count).expand(batch, count)) else ids
