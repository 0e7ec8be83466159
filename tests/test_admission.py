"""What a server promises it has room for, whom it turns away and why, and what a session's cache survives."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from tiny_models import save_tiny_model

from swarm.errors import BlocksNotHosted, CacheFull, Draining, WrongModel
from swarm.models import Span, load_span, open_checkpoint
from swarm.models.paged_cache import PagePool
from swarm.models.pages import pages_for
from swarm.page_names import PAGE
from swarm.protocol.messages import Open, Step
from swarm.protocol.served_actions import Work
from swarm.server.sessions import HeldSession, SessionTable

MODEL = "ab" * 32
START, END = 1, 4
HIDDEN = 64


def load(name: str, directory: Path) -> Span:
    save_tiny_model(name, directory)
    return load_span(open_checkpoint(str(directory)), START, END, dtype=torch.float32)


@pytest.fixture(scope="module")
def span(tmp_path_factory: pytest.TempPathFactory) -> Span:
    return load("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def sliding_span(tmp_path_factory: pytest.TempPathFactory) -> Span:
    return load("mistral", tmp_path_factory.mktemp("mistral"))


def table_for(span: Span, pages: int = 10, max_sessions: int = 8) -> SessionTable:
    return SessionTable(span, MODEL, PagePool.for_span(span, HIDDEN, pages), max_sessions)


def request(batch: int = 1, max_length: int = 10, start: int = START, end: int = END, model: str = MODEL) -> Open:
    return Open(session="0" * 32, model=model, start=start, end=end, batch=batch, max_length=max_length)


def step(
    states: torch.Tensor,
    position: int,
    *,
    reorder: Sequence[int] | None = None,
    mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
) -> Work:
    rows = None if reorder is None else list(reorder)
    return Work(
        position, rows, states, position_ids, mask, Step(sequence=1, position=position, reorder=rows, tensors=[])
    )


def states(batch: int, count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, count, HIDDEN, generator=torch.Generator().manual_seed(seed))


# Admission


def test_a_session_reserves_whole_pages_and_frees_them_when_it_closes(span: Span) -> None:
    table = table_for(span)
    session = table.open(request(batch=2, max_length=PAGE + 1))
    assert (len(table), table.free_tokens) == (1, 6 * PAGE)
    table.close(session)
    table.close(session)
    assert (len(table), table.free_tokens) == (0, 10 * PAGE)


def test_a_session_on_part_of_the_span_runs_that_part_and_takes_pages_as_any(span: Span) -> None:
    table = table_for(span)
    session = table.open(request(max_length=90, start=2, end=3))
    assert table.free_tokens == 4 * PAGE
    assert (session.span.start, session.span.end) == (2, 3)
    assert len(session.cache.layers) == 1


def test_other_weights_are_refused_and_both_are_named(span: Span) -> None:
    with pytest.raises(WrongModel, match=r"abababababababab….*cdcdcdcdcdcdcdcd…"):
        table_for(span).open(request(model="cd" * 32))


@pytest.mark.parametrize(("start", "end"), [(0, 4), (1, 5), (0, 1), (4, 5), (2, 2), (3, 2)])
def test_blocks_that_are_not_hosted_are_refused_and_named(span: Span, start: int, end: int) -> None:
    with pytest.raises(BlocksNotHosted, match=rf"hosts blocks \[1, 4\), not \[{start}, {end}\)"):
        table_for(span).open(request(start=start, end=end))


def test_a_session_for_which_there_is_no_room_is_told_how_much_there_is(span: Span) -> None:
    table = table_for(span)
    table.open(request(batch=2, max_length=30))
    with pytest.raises(CacheFull, match=r"4 × 20 positions .* the 96 that are free on this server \(of 160\)"):
        table.open(request(batch=4, max_length=20))
    assert (len(table), table.free_tokens) == (1, 96)
    table.open(request(batch=3, max_length=20))
    assert table.free_tokens == 0


def test_a_draining_server_takes_no_session_and_keeps_those_it_has(span: Span) -> None:
    table = table_for(span)
    session = table.open(request(max_length=5))
    table.draining = True
    with pytest.raises(Draining):
        table.open(request())
    table.grow(session, step(states(1, 20), 0))
    assert (len(table), session.reserved_positions) == (1, 20)


def test_more_sessions_than_the_limit_are_refused(span: Span) -> None:
    table = table_for(span, max_sessions=2)
    first, _ = table.open(request(max_length=1)), table.open(request(max_length=1))
    with pytest.raises(CacheFull, match="holds 2 sessions already"):
        table.open(request(max_length=1))
    table.close(first)
    table.open(request(max_length=1))


def test_who_is_refused_leaves_nothing_behind(span: Span) -> None:
    table = table_for(span)
    for wish in (request(model="cd" * 32), request(start=0), request(max_length=161)):
        with pytest.raises((WrongModel, BlocksNotHosted, CacheFull)):
            table.open(wish)
    assert (len(table), table.free_tokens) == (0, 160)


def test_a_session_grows_beyond_its_reservation_where_there_is_room(span: Span) -> None:
    table = table_for(span)
    session = table.open(request(max_length=10))
    table.grow(session, step(states(1, 10), 0))
    assert table.free_tokens == 9 * PAGE
    table.grow(session, step(states(1, 7), 10))
    assert (session.reserved_positions, table.free_tokens) == (17, 8 * PAGE)
    table.grow(session, step(states(4, 1), 17, reorder=[0] * 4))
    assert (session.batch, session.reserved_positions, table.free_tokens) == (4, 18, 2 * PAGE)


def test_a_session_that_cannot_grow_is_refused_and_keeps_what_it_has(span: Span) -> None:
    table = table_for(span)
    session, other = table.open(request(max_length=64)), table.open(request(max_length=80))
    with pytest.raises(CacheFull, match=r"1 × 81 positions .* the 80 that are free on this server \(of 160\)"):
        table.grow(session, step(states(1, 17), 64))
    with pytest.raises(CacheFull, match="2 × 64 positions"):
        table.grow(session, step(states(2, 1), 1, reorder=[0, 0]))
    assert (session.batch, session.reserved_positions, table.free_tokens) == (1, 64, 16)
    table.close(other)
    table.grow(session, step(states(1, 17), 64))
    assert table.free_tokens == 4 * PAGE


def test_a_session_with_fewer_sequences_than_before_gives_room_back(span: Span) -> None:
    table = table_for(span)
    session = table.open(request(batch=4, max_length=32))
    session.run(step(states(4, 3), 0))
    wish = step(states(1, 1), 3, reorder=[2])
    table.grow(session, wish)
    session.run(wish)
    assert table.free_tokens == 8 * PAGE


def test_a_step_at_the_far_end_of_what_the_protocol_allows_is_refused(span: Span) -> None:
    table = table_for(span)
    session = table.open(request())
    with pytest.raises(CacheFull):
        table.grow(session, step(states(1, 1), 1 << 24))


class AnyTraffic(RuleBasedStateMachine):
    """Sessions come, grow and go in any order."""

    span: Span

    @initialize(pages=st.integers(1, 8), max_sessions=st.integers(1, 4))
    def begin(self, pages: int, max_sessions: int) -> None:
        self.pages, self.max_sessions = pages, max_sessions
        self.table = table_for(self.span, pages, max_sessions)
        self.sessions: list[HeldSession] = []

    @rule(batch=st.integers(1, 3), length=st.integers(1, 30), start=st.integers(1, 3), count=st.integers(1, 3))
    def open(self, batch: int, length: int, start: int, count: int) -> None:
        with contextlib.suppress(CacheFull):
            self.sessions.append(self.table.open(request(batch, length, start, min(start + count, END))))

    @rule(which=st.integers(0, 9), batch=st.integers(1, 4), position=st.integers(0, 40))
    def grow(self, which: int, batch: int, position: int) -> None:
        if self.sessions:
            session = self.sessions[which % len(self.sessions)]
            before = session.batch, session.reserved_positions
            try:
                self.table.grow(session, step(states(batch, 1), position, reorder=[0] * batch))
            except CacheFull:
                assert (session.batch, session.reserved_positions) == before

    @rule(which=st.integers(0, 9))
    def close(self, which: int) -> None:
        if self.sessions:
            self.table.close(self.sessions.pop(which % len(self.sessions)))

    @invariant()
    def never_more_is_promised_than_there_is(self) -> None:
        promised = sum(one.batch * pages_for(one.reserved_positions) for one in self.sessions)
        assert promised <= self.pages
        assert self.table.free_tokens == (self.pages - promised) * PAGE
        assert len(self.table) == len(self.sessions) <= self.max_sessions


def test_never_more_is_promised_than_there_is(span: Span) -> None:
    AnyTraffic.span = span
    AnyTraffic.TestCase.settings = settings(deadline=None, max_examples=40, stateful_step_count=20)
    AnyTraffic.TestCase("runTest").runTest()


# What a session's cache survives


def fresh(span: Span, states: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """What a new session computes for all positions at once."""
    rows, count, _ = states.shape
    pool = PagePool.for_span(span, HIDDEN, rows * pages_for(count))
    session = HeldSession(span, pool.new_cache(span.start, span.end, count), rows, 0)
    return session.run(step(states, 0, mask=mask, position_ids=positions(mask)))


def positions(mask: torch.Tensor | None) -> torch.Tensor | None:
    return None if mask is None else (mask.long().cumsum(1) - 1).clamp(min=0)


def held(span: Span, batch: int) -> HeldSession:
    return table_for(span).open(request(batch=batch))


def test_a_session_in_pieces_computes_what_it_would_at_once(span: Span) -> None:
    session, whole = held(span, 2), states(2, 7)
    parts = [session.run(step(whole[:, a:b], a)) for a, b in [(0, 3), (3, 4), (4, 7)]]
    torch.testing.assert_close(torch.cat(parts, dim=1), fresh(span, whole), atol=1e-4, rtol=1e-4)


def test_a_session_that_was_rolled_back_computes_what_a_fresh_one_would(span: Span) -> None:
    session, kept, other = held(span, 2), states(2, 3), states(2, 4, seed=1)
    session.run(step(kept, 0))
    session.run(step(states(2, 5, seed=2), 3))
    output = session.run(step(other, 3))
    torch.testing.assert_close(output, fresh(span, torch.cat([kept, other], 1))[:, 3:], atol=1e-4, rtol=1e-4)
    assert session.cache.length == 7


def test_a_session_that_was_reordered_computes_what_a_fresh_one_would(span: Span) -> None:
    session, kept, new = held(span, 2), states(2, 3), states(3, 2, seed=1)
    session.run(step(kept, 0))
    output = session.run(step(new, 3, reorder=[1, 1, 0]))
    expected = fresh(span, torch.cat([kept[[1, 1, 0]], new], 1))[:, 3:]
    torch.testing.assert_close(output, expected, atol=1e-4, rtol=1e-4)


def test_padding_rolling_back_and_reordering_together_compute_what_a_fresh_session_would(span: Span) -> None:
    session, kept, new = held(span, 3), states(3, 4), states(2, 2, seed=1)
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]], dtype=torch.uint8)
    session.run(step(kept, 0, mask=mask, position_ids=positions(mask)))
    junk = torch.ones(3, 2, dtype=torch.uint8)
    session.run(step(states(3, 2, seed=2), 4, mask=junk, position_ids=torch.full((3, 2), 9)))
    rows, position = [2, 0], 3
    whole_mask = torch.cat([mask[rows, :position], torch.ones(2, 2, dtype=torch.uint8)], 1)
    ids = positions(whole_mask)
    assert ids is not None
    output = session.run(step(new, position, reorder=rows, position_ids=ids[:, position:]))
    expected = fresh(span, torch.cat([kept[rows, :position], new], 1), whole_mask)[:, position:]
    torch.testing.assert_close(output, expected, atol=1e-4, rtol=1e-4)


def test_padding_that_begins_late_counts_what_came_before_as_real(span: Span) -> None:
    session, whole = held(span, 2), states(2, 5)
    late = torch.tensor([[1, 0], [1, 1]], dtype=torch.uint8)
    mask = torch.cat([torch.ones(2, 3, dtype=torch.uint8), late], 1)
    ids = positions(mask)
    assert ids is not None
    session.run(step(whole[:, :3], 0))
    output = session.run(step(whole[:, 3:], 3, mask=late, position_ids=ids[:, 3:]))
    expected = fresh(span, whole, mask)[:, 3:]
    torch.testing.assert_close(output[late.bool()], expected[late.bool()], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("padded", [False, True])
def test_a_session_begins_anew_with_another_number_of_sequences(span: Span, batch: int, padded: bool) -> None:
    session, anew = held(span, 2), states(batch, 3, seed=1)
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]], dtype=torch.uint8) if padded else None
    session.run(step(states(2, 3), 0, mask=mask))
    output = session.run(step(anew, 0, reorder=[0] * batch))
    torch.testing.assert_close(output, fresh(span, anew), atol=1e-4, rtol=1e-4)


def test_a_sliding_window_forgets_nothing_that_a_session_may_come_back_to(sliding_span: Span) -> None:
    session, whole, other = held(sliding_span, 2), states(2, 12), states(2, 4, seed=1)
    session.run(step(whole, 0))
    output = session.run(step(other, 9, reorder=[1, 0]))
    expected = fresh(sliding_span, torch.cat([whole[[1, 0], :9], other], 1))[:, 9:]
    torch.testing.assert_close(output, expected, atol=1e-4, rtol=1e-4)


def test_a_session_with_a_sliding_window_can_always_begin_anew(sliding_span: Span) -> None:
    session, anew = held(sliding_span, 2), states(2, 4, seed=1)
    session.run(step(states(2, 12), 0))
    output = session.run(step(anew, 0))
    torch.testing.assert_close(output, fresh(sliding_span, anew), atol=1e-4, rtol=1e-4)


def test_a_server_that_reuses_no_prompts_computes_each_anew(span: Span) -> None:
    pool = PagePool.for_span(span, HIDDEN, pages=8)
    table = SessionTable(span, MODEL, pool, 8, reuses=False)
    prompt = states(1, 2 * PAGE)
    outputs = [table.open(request(max_length=2 * PAGE)).run(step(prompt, 0)) for _ in range(2)]
    assert torch.equal(*outputs) and pool.pages.remembered == 0 and pool.pages.used == 4
