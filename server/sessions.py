"""The sessions that a server holds: admission by KV budget, caches, and their steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from swarm.errors import BlocksNotHosted, CacheFull, CannotRollBack, Draining, SessionTooLarge, WrongModel
from swarm.models import Span, SpanCache
from swarm.models.together import Together
from swarm.protocol.messages import Open
from swarm.protocol.served_session import Work


@dataclass
class HeldSession:
    """One client's session on this server. Its cache belongs to the compute thread."""

    span: Span
    cache: SpanCache
    batch: int
    reserved_positions: int
    """Per sequence."""
    together: Together | None = None
    """How single positions may run together with those of other sessions."""
    mask: torch.Tensor | None = field(default=None)
    """[batch, cached] int64, once anything was padded; None: no padding."""

    def group(self, work: Work) -> tuple[int, int] | None:
        """The blocks on which `work` can run together with that of other sessions; None: it must run alone."""
        single = work.hidden_states.shape[1] == 1 and work.mask is None and self.mask is None
        return (self.span.start, self.span.end) if self.together is not None and single else None

    def prepare(self, work: Work) -> None:
        """Take the cache to where `work` begins.

        Raises:
            CannotRollBack: the cache cannot return there.
        """
        if not self.cache.roll_back(work.position):
            raise CannotRollBack(
                f"this model's sliding-window layers have forgotten what position {work.position} needs "
                f"(the cache ends at {self.cache.length})"
            )
        if self.mask is not None:
            self.mask = self.mask[:, : work.position] if work.position else None
        if work.reorder is not None:
            rows = torch.tensor(work.reorder, device=self.span.device)
            self.cache.reorder_cache(rows)
            self.mask = self.mask[rows] if self.mask is not None else None
        self.batch = work.hidden_states.shape[0]

    def run(self, work: Work) -> torch.Tensor:
        """Run a step on the device; the result is on the CPU. Raises as :meth:`prepare`."""
        self.prepare(work)
        self._extend_mask(work)
        states, ids = self.inputs(work)
        return self.span.forward(states, self.cache, ids, self.mask).to("cpu")

    def inputs(self, work: Work) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Hidden states and position ids where and as the span takes them."""
        device, ids = self.span.device, work.position_ids
        return work.hidden_states.to(device, self.span.dtype), ids.to(device) if ids is not None else None

    def _extend_mask(self, work: Work) -> None:
        batch, count, _ = work.hidden_states.shape
        if self.mask is None and work.mask is None:
            return
        ones = torch.ones(batch, work.position, dtype=torch.int64, device=self.span.device)
        new = work.mask if work.mask is not None else torch.ones(batch, count)
        past = self.mask if self.mask is not None else ones
        self.mask = torch.cat([past, new.to(past)], dim=1)


def run_steps(steps: Sequence[tuple[HeldSession, Work]]) -> list[torch.Tensor | Exception]:
    """Run a step, or steps of one :meth:`HeldSession.group` together. Called on the compute thread only.

    Returns:
        For every step its result on the CPU, or why it cannot be run (:class:`CannotRollBack`).
    """
    if len(steps) == 1:
        return [held.run(work) for held, work in steps]
    results: list[torch.Tensor | Exception] = [CannotRollBack()] * len(steps)
    ready: list[int] = []
    for index, (held, work) in enumerate(steps):
        try:
            held.prepare(work)
            ready.append(index)
        except CannotRollBack as error:
            results[index] = error
    if not ready:
        return results
    inputs = [(steps[index][0], *steps[index][0].inputs(steps[index][1])) for index in ready]
    way = steps[0][0].together
    assert way is not None
    outputs = way.forward(steps[0][0].span, [(states, held.cache, ids) for held, states, ids in inputs])
    for index, output in zip(ready, outputs, strict=True):
        results[index] = output.to("cpu")
    return results


class SessionTable:
    """Who is here, and how much KV cache is promised to them."""

    def __init__(
        self,
        span: Span,
        model: str,
        kv_tokens: int,
        max_sessions: int,
        kept_blocks: int = 0,
        *,
        together: Together | None = None,
    ) -> None:
        """
        Args:
            together: how single positions of different sessions can run as one batch, if they can.
            kept_blocks: what is kept of a position besides its KV cache (the activations that were sent on) takes
                as much memory as the KV cache of so many blocks.
        """
        self._span, self._model, self._kept_blocks, self._together = span, model, kept_blocks, together
        self._budget = kv_tokens * self._cost(span)
        self._max_sessions = max_sessions
        self._held: dict[int, HeldSession] = {}
        self.draining = False

    def __len__(self) -> int:
        return len(self._held)

    @property
    def free_tokens(self) -> int:
        """Positions of KV cache on the whole span that are promised to nobody."""
        return max(0, self._budget - self._promised()) // self._cost(self._span)

    def open(self, request: Open) -> HeldSession:
        """Make room for a session.

        Raises:
            Draining, WrongModel, BlocksNotHosted, CacheFull (SessionTooLarge: for ever): why not.
        """
        if self.draining:
            raise Draining("this server is leaving and takes no new session")
        if request.model != self._model:
            raise WrongModel(
                f"this server hosts the model {self._model[:16]}…, the client asked for {request.model[:16]}…: "
                "the two have different weights"
            )
        if not self._span.start <= request.start < request.end <= self._span.end:
            raise BlocksNotHosted(
                f"this server hosts blocks [{self._span.start}, {self._span.end}), not [{request.start}, {request.end})"
            )
        if len(self._held) >= self._max_sessions:
            raise CacheFull(f"this server holds {self._max_sessions} sessions already, which is its limit")
        part = self._span.part(request.start, request.end)
        session = HeldSession(part, part.new_cache(), request.batch, reserved_positions=0, together=self._together)
        self._reserve(session, request.batch, request.max_length)
        self._held[id(session)] = session
        return session

    def grow(self, session: HeldSession, work: Work) -> None:
        """Make room for a step that goes beyond what the session reserved.

        Raises:
            CacheFull: there is none.
        """
        batch, count, _ = work.hidden_states.shape
        needed = max(session.reserved_positions, work.position + count)
        if batch > session.batch or needed > session.reserved_positions:
            self._reserve(session, batch, needed)

    def close(self, session: HeldSession) -> None:
        """Free what a session held."""
        self._held.pop(id(session), None)

    def _reserve(self, session: HeldSession, batch: int, positions: int) -> None:
        cost = self._cost(session.span)
        wanted = batch * positions * cost
        if wanted > self._budget:
            raise SessionTooLarge(
                f"{batch} × {positions} positions of KV cache are more than this server has in all: "
                f"{self._budget // cost}, so {self._budget // cost // batch} for each of {batch}"
            )
        free = self._budget - self._promised(but=session)
        if wanted > free:
            raise CacheFull(
                f"{batch} × {positions} positions of KV cache are more than the {max(0, free) // cost} that are "
                f"free on this server (of {self._budget // cost}); try again later, or ask for a shorter session"
            )
        session.batch, session.reserved_positions = batch, positions

    def _promised(self, but: HeldSession | None = None) -> int:
        return sum(
            held.batch * held.reserved_positions * self._cost(held.span)
            for held in self._held.values()
            if held is not but
        )

    def _cost(self, span: Span) -> int:
        """Of one position on `span`, in blocks of KV cache."""
        return span.end - span.start + self._kept_blocks
