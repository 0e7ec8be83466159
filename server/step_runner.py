"""Run steps of sessions on the compute thread: long ones in parts, and those that lacked experts once more."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from swarm.errors import ExpertsMissing, ServerFault
from swarm.protocol.served_actions import Spent, Work
from swarm.server.compute import ComputeThread
from swarm.server.experts.dispatch import ExpertDispatch
from swarm.server.schedule import MAX_SHORT, Waiting
from swarm.server.sessions import HeldSession, SessionTable, run_steps

logger = logging.getLogger(__name__)

PART = 2 * MAX_SHORT
"""Positions of a prompt's piece that run at once while others' tokens come; no part is to be taken for a token."""
_TOKENS_COME_FOR_S = 0.25
"""So long after the last one, the next is expected."""
_BUSY_FOR_S = 3.0
_GRACE_S = 2.0
"""Experts are waited for so long, once in a session, before one that allows it goes on without them."""


class StepRunner:
    """What a server computes for its sessions."""

    def __init__(
        self, compute: ComputeThread, experts: ExpertDispatch | None = None, experts_deadline_s: float = 0.0
    ) -> None:
        """
        Args:
            experts: those of the hosted blocks that are elsewhere.
            experts_deadline_s: a step waits so long for some that nobody hosts.
        """
        self.compute = compute
        self._experts, self._experts_deadline_s = experts, experts_deadline_s
        self._steps_under_way = 0
        self._last_step_at = float("-inf")

    def is_busy(self) -> bool:
        """Whether a step is under way, or was a moment ago."""
        return self._steps_under_way > 0 or time.monotonic() - self._last_step_at < _BUSY_FOR_S

    def parts(self, table: SessionTable, held: HeldSession, work: Work) -> list[Work]:
        """What to run `work` of a session of `table` as: while tokens of others come, in parts; they run in between."""
        most = max(1, PART // work.hidden_states.shape[0])
        is_cut = work.count > most and held.group(work) is not None and self._tokens_come(table, held)
        return work.split(most) if is_cut else [work]

    def begin(
        self, table: SessionTable, held: HeldSession, work: Work, *, can_wait: bool
    ) -> asyncio.Future[tuple[torch.Tensor, Spent]]:
        """Have `work` computed for a session of `table`; wait for it with :meth:`complete`.

        Raises:
            CacheFull: there is no room for it.
        """
        table.grow(held, work)
        waiting = Waiting(work.hidden_states.shape[:2].numel(), held.group(work), can_wait)
        if waiting.is_short:
            held.last_short_at = time.monotonic()
        begun = self.compute.begin((held, work), run_steps, waiting, id(held))
        if work.recalled and not can_wait:
            self.compute.expect(id(held))  # what comes after the beginning, of all who waited for it
        self._steps_under_way += 1
        begun.add_done_callback(self._step_ended)
        return begun

    def left(self, held: HeldSession) -> None:
        """The session is over: nothing more comes of it."""
        self.compute.expect_no_longer(id(held))

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

    def _tokens_come(self, table: SessionTable, but: HeldSession) -> bool:
        since = time.monotonic() - _TOKENS_COME_FOR_S
        return any(held.last_short_at > since for held in table if held is not but)

    def _step_ended(self, _: object) -> None:
        self._steps_under_way -= 1
        self._last_step_at = time.monotonic()
