"""Look now and then whether this server should host other blocks, and see that servers move one after another."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

from swarm.dht import Announcement, Directory, MoveClaims, State
from swarm.placement import Capacity, Hosting, Loaded, Move, choose_span, goes_before, may_move, settle, wanted_move
from swarm.server.preparation import Prepared
from swarm.server.presence import Presence
from swarm.server.settings import ServerSettings
from swarm.server.surroundings import comparable, hostings, leaves_enough, under_way

logger = logging.getLogger(__name__)

_JITTER = 0.5
_RENEW_CLAIM_S = 3.0


class Rebalancing:
    """Finds this server's place in the swarm when it joins, and better ones later."""

    def __init__(
        self, peer_id: str, directory: Directory, presence: Presence, prepared: Prepared, settings: ServerSettings
    ) -> None:
        checkpoint = prepared.checkpoint
        self._peer_id, self._directory, self._presence, self._settings = peer_id, directory, presence, settings
        self._model, self._num_blocks = checkpoint.model_digest, checkpoint.num_blocks
        self._blocks = prepared.plan.num_blocks
        self._may_host_fewer = settings.num_blocks is None and not prepared.plan.offloaded_blocks
        self._claims = MoveClaims(directory, peer_id, self._model, self._num_blocks)

    async def find_place(self) -> None:
        """Choose what to host, as :attr:`Presence.bounds`, together with all who join at the same time.

        Each says tentatively where it would go, and looks again when the others must have seen that. Who has made up
        its mind is, to those who come later, a server like those that serve.
        """
        presence = self._presence
        others = await self._others()
        capacity = Capacity(self._blocks)
        blocks = None if self._may_host_fewer else self._blocks
        presence.bounds = choose_span(hostings(others), self._num_blocks, capacity, blocks=blocks)
        if self._settings.initial_peers and self._settings.settle_wait_s > 0:
            presence.tentative = True
            await presence.announce()
            await asyncio.sleep(self._settings.settle_wait_s * random.uniform(1, 1 + _JITTER))
            others = await self._others()
            all_of_them = {one.peer_id: one for one in hostings(others)}
            joining = [all_of_them.pop(one.peer_id) for one in others if one.tentative and one.state is State.JOINING]
            me = Hosting(self._peer_id, *presence.bounds, steps_per_s=0.0)
            presence.bounds = settle(me, joining, all_of_them.values(), self._num_blocks, tiles=self._may_host_fewer)
            presence.tentative = False
        await presence.announce()

    async def run(self, carry_out: Callable[[Move], Awaitable[bool]]) -> None:
        """Look now and then, for ever.

        Args:
            carry_out: makes the move; False: it failed, and the server is where it was. What it raises, this raises.
        """
        failures, rest_s = 0, 0.0
        while True:
            pause_s = self._settings.rebalance_interval_s * random.uniform(1 - _JITTER, 1 + _JITTER)
            await asyncio.sleep(max(pause_s, rest_s))
            rest_s = 0.0
            move = await self._claimed_move()
            if move is None:
                continue
            async with self._kept_alive(move):
                moved = await carry_out(move)
            failures = 0 if moved else failures + 1
            if failures:
                rest_s = self._settings.failed_move_pause_s * 2 ** min(failures - 1, 10)

    async def _claimed_move(self) -> Move | None:
        """A move that this server may begin now; None if there is none, or others go first."""
        move = self._wanted(await self._everybody())
        if move is None:
            return None
        logger.info("this server would rather host %s", move.reason)
        if not await self._claims.publish(move):
            logger.warning("the claim to move was not stored; not moving")
            return None
        await asyncio.sleep(self._settings.claim_wait_s * random.uniform(1, 1 + _JITTER))
        everybody, claims = await self._everybody(), await self._claims.alive()
        again = self._wanted(everybody)
        if again is None or again.new != move.new:
            logger.info("not any more")
            return None
        under_way_now = [one for one in under_way(claims, everybody) if one.peer_id != self._peer_id]
        there, policy = hostings(everybody), self._settings.move_policy
        if not may_move(again, under_way_now, there, self._num_blocks, policy, self._loaded(there)):
            logger.info("others move first")
            return None
        going = {one.peer_id for one in under_way_now if goes_before(one, again)}
        if not leaves_enough(again, [one for one in everybody if one.peer_id not in going], self._num_blocks):
            logger.info("it is needed where it is until others have moved")
            return None
        return again

    def _wanted(self, everybody: list[Announcement]) -> Move | None:
        there = hostings(everybody)
        me = next((one for one in there if one.peer_id == self._peer_id), None)
        if me is None or self._presence.state is not State.ONLINE or me.span != self._presence.focus:
            return None  # the directory is behind the times
        move = wanted_move(me, there, self._num_blocks, self._settings.move_policy, self._loaded(there))
        return move if move is not None and leaves_enough(move, everybody, self._num_blocks) else None

    def _loaded(self, there: Sequence[Hosting]) -> Loaded | None:
        """What this server, which is `there`, has in memory; None: its owner wants so many blocks to be hosted."""
        if not self._may_host_fewer:
            return None
        me = next(one for one in there if one.peer_id == self._peer_id)
        start, end = self._presence.bounds
        return Loaded(start, end, Capacity(end - start, me.steps_per_s * me.length))

    async def _everybody(self) -> list[Announcement]:
        found = await self._directory.servers(self._model)
        return comparable(found, self._num_blocks, self._presence.precision)

    async def _others(self) -> list[Announcement]:
        return [one for one in await self._everybody() if one.peer_id != self._peer_id]

    @contextlib.asynccontextmanager
    async def _kept_alive(self, move: Move) -> AsyncIterator[None]:
        """Renew the claim to `move` until it is over."""

        async def renew() -> None:
            while True:
                await self._claims.publish(move)
                await asyncio.sleep(_RENEW_CLAIM_S)

        task = asyncio.create_task(renew())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait([task])
