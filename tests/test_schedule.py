"""What the device does next: tokens together and first, prompts in turn with them, nobody forgotten."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.server.schedule import MAX_TOGETHER, Waiting, choose

quick = settings(deadline=None, max_examples=300)
WORKS = st.builds(
    Waiting,
    positions=st.integers(1, 40),
    group=st.none() | st.sampled_from([(0, 2), (2, 4)]),
    can_wait=st.booleans(),
)
PROMPT, TOKEN = Waiting(), Waiting(group="all")


@given(st.lists(WORKS, min_size=1, max_size=30), st.booleans())
@quick
def test_what_is_chosen_can_run_as_one_batch(waiting: list[Waiting], prompts_first: bool) -> None:
    chosen = choose(waiting, prompts_first=prompts_first)
    assert chosen and len(chosen) == len(set(chosen))
    works = [waiting[index] for index in chosen]
    assert len({work.group for work in works}) == 1
    assert len(works) == 1 or works[0].group is not None
    assert len(works) == 1 or sum(work.positions for work in works) <= MAX_TOGETHER
    assert not any(work.can_wait for work in works) or all(work.can_wait for work in waiting)


@given(st.lists(WORKS, min_size=1, max_size=30), st.lists(WORKS, max_size=30))
@quick
def test_everybody_has_a_turn_however_many_come_after(waiting: list[Waiting], later: list[Waiting]) -> None:
    """Work that is urgent runs at most twice as many turns later as there was work before it."""
    mine = next((work for work in reversed(waiting) if not work.can_wait), None)
    if mine is None:
        return
    queue = [(work, work is mine) for work in waiting]
    arriving = iter(later)
    prompts_first, turns = False, 0
    while any(is_mine for _, is_mine in queue):
        chosen = choose([work for work, _ in queue], prompts_first=prompts_first)
        prompts_first = queue[chosen[0]][0].is_short
        queue = [one for index, one in enumerate(queue) if index not in chosen]
        queue += [(work, False) for work in [next(arriving, None)] if work is not None]
        turns += 1
    assert turns <= 2 * len(waiting)


def test_all_tokens_run_together() -> None:
    assert choose([TOKEN] * 5, prompts_first=True) == [0, 1, 2, 3, 4]


def test_tokens_go_first_and_then_take_turns_with_prompts() -> None:
    assert choose([PROMPT, TOKEN, PROMPT, TOKEN], prompts_first=False) == [1, 3]
    assert choose([PROMPT, TOKEN, PROMPT, TOKEN], prompts_first=True) == [0]
    assert choose([PROMPT, PROMPT], prompts_first=False) == [0]


def test_what_can_wait_waits_and_runs_together_when_nothing_else_is_there() -> None:
    idle = Waiting(group="all", can_wait=True)
    assert choose([idle, PROMPT, idle], prompts_first=True) == [1]
    assert choose([idle, idle], prompts_first=True) == [0, 1]


def test_a_batch_that_is_too_large_alone_still_runs() -> None:
    beams = Waiting(positions=MAX_TOGETHER + 1, group="all")
    assert choose([beams], prompts_first=False) == choose([beams, TOKEN], prompts_first=True) == [0]
    assert choose([TOKEN, beams, TOKEN], prompts_first=False) == [0, 2]


def test_prompts_that_could_run_together_with_tokens_take_turns_with_them() -> None:
    piece = Waiting(positions=MAX_TOGETHER, group="all")
    assert choose([piece, piece, TOKEN, TOKEN], prompts_first=False) == [2, 3]
    assert choose([piece, piece, TOKEN, TOKEN], prompts_first=True) == [0]
    end = Waiting(positions=MAX_TOGETHER - 2, group="all")
    assert choose([end, TOKEN, piece, TOKEN, TOKEN], prompts_first=True) == [0, 1, 3]
