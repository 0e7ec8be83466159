"""The thread that owns the device waits a little for those who ran together before, and for nobody else."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Sequence
from types import SimpleNamespace

import pytest

from swarm.errors import SwarmError
from swarm.models.combining import Company
from swarm.server.compute import ComputeThread
from swarm.server.membership import fail_with_compute
from swarm.server.schedule import MAX_SHORT, MAX_TOGETHER, Waiting, may_grow

TOKEN = Waiting(group="all")


@pytest.fixture
async def thread() -> AsyncIterator[ComputeThread]:
    thread = ComputeThread(1)
    yield thread
    thread.stop()
    assert await thread.ended(5.0)


def step(works: Sequence[object]) -> list[int]:
    """Takes as long for all as for one; the result is how many ran together."""
    time.sleep(0.05)
    return [len(works)] * len(works)


async def token(thread: ComputeThread) -> int:
    """With how many a step ran."""
    together, _ = await thread.run_with_others(None, step, TOKEN)
    return together


async def four_together(thread: ComputeThread) -> None:
    """They come while something else runs."""
    go_on = threading.Event()
    other = asyncio.create_task(thread.run(go_on.wait))
    four = [asyncio.create_task(token(thread)) for _ in range(4)]
    await asyncio.sleep(0.05)  # all have been handed over
    go_on.set()
    await other
    assert await asyncio.gather(*four) == [4, 4, 4, 4]


async def test_those_who_ran_together_are_waited_for(thread: ComputeThread) -> None:
    thread._company.patience = 200.0  # ten seconds for each
    await four_together(thread)
    tokens = []
    for _ in range(4):
        tokens.append(asyncio.create_task(token(thread)))
        await asyncio.sleep(0.1)
    assert await asyncio.gather(*tokens) == [4, 4, 4, 4]


async def test_who_comes_alone_is_kept_waiting_for_a_moment_only(thread: ComputeThread) -> None:
    thread._company.patience = 2.0
    await four_together(thread)
    assert [await token(thread) for _ in range(4)] == [1, 1, 1, 1]


async def test_a_prompt_that_could_run_meanwhile_waits_for_company_a_quarter_as_long(thread: ComputeThread) -> None:
    thread._company.patience_s = 8.0
    waiting = [SimpleNamespace(waiting=TOKEN)]
    thread._jobs = waiting  # type: ignore[assignment]
    assert thread._patience_s() == 8.0
    waiting.append(SimpleNamespace(waiting=Waiting(positions=MAX_SHORT + 1, group="all")))
    assert thread._patience_s() == 2.0
    thread._jobs = []


async def test_who_is_expected_is_waited_for_though_it_takes_a_while_and_not_after_it_has_left(
    thread: ComputeThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("swarm.server.compute._PATIENCE_WITH_EXPECTED_S", 5.0)
    for whom in ("first", "second", "third"):
        thread.expect(whom)
    await asyncio.sleep(0.3)
    begun = [thread.begin(None, step, TOKEN, "first")]
    await asyncio.sleep(0.05)
    thread.expect_no_longer("third")
    begun.append(thread.begin(None, step, TOKEN, "second"))
    async with asyncio.timeout(3):
        assert [(await one)[0] for one in begun] == [2, 2]


class Unequal:
    """What groups are asked, it cannot answer."""

    def __eq__(self, other: object) -> bool:
        raise ZeroDivisionError("whether they are the same")

    __hash__ = None  # type: ignore[assignment]


async def test_a_thread_that_fails_leaves_nobody_waiting_and_ends_the_server() -> None:
    thread = ComputeThread(1)
    ending = asyncio.create_task(fail_with_compute(thread))
    go_on = threading.Event()
    other = asyncio.create_task(thread.run(go_on.wait))
    await asyncio.sleep(0.05)
    waiting = [asyncio.create_task(thread.run_with_others(None, step, Waiting(group=Unequal()))) for _ in range(2)]
    await asyncio.sleep(0.05)
    go_on.set()
    await other
    for task in waiting:
        with pytest.raises(RuntimeError, match="ZeroDivisionError: whether they are the same"):
            await asyncio.wait_for(task, 5)
    with pytest.raises(SwarmError, match=r"computes has failed \(ZeroDivisionError.*start the server again"):
        await asyncio.wait_for(ending, 5)
    with pytest.raises(RuntimeError, match="whether they are the same"):
        await thread.run(time.monotonic)  # nor does anybody who comes later wait
    assert await thread.failed() == "ZeroDivisionError: whether they are the same"
    assert await thread.ended(5.0)


def test_one_less_is_waited_for_each_time_that_fewer_come() -> None:
    company = Company(patience=0.25)
    company.met(4, took_s=2.0)
    assert (company.count, company.patience_s) == (4, 0.5)
    for left in (3, 2, 1, 1):
        company.met(1, took_s=1.0)
        assert (company.count, company.patience_s) == (left, 0.25)


def test_only_a_batch_with_room_for_more_waits() -> None:
    assert may_grow([TOKEN, TOKEN], 3) and not may_grow([TOKEN, TOKEN], 2)
    assert not may_grow([Waiting(positions=MAX_TOGETHER, group="all")], 3)
    assert not may_grow([TOKEN, Waiting()], 3)
    assert not may_grow([Waiting(group="all", can_wait=True)], 3)
