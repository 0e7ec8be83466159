"""The thread that owns the device waits a little for those who ran together before, and for nobody else."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence

import pytest

from swarm.server.compute import ComputeThread
from swarm.server.schedule import MAX_TOGETHER, Waiting, may_grow

STEP_S = 0.4
TOKEN = Waiting(group="all")


@pytest.fixture
async def thread() -> AsyncIterator[ComputeThread]:
    thread = ComputeThread(1)
    yield thread
    thread.stop()
    assert await thread.ended(5.0)


def step(works: Sequence[object]) -> list[int]:
    """Takes as long for all as for one; the result is how many ran together."""
    time.sleep(STEP_S)
    return [len(works)] * len(works)


async def after(thread: ComputeThread, seconds: float, waiting: Waiting = TOKEN) -> int:
    """A step that comes later; with how many it ran."""
    await asyncio.sleep(seconds)
    together, _ = await thread.run_with_others(None, step, waiting)
    return together


async def test_those_who_ran_together_are_waited_for(thread: ComputeThread) -> None:
    first = await asyncio.gather(*(after(thread, 0) for _ in range(4)))
    assert max(first) >= 3
    assert await asyncio.gather(*(after(thread, 0.1 * number * STEP_S) for number in range(3))) == [3, 3, 3]


async def test_who_comes_alone_is_kept_waiting_for_a_moment_and_soon_not_at_all(thread: ComputeThread) -> None:
    await asyncio.gather(*(after(thread, 0) for _ in range(4)))
    took_s = []
    for _ in range(4):
        begun = time.monotonic()
        assert await after(thread, 0) == 1
        took_s.append(time.monotonic() - begun)
    assert max(took_s) < 1.5 * STEP_S and min(took_s[:2]) > 1.2 * STEP_S
    assert took_s[-1] < 1.15 * STEP_S


def test_only_a_batch_with_room_for_more_waits() -> None:
    assert may_grow([TOKEN, TOKEN], 3) and not may_grow([TOKEN, TOKEN], 2)
    assert not may_grow([Waiting(positions=MAX_TOGETHER, group="all")], 3)
    assert not may_grow([TOKEN, Waiting()], 3)
    assert not may_grow([Waiting(group="all", can_wait=True)], 3)
