"""The sessions that a server holds: admission by pages of KV cache, and their steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from swarm.errors import BlocksNotHosted, CacheFull, Draining, SessionTooLarge, WrongModel
from swarm.models import Span
from swarm.models.paged_cache import PagedCache, PagePool
from swarm.models.pages import PAGE, pages_for
from swarm.models.together import Together
from swarm.protocol.messages import Open
from swarm.protocol.served_session import Work


@dataclass
class HeldSession:
    """One client's session on this server. Its cache belongs to the compute thread."""

    span: Span
    cache: PagedCache
    batch: int
    reserved_positions: int
    """Per sequence."""
    together: Together | None = None
    """How single positions may run together with those of other sessions."""
    reuses: bool = True
    """What was computed before, for whomever, is not computed again."""
    mask: torch.Tensor | None = field(default=None)
    """[batch, cached] int64, once anything was padded; None: no padding."""

    def group(self, work: Work) -> tuple[int, int] | None:
        """The blocks on which `work` can run together with that of other sessions; None: it must run alone."""
        single = work.hidden_states.shape[1] == 1 and work.mask is None and self.mask is None
        return (self.span.start, self.span.end) if self.together is not None and single else None

    def prepare(self, work: Work) -> None:
        """Take the cache to where `work` begins."""
        self.cache.roll_back(work.position)
        if self.mask is not None:
            self.mask = self.mask[:, : work.position] if work.position else None
        if work.reorder is not None:
            rows = torch.tensor(work.reorder, device=self.span.device)
            self.cache.reorder_cache(rows)
            self.mask = self.mask[rows] if self.mask is not None else None
        self.batch = work.hidden_states.shape[0]

    def run(self, work: Work) -> torch.Tensor:
        """Run a step on the device; the result is on the CPU.

        Positions that the server has computed before, with the same before them, are not computed again.
        """
        self.prepare(work)
        self._extend_mask(work)
        if self.mask is not None or not self.reuses:
            return self._compute(work, 0)
        known = self.cache.reuse(work.hidden_states, work.position_ids)
        done = known.shape[1] if known is not None else 0
        if done == work.hidden_states.shape[1]:
            assert known is not None
            return known
        output = self._compute(work, done)
        self.remember(work, output, done)
        return torch.cat([known, output], dim=1) if known is not None else output

    def inputs(self, work: Work, begin: int = 0) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Hidden states and position ids where and as the span takes them, from the position `begin` of `work` on."""
        device, ids = self.span.device, work.position_ids
        states = work.hidden_states[:, begin:].to(device, self.span.dtype)
        return states, ids[:, begin:].to(device) if ids is not None else None

    def remember(self, work: Work, output: torch.Tensor, begin: int = 0) -> None:
        """Let others reuse what was computed of `work`, from its position `begin` on."""
        if not self.reuses:
            return
        ids = work.position_ids[:, begin:] if work.position_ids is not None else None
        self.cache.remember(work.hidden_states[:, begin:], ids, output, work.position + begin)

    def _compute(self, work: Work, begin: int) -> torch.Tensor:
        states, ids = self.inputs(work, begin)
        self.cache.begin(*states.shape[:2])
        return self.span.forward(states, self.cache, ids, self.mask).to("cpu")

    def _extend_mask(self, work: Work) -> None:
        batch, count, _ = work.hidden_states.shape
        if self.mask is None and work.mask is None:
            return
        ones = torch.ones(batch, work.position, dtype=torch.int64, device=self.span.device)
        new = work.mask if work.mask is not None else torch.ones(batch, count)
        past = self.mask if self.mask is not None else ones
        self.mask = torch.cat([past, new.to(past)], dim=1)


def run_steps(steps: Sequence[tuple[HeldSession, Work]]) -> list[torch.Tensor]:
    """Run a step, or steps of one :meth:`HeldSession.group` together. Called on the compute thread only.

    Returns:
        The result of every step, on the CPU.
    """
    first, _ = steps[0]
    alone = first.group(steps[0][1]) is None or first.together is None or not first.together.runs_one_faster
    if len(steps) == 1 and alone:
        return [held.run(work) for held, work in steps]
    for held, work in steps:
        held.prepare(work)
    inputs = [(held.cache, *held.inputs(work)) for held, work in steps]
    assert first.together is not None
    outputs = first.together.forward(first.span, [(states, cache, ids) for cache, states, ids in inputs])
    results = [output.to("cpu") for output in outputs]
    for (held, work), result in zip(steps, results, strict=True):
        held.remember(work, result)
    return results


class SessionTable:
    """Who is here, and how many pages of KV cache are promised to them."""

    def __init__(
        self,
        span: Span,
        model: str,
        pool: PagePool,
        max_sessions: int,
        *,
        together: Together | None = None,
        reuses: bool = True,
    ) -> None:
        """
        Args:
            together: how single positions of different sessions can run as one batch, if they can.
            reuses: beginnings that sessions have in common are computed once.
        """
        self._reuses = reuses
        self._span, self._model, self._pool, self._together = span, model, pool, together
        self._max_sessions = max_sessions
        self._held: dict[int, HeldSession] = {}
        self.draining = False

    def __len__(self) -> int:
        return len(self._held)

    @property
    def free_tokens(self) -> int:
        """Positions of KV cache that are promised to nobody."""
        return max(0, len(self._pool.pages) - self._promised()) * PAGE

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
        cache = self._pool.new_cache(request.start, request.end, request.max_length)
        session = HeldSession(
            part, cache, request.batch, reserved_positions=0, together=self._together, reuses=self._reuses
        )  # fmt: skip
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
        """Promise what a session held to others; its cache must be released before they come to use it."""
        self._held.pop(id(session), None)

    def _reserve(self, session: HeldSession, batch: int, positions: int) -> None:
        everything, wanted = len(self._pool.pages), batch * pages_for(positions)
        if wanted > everything:
            raise SessionTooLarge(
                f"{batch} × {positions} positions of KV cache are more than this server has in all: "
                f"{everything * PAGE}, so {everything // batch * PAGE} for each of {batch}"
            )
        free = max(0, everything - self._promised(but=session))
        if wanted > free:
            raise CacheFull(
                f"{batch} × {positions} positions of KV cache are more than the {free * PAGE} that are "
                f"free on this server (of {everything * PAGE}); try again later, or ask for a shorter session"
            )
        session.batch, session.reserved_positions = batch, positions

    def _promised(self, but: HeldSession | None = None) -> int:
        return sum(held.batch * pages_for(held.reserved_positions) for held in self._held.values() if held is not but)
