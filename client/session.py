"""A session: activations through all blocks of a model, over servers that may die at any moment.

The client relays (star mode): it sends each server its input and gets back its output, so it knows the
hidden states at every boundary between servers and keeps them (:class:`ActivationLog`). When a server
dies, another takes over its blocks and is brought to the same state by replaying the log of that
boundary; the others notice nothing.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from dataclasses import dataclass

import torch

from swarm.client.activations import ActivationLog
from swarm.client.hop import Hop, HopTiming
from swarm.client.server_view import ServerView
from swarm.client.settings import ClientSettings
from swarm.errors import CannotRollBack, NoRoute, PeerError, RemoteError, SessionClosed
from swarm.models import Checkpoint
from swarm.routing import Leg
from swarm.transport.node import Node

logger = logging.getLogger(__name__)

_CHUNK_BYTES = 8 * 1024 * 1024
"""Longer inputs travel in pieces of at most this size."""
_RETRY_S = 0.25
_VIEW_AGE_S = 2.0
_VIEW_AGE_IN_RECOVERY_S = 30.0


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
    """From the moment the loss was noticed until the session could go on."""


class Session:
    """KV caches along a route, for one batch of sequences. Not for concurrent use.

    Attributes:
        recoveries: what was lost and replaced so far.
        last_timings: where the time of the last step went, server by server.
    """

    def __init__(
        self, node: Node, view: ServerView, checkpoint: Checkpoint, settings: ClientSettings, max_length: int
    ) -> None:
        self._node, self._view, self._checkpoint, self._settings = node, view, checkpoint, settings
        self._max_length = max_length
        self._salt = secrets.token_hex(8)
        self._hops: dict[int, Hop] = {}  # by first block
        self._logs: dict[int, ActivationLog] = {0: ActivationLog()}  # by the block that they enter
        self._position_ids: torch.Tensor | None = None  # [batch, position], once they were not the default
        self._mask: torch.Tensor | None = None  # [batch, position] uint8, once anything was padded
        self._lost: list[tuple[Leg, str, float]] = []
        self._position = 0
        self._batch = 0
        self._closed = False
        self.recoveries: list[Recovery] = []
        self.last_timings: tuple[HopTiming, ...] = ()

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
        return tuple(Leg(hop.peer_id, hop.start, hop.end) for _, hop in sorted(self._hops.items()))

    async def step(
        self,
        hidden_states: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run new positions through all blocks.

        Args:
            hidden_states: ``[batch, n, hidden]`` as they enter block 0.
            position_ids: ``[batch, n]`` int64; default: those that follow.
            mask: ``[batch, n]`` uint8, 0 where there is padding; default: no padding.

        Returns:
            ``[batch, n, hidden]`` as they leave the last block.

        Raises:
            NoRoute: some blocks had no server until the deadline. The session stays as it was before the step.
            SessionClosed: it was closed.
        """
        if self._closed:
            raise SessionClosed("this session has been closed; start another")
        hidden_states = hidden_states.detach().to("cpu")
        begun_at = self._position
        self._check_batch(hidden_states.shape[0])
        self._max_length = max(self._max_length, begun_at + hidden_states.shape[1])
        position_ids = self._keep_position_ids(hidden_states, position_ids)
        mask = self._keep_mask(hidden_states, mask)
        outputs = []
        try:
            for begin, end in self._chunks(hidden_states):
                outputs.append(
                    await self._step_chunk(
                        hidden_states[:, begin:end],
                        position_ids[:, begin:end] if position_ids is not None else None,
                        mask[:, begin:end] if mask is not None else None,
                    )
                )
        except BaseException:
            self.roll_back(begun_at)
            raise
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    def roll_back(self, position: int) -> None:
        """Forget the positions from `position` on; the servers follow with the next step.

        Raises:
            ValueError: there are no positions that far.
        """
        if not 0 <= position <= self._position:
            raise ValueError(f"cannot go to position {position}: the session holds positions 0 to {self._position}")
        self._position = position
        for log in self._logs.values():
            log.truncate(position)
        self._position_ids = self._position_ids[:, :position] if self._position_ids is not None else None
        self._mask = self._mask[:, :position] if self._mask is not None else None

    def reorder(self, rows: torch.Tensor) -> None:
        """Let sequence i go on as what sequence ``rows[i]`` was; the servers follow with the next step."""
        rows = rows.to("cpu", torch.int64)
        if self._position == 0:
            return
        for log in self._logs.values():
            log.reorder(rows)
        for hop in self._hops.values():
            hop.pending_reorder = rows if hop.pending_reorder is None else hop.pending_reorder[rows]
        self._position_ids = self._position_ids[rows] if self._position_ids is not None else None
        self._mask = self._mask[rows] if self._mask is not None else None
        self._batch = len(rows)

    async def close(self) -> None:
        """Free the caches on all servers."""
        self._closed = True
        hops, self._hops = list(self._hops.values()), {}
        await asyncio.gather(*(hop.close() for hop in hops))

    async def _step_chunk(
        self, hidden_states: torch.Tensor, position_ids: torch.Tensor | None, mask: torch.Tensor | None
    ) -> torch.Tensor:
        deadline = time.monotonic() + self._settings.deadline_s
        entered: dict[int, torch.Tensor] = {}
        timings: list[HopTiming] = []
        await self._leave_draining_servers()
        block, current = 0, hidden_states
        while block < self._checkpoint.num_blocks:
            hop = self._hops.get(block)
            if hop is None:
                await self._fill_gap(block, deadline)
                continue
            try:
                output, timing = await hop.step(self._position, current, position_ids, mask)
            except (PeerError, RemoteError) as error:
                await self._lose(hop, error)
                continue
            except BaseException:  # the user interrupted: what the server has done is unknown
                del self._hops[block]
                await hop.abandon()
                raise
            timings.append(timing)
            entered[block] = current
            block, current = hop.end, output
        for boundary, states in entered.items():
            if boundary in self._logs:
                self._logs[boundary].append(states)
        self._position += hidden_states.shape[1]
        self.last_timings = tuple(timings)
        return current

    async def _fill_gap(self, start: int, deadline: float) -> None:
        """Find servers for the blocks from `start` to the next hop, and bring them to the session's state.

        Raises:
            NoRoute: none until the deadline.
        """
        max_age_s = _VIEW_AGE_S if not self._lost else _VIEW_AGE_IN_RECOVERY_S
        while start not in self._hops:
            await self._view.refresh(max_age_s=max_age_s)
            end = min((first for first in self._hops if first > start), default=self._checkpoint.num_blocks)
            legs = self._view.route(start, end, salt=self._salt)
            if legs is not None:
                await self._take_over(legs)
            elif time.monotonic() < deadline:  # all that is known was tried: wait for news
                await asyncio.sleep(min(_RETRY_S, max(0.0, deadline - time.monotonic())))
            if start not in self._hops and time.monotonic() >= deadline:
                raise NoRoute(
                    f"{self._view.explain(start, end)}\nWaited {self._settings.deadline_s:g} s. "
                    "`swarm status` shows the whole picture; deadline_s=… waits longer."
                )
            max_age_s = 0.0 if legs is None else max_age_s
        for boundary in list(self._logs):
            if any(hop.start < boundary < hop.end for hop in self._hops.values()):
                del self._logs[boundary]  # nobody enters there any more
        self._note_recoveries()

    async def _take_over(self, legs: tuple[Leg, ...]) -> None:
        """Open `legs` all at once and replay into them, first to last. Those that fail are left out."""
        opened = await asyncio.gather(*(self._open(leg) for leg in legs), return_exceptions=True)
        for leg, hop in zip(legs, opened, strict=True):
            if isinstance(hop, BaseException):
                self._do_not_use(leg.peer_id, hop)
            elif hop.start not in self._logs:  # a leg before it failed, so nobody knows what enters here
                await hop.close()
            else:
                try:
                    await self._replay(hop)
                    self._hops[hop.start] = hop
                except (PeerError, RemoteError) as error:
                    await hop.abandon()
                    self._do_not_use(hop.peer_id, error)

    def _do_not_use(self, peer_id: str, error: BaseException) -> None:
        if not isinstance(error, PeerError | RemoteError):
            raise error
        logger.info("%s does not take over: %s", peer_id, error)
        self._view.penalize(peer_id, error)

    async def _open(self, leg: Leg) -> Hop:
        return await Hop.open(
            self._node,
            self._view.server(leg.peer_id),
            leg,
            model=self._checkpoint.model_digest,
            batch=self._batch,
            max_length=self._max_length,
            settings=self._settings,
        )

    async def _replay(self, hop: Hop) -> None:
        """Bring a fresh server to the session's state, and learn what leaves it if nobody knows that yet."""
        following = ActivationLog() if hop.end not in self._logs and hop.end < self._checkpoint.num_blocks else None
        log = self._logs[hop.start]
        if len(log):
            states = log.since(0)
            for begin, end in self._chunks(states):
                position_ids = self._position_ids[:, begin:end] if self._position_ids is not None else None
                mask = self._mask[:, begin:end] if self._mask is not None else None
                output, _ = await hop.step(begin, states[:, begin:end], position_ids, mask)
                if following is not None:
                    following.append(output)
        if following is not None:
            self._logs[hop.end] = following

    async def _lose(self, hop: Hop, error: Exception) -> None:
        """Take a server that failed out of the route."""
        if not isinstance(error, CannotRollBack):  # that one is well; it only needs the session anew
            logger.info("lost %s (blocks %d to %d): %s", hop.peer_id, hop.start, hop.end - 1, error)
            self._view.penalize(hop.peer_id, error)
        self._lost.append((Leg(hop.peer_id, hop.start, hop.end), str(error), time.monotonic()))
        del self._hops[hop.start]
        await hop.abandon()

    async def _leave_draining_servers(self) -> None:
        """Move away from servers that said they leave, as far as others can take over."""
        for hop in [hop for hop in self._hops.values() if hop.draining]:
            await self._view.refresh(max_age_s=_VIEW_AGE_S)
            if self._view.route(hop.start, hop.end, salt=self._salt, without=hop.peer_id) is None:
                continue
            logger.info("moving from %s, which is leaving", hop.peer_id)
            self._view.penalize(hop.peer_id, RemoteError("it is leaving"))
            self._lost.append((Leg(hop.peer_id, hop.start, hop.end), "it is leaving", time.monotonic()))
            del self._hops[hop.start]
            await hop.close()

    def _note_recoveries(self) -> None:
        now, open_still = time.monotonic(), []
        for leg, reason, lost_at in self._lost:
            if any(hop.start <= leg.start < hop.end for hop in self._hops.values()):
                self.recoveries.append(Recovery(leg.peer_id, leg.start, leg.end, reason, self._position, now - lost_at))
            else:
                open_still.append((leg, reason, lost_at))
        self._lost = open_still

    def _check_batch(self, batch: int) -> None:
        if self._batch == 0 or self._position == 0:
            if batch != self._batch:
                self._start_over(batch)
        elif batch != self._batch:
            raise ValueError(f"this session holds {self._batch} sequences, the step has {batch}")

    def _start_over(self, batch: int) -> None:
        self._batch = batch
        self._position_ids = self._mask = None
        self._logs = {boundary: ActivationLog() for boundary in self._logs}
        for hop in self._hops.values():
            hop.pending_reorder = torch.zeros(batch, dtype=torch.int64)

    def _keep_position_ids(self, hidden_states: torch.Tensor, given: torch.Tensor | None) -> torch.Tensor | None:
        batch, count, _ = hidden_states.shape
        default = torch.arange(self._position, self._position + count).expand(batch, count)
        ids = default if given is None else given.detach().to("cpu", torch.int64).expand(batch, count)
        if self._position_ids is None and torch.equal(ids, default):
            return None
        if self._position_ids is None:
            self._position_ids = torch.arange(self._position).expand(batch, self._position)
        self._position_ids = torch.cat([self._position_ids, ids], dim=1)
        return ids

    def _keep_mask(self, hidden_states: torch.Tensor, given: torch.Tensor | None) -> torch.Tensor | None:
        batch, count, _ = hidden_states.shape
        if self._mask is None and (given is None or bool(given.all())):
            return None
        new = torch.ones(batch, count, dtype=torch.uint8) if given is None else given.to("cpu", torch.uint8)
        past = self._mask if self._mask is not None else torch.ones(batch, self._position, dtype=torch.uint8)
        self._mask = torch.cat([past, new], dim=1)
        return new

    def _chunks(self, hidden_states: torch.Tensor) -> list[tuple[int, int]]:
        batch, count, size = hidden_states.shape
        each = max(1, _CHUNK_BYTES // (batch * size * hidden_states.element_size()))
        return [(begin, min(begin + each, count)) for begin in range(0, count, each)]
