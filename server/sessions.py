"""The sessions that a server holds: admission by pages of KV cache, and their steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from swarm.errors import BlocksNotHosted, CacheFull, Draining, Forgotten, SessionTooLarge, WrongModel
from swarm.models import Span
from swarm.models.experts import without_experts
from swarm.models.paged_cache import PagedCache, PagePool
from swarm.models.pages import pages_for
from swarm.models.together import Together
from swarm.page_names import PAGE
from swarm.protocol.messages import Open
from swarm.protocol.served_actions import Work


@dataclass
class HeldSession:
    """One client's session on this server. Its cache belongs to the compute thread."""

    span: Span
    cache: PagedCache
    batch: int
    reserved_positions: int
    """Per sequence."""
    together: Together | None = None
    """How short steps may run together with those of other sessions."""
    reuses: bool = True
    """What was computed before, for whomever, is not computed again."""
    allows_degraded: bool = False
    """Rather leave out experts that nobody hosts than wait for them."""
    leaves_out: Mapping[int, frozenset[int]] | None = None
    """Experts, by block, that are to be left out of the next step; None: none."""
    is_degraded: bool = False
    """Some were left out: what its cache holds is not what others would compute."""
    mask: torch.Tensor | None = field(default=None)
    """[batch, cached] int64, once anything was padded; None: no padding."""
    last_short_at: float = float("-inf")
    """When a token, or a few, came last (``time.monotonic()``)."""
    prefix: list[bytes] = field(default_factory=list)
    """Pages that it begins with, if whoever sends it wants that, and was told that they are known."""

    @property
    def blocks(self) -> tuple[int, int]:
        """``[start, end)``"""
        return self.span.start, self.span.end

    def of_use(self, prefix: Sequence[bytes]) -> list[bytes]:
        """Of the pages that it is going to begin with, those that could be recalled if they were known."""
        return list(prefix[: self.reserved_positions // PAGE]) if self._may_reuse and self.batch == 1 else []

    def begins_with(self, prefix: Sequence[bytes]) -> int:
        """Note what the session is going to begin with; returns how many positions of it can be recalled."""
        prefix = self.of_use(prefix)
        self.prefix = prefix[: len(self.cache.known(prefix))]
        return len(self.prefix) * PAGE

    def hold_prefix(self) -> None:
        """Keep the known beginning until it is recalled, or another one comes. Called on the compute thread only."""
        if self.prefix and not self.cache.length:
            self.cache.adopt(self.prefix)

    def names_for_next(self) -> list[bytes]:
        """What its prefix is called where it leaves the span."""
        return self.cache.known(self.prefix)

    def group(self, work: Work) -> tuple[int, int] | None:
        """The blocks on which `work` can run together with that of other sessions; None: it must run alone."""
        if self.together is None or work.recalled:
            return None
        if work.mask is not None or self.mask is not None or self.leaves_out is not None:
            return None
        return self.blocks if work.hidden_states.shape[1] <= self.together.most_positions else None

    def run(self, work: Work) -> torch.Tensor:
        """Run a step on the device; the result is on the CPU.

        Raises:
            Forgotten: what it begins with is not known any more.
        """
        if work.recalled:
            return self._recall(work.recalled)
        known = self.take_up(work)
        if not _is_part(known, work):
            return known
        states, _, ids = self.step(work, known.shape[1])
        self.cache.begin(*states.shape[:2])
        if not self.leaves_out:
            return self.complete(work, known, self.span.forward(states, self.cache, ids, self.mask))
        self.is_degraded = True
        with without_experts(self.span.layers, self.leaves_out):
            return self.complete(work, known, self.span.forward(states, self.cache, ids, self.mask))

    def take_up(self, work: Work) -> torch.Tensor:
        """Take the cache to where `work` begins, and past what the server has computed before.

        Returns:
            What the span makes of the positions that it has computed before, with the same before them (for whomever),
            ``[batch, how many, hidden]`` on the CPU.
        """
        self.cache.roll_back(work.position)
        if self.mask is not None:
            self.mask = self.mask[:, : work.position] if work.position else None
        if work.reorder is not None:
            rows = torch.tensor(work.reorder, device=self.span.device)
            self.cache.reorder_cache(rows)
            self.mask = self.mask[rows] if self.mask is not None else None
        self.batch = work.hidden_states.shape[0]
        self._extend_mask(work)
        known = self.cache.reuse(work.hidden_states, work.position_ids) if self._may_reuse else None
        return known if known is not None else work.hidden_states[:, :0]

    def step(self, work: Work, begin: int) -> tuple[torch.Tensor, PagedCache, torch.Tensor | None]:
        """As the span takes it, what is to be computed of `work` from its position `begin` on."""
        device, ids = self.span.device, work.position_ids
        states = work.hidden_states[:, begin:].to(device, self.span.dtype)
        return states, self.cache, ids[:, begin:].to(device) if ids is not None else None

    def complete(self, work: Work, known: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """The result of `work` on the CPU: what was `known`, and then `output`, which is kept to be reused."""
        output, begin = output.to("cpu"), known.shape[1]
        if self._may_reuse:
            states, ids = work.hidden_states, work.position_ids
            if begin:
                states, ids = states[:, begin:], ids[:, begin:] if ids is not None else None
            self.cache.remember(states, ids, output, work.position + begin)
        return torch.cat([known, output], dim=1) if begin else output

    def _recall(self, positions: int) -> torch.Tensor:
        self.batch, self.mask = 1, None
        known = self.cache.adopt(self.prefix[: positions // PAGE])
        if known is None:
            raise Forgotten(f"of {positions} positions that this session begins with, some are not known any more")
        return torch.cat(known).unsqueeze(0)

    @property
    def _may_reuse(self) -> bool:
        return self.reuses and self.mask is None and not self.is_degraded

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
    assert first.together is not None
    taken_up = [(held, work, held.take_up(work)) for held, work in steps]
    rest = [held.step(work, known.shape[1]) for held, work, known in taken_up if _is_part(known, work)]
    outputs = iter(first.together.forward(first.span, rest) if rest else ())
    return [
        held.complete(work, known, next(outputs)) if _is_part(known, work) else known for held, work, known in taken_up
    ]


def _is_part(known: torch.Tensor, work: Work) -> bool:
    return known.shape[1] < work.hidden_states.shape[1]


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

    def __iter__(self) -> Iterator[HeldSession]:
        return iter(self._held.values())

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
            part,
            cache,
            request.batch,
            reserved_positions=0,
            together=self._together,
            reuses=self._reuses,
            allows_degraded=request.allow_degraded,
        )
        self._reserve(session, request.batch, request.max_length)
        self._held[id(session)] = session
        return session

    def grow(self, session: HeldSession, work: Work) -> None:
        """Make room for a step that goes beyond what the session reserved.

        Raises:
            CacheFull: there is none.
        """
        batch = work.hidden_states.shape[0]
        needed = max(session.reserved_positions, work.position + work.count)
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
