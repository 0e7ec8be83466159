"""Steps of several sessions in one batch: short ones of any length, those that are known already, failures."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import save_tiny_model

from swarm.models import Span, load_span, open_checkpoint
from swarm.models.fast_blocks import FastBlocks, fuse_projections
from swarm.models.paged_cache import PagePool
from swarm.models.together import Together, way_together
from swarm.page_names import PAGE
from swarm.protocol.messages import Open, Step
from swarm.protocol.served_actions import Spent, Work
from swarm.server.compute import ComputeThread
from swarm.server.schedule import MAX_TOGETHER, Waiting, choose
from swarm.server.sessions import HeldSession, SessionTable, run_steps
from swarm.server.step_runner import PART, StepRunner

MODEL, HIDDEN = "ab" * 32, 64


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Span, Together]:
    directory: Path = tmp_path_factory.mktemp("llama")
    save_tiny_model("llama", directory)
    span = load_span(open_checkpoint(directory), 1, 4, dtype=torch.float32)
    fuse_projections(span)
    way = way_together(span, HIDDEN, FastBlocks.of(span))
    assert isinstance(way, FastBlocks)
    return span, way


class Counting:
    """A way to run together that notes how many positions it computes."""

    runs_one_faster = True

    def __init__(self, way: Together) -> None:
        self._way, self.most_positions = way, way.most_positions
        self.computed: list[list[int]] = []

    def forward(self, span: Span, steps: list[tuple[torch.Tensor, object, object]]) -> list[torch.Tensor]:
        self.computed.append([states.shape[1] for states, _, _ in steps])
        return self._way.forward(span, steps)  # type: ignore[arg-type]


@pytest.fixture
def table(loaded: tuple[Span, Together]) -> Iterator[tuple[SessionTable, Counting]]:
    span, way = loaded
    counting = Counting(way)
    yield SessionTable(span, MODEL, PagePool.for_span(span, HIDDEN, 64), 16, together=counting), counting


def opened(table: SessionTable, batch: int = 1) -> HeldSession:
    return table.open(Open(session="0" * 32, model=MODEL, start=1, end=4, batch=batch, max_length=4 * PAGE))


def work(states: torch.Tensor, position: int = 0, reorder: list[int] | None = None) -> Work:
    source = Step(sequence=1, position=position, tensors=[])
    return Work(position, reorder, states, None, None, source)


def states(rows: int, count: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, count, HIDDEN, generator=torch.Generator().manual_seed(seed))


def alone(span: Span, *pieces: torch.Tensor) -> torch.Tensor:
    cache = span.new_cache()
    return [span.forward(piece, cache) for piece in pieces][-1]


def test_short_prompts_and_tokens_are_one_batch(
    loaded: tuple[Span, Together], table: tuple[SessionTable, Counting]
) -> None:
    span, (sessions, counting) = loaded[0], table
    told, beams, new = opened(sessions), opened(sessions, 3), opened(sessions)
    run_steps([(told, work(states(1, 7, 1)))])
    run_steps([(beams, work(states(3, 2, 2)))])
    counting.computed.clear()
    steps = [
        (told, work(states(1, 1, 3), 7)),
        (beams, work(states(3, 4, 4), 2, reorder=[2, 2, 0])),
        (new, work(states(1, 9, 5))),
    ]
    assert len({held.group(one) for held, one in steps}) == 1 and steps[0][0].group(steps[0][1]) is not None
    found = run_steps(steps)
    assert counting.computed == [[1, 4, 9]]
    expected = [
        alone(span, states(1, 7, 1), states(1, 1, 3)),
        alone(span, states(3, 2, 2)[[2, 2, 0]], states(3, 4, 4)),
        alone(span, states(1, 9, 5)),
    ]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_of_a_batch_only_what_is_new_is_computed(
    loaded: tuple[Span, Together], table: tuple[SessionTable, Counting]
) -> None:
    span, (sessions, counting) = loaded[0], table
    system = states(1, PAGE, 1)
    first = run_steps([(opened(sessions), work(system))])[0]
    counting.computed.clear()
    questions = [states(1, count, 10 + count) for count in (3, 5)]
    steps = [
        (opened(sessions), work(torch.cat([system, questions[0]], dim=1))),
        (opened(sessions), work(system)),
        (opened(sessions), work(torch.cat([system, questions[1]], dim=1))),
    ]
    found = run_steps(steps)
    assert counting.computed == [[3, 5]]
    assert torch.equal(found[1], first)
    for one, question in zip((found[0], found[2]), questions, strict=True):
        assert torch.equal(one[:, :PAGE], first)
        torch.testing.assert_close(one[:, PAGE:], alone(span, system, question), atol=1e-4, rtol=1e-4)
    assert torch.equal(run_steps([(opened(sessions), work(system))])[0], first)
    assert counting.computed == [[3, 5]], "all was known"


def test_a_batch_that_fails_leaves_others_what_they_had(
    loaded: tuple[Span, Together], table: tuple[SessionTable, Counting]
) -> None:
    span, (sessions, _) = loaded[0], table
    other = opened(sessions)
    run_steps([(other, work(states(1, 4, 1)))])
    with pytest.raises(RuntimeError):
        run_steps([(opened(sessions), work(states(1, 2, 2)[..., :-1]))])
    token = states(1, 1, 3)
    found = run_steps([(other, work(token, 4))])[0]
    torch.testing.assert_close(found, alone(span, states(1, 4, 1), token), atol=1e-4, rtol=1e-4)


def test_long_prompts_run_alone(table: tuple[SessionTable, Counting]) -> None:
    sessions, counting = table
    held = opened(sessions)
    short, long = work(states(1, counting.most_positions, 1)), work(states(1, counting.most_positions + 1, 1))
    assert held.group(short) == (1, 4) and held.group(long) is None


def test_a_batch_holds_no_more_positions_than_it_may() -> None:
    half = MAX_TOGETHER // 2
    tokens, prompts = [Waiting(1, "all")] * 10, [Waiting(half - 2, "all")] * 3
    assert choose([*tokens, *prompts], prompts_first=False) == [*range(10), 10]
    assert choose([*prompts, *tokens], prompts_first=True) == [0, 1, *range(3, 7)]


def test_work_in_parts_gives_what_it_gives_at_once(
    loaded: tuple[Span, Together], table: tuple[SessionTable, Counting]
) -> None:
    span, (sessions, _) = loaded[0], table
    held, beginning, end = opened(sessions, 2), states(2, 3, 1), states(2, 9, 2)
    run_steps([(held, work(beginning))])
    whole = replace(work(end, 3, reorder=[1, 1]), position_ids=torch.arange(3, 12).expand(2, 9))
    parts = whole.split(4)
    assert [part.hidden_states.shape[1] for part in parts] == [4, 4, 1] and whole.split(9)[0] is whole
    found = torch.cat([run_steps([(held, part)])[0] for part in parts], dim=1)
    torch.testing.assert_close(found, alone(span, beginning[[1, 1]], end), atol=1e-4, rtol=1e-4)


def test_what_parts_took_is_what_the_whole_took() -> None:
    assert Spent(0.1, 0.2, 0.05, 3).and_then(Spent(0.3, 0.4, 0.1, 2)) == Spent(
        pytest.approx(0.4), pytest.approx(0.6), pytest.approx(0.15), 3
    )


def test_prompts_are_cut_while_others_bring_tokens_and_are_here(table: tuple[SessionTable, Counting]) -> None:
    sessions, counting = table
    counting.most_positions = 4 * PART
    prompt, token = work(states(1, 3 * PART, 1)), work(states(1, 1, 2))

    async def lengths() -> list[list[int]]:
        compute = ComputeThread(1)
        steps = StepRunner(compute)
        own, other = opened(sessions), opened(sessions)
        found = []
        try:
            for who in (None, own, other):
                if who is not None:
                    await steps.begin(sessions, who, token, can_wait=False)
                found.append([part.count for part in steps.parts(sessions, own, prompt)])
            sessions.close(other)
            found.append([part.count for part in steps.parts(sessions, own, prompt)])
        finally:
            compute.stop()
        return found

    whole, in_parts = [3 * PART], [PART] * 3
    assert asyncio.run(lengths()) == [whole, whole, in_parts, whole]
