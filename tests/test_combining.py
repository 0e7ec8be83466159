"""Calls of several threads run as one, and each gets what it would get alone, also when others fail or are gone."""

from __future__ import annotations

import ctypes
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from swarm.models import combining
from swarm.models.batched_head import BatchedHead
from swarm.models.combining import Combiner
from swarm.models.packed_linear import LinearWithCopy, PackedLinear, can_pack

WITHIN_S = 10.0


class Gate:
    """A function to combine: doubles numbers, and stays in its first call until it is told to go on."""

    def __init__(self) -> None:
        self.entered, self.open = threading.Event(), threading.Event()
        self.calls: list[list[int]] = []

    def __call__(self, works: Sequence[int]) -> list[int]:
        self.calls.append(list(works))
        if len(self.calls) == 1:
            self.entered.set()
            assert self.open.wait(WITHIN_S)
        if 13 in works:
            raise ValueError("thirteen")
        return [2 * work for work in works]


def callers(combined: Combiner[int, int], works: Sequence[int]) -> tuple[list[threading.Thread], dict[int, object]]:
    """Threads that ask for one result each, and what they get."""
    results: dict[int, object] = {}

    def ask(work: int) -> None:
        try:
            results[work] = combined(work)
        except ValueError as error:
            results[work] = str(error)

    return [threading.Thread(target=ask, args=(work,)) for work in works], results


@contextmanager
def one_is_running(combined: Combiner[int, int], gate: Gate) -> Iterator[None]:
    """Somebody's call is at work as long as this context lasts."""
    (first,), _ = callers(combined, [1])
    first.start()
    assert gate.entered.wait(WITHIN_S)
    try:
        yield
    finally:
        gate.open.set()
        first.join(WITHIN_S)
        assert not first.is_alive()


def wait_until(condition: Callable[[], bool]) -> None:
    pause = threading.Event()
    for _ in range(int(WITHIN_S / 0.005)):
        if condition():
            return
        pause.wait(0.005)
    raise AssertionError("it did not happen")


def start(combined: Combiner[int, int], threads: list[threading.Thread]) -> None:
    """Start them in order, each once the one before waits."""
    for count, thread in enumerate(threads, len(combined._waiting) + 1):
        thread.start()
        wait_until(lambda count=count: len(combined._waiting) == count)


def test_those_who_come_while_one_is_at_work_are_run_as_one() -> None:
    gate = Gate()
    combined = Combiner(gate, most=3)
    threads, results = callers(combined, [2, 3, 4, 5])
    with one_is_running(combined, gate):
        start(combined, threads)
    for thread in threads:
        thread.join(WITHIN_S)
    assert results == {2: 4, 3: 6, 4: 8, 5: 10}
    assert gate.calls == [[1], [2, 3, 4], [5]]
    assert combined(7) == 14 and gate.calls[-1] == [7]


def test_those_who_are_expected_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(combining, "_MOST_PATIENCE_S", WITHIN_S)
    batches: list[list[int]] = []

    def run(works: Sequence[int]) -> list[int]:
        batches.append(list(works))
        return list(works)

    combined = Combiner(run, most=16)
    may_come = threading.Event()

    def come() -> None:
        may_come.wait(WITHIN_S)
        combined(2)

    late = threading.Thread(target=come)
    late.start()
    combined.expect(late.ident or 0)
    (first,), _ = callers(combined, [1])
    start(combined, [first])
    assert not batches
    may_come.set()
    for thread in (first, late):
        thread.join(WITHIN_S)
    assert batches == [[1, 2]]


def test_one_who_is_expected_and_does_not_come_holds_nobody_up() -> None:
    combined: Combiner[int, int] = Combiner(list, most=16)
    combined.expect(-1)
    begun = time.monotonic()
    assert combined(1) == 1
    assert time.monotonic() - begun < 1
    assert not combined._expected  # and nobody waits for it again
    combined.expect(-1)
    combined.do_not_expect(-1)
    assert combined(2) == 2


def test_an_error_is_told_to_the_one_whose_work_it_was() -> None:
    gate = Gate()
    combined = Combiner(gate, most=16)
    threads, results = callers(combined, [2, 13, 4])
    with one_is_running(combined, gate):
        start(combined, threads)
    for thread in threads:
        thread.join(WITHIN_S)
    assert results == {2: 4, 13: "thirteen", 4: 8}
    assert combined(7) == 14


class Interruption(BaseException):
    """As KeyboardInterrupt."""


def interrupt(*_: object) -> None:
    raise Interruption


def test_a_thread_that_ends_when_its_turn_has_come_passes_it_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    gate = Gate()
    combined = Combiner(gate, most=16)
    threads, results = callers(combined, [2, 3, 4])
    with one_is_running(combined, gate):
        start(combined, threads)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(
            ctypes.c_ulong(threads[0].ident or 0), ctypes.py_object(Interruption)
        )
    for thread in threads:
        thread.join(WITHIN_S)
    assert results == {3: 6, 4: 8} and gate.calls[1:] == [[3, 4]]
    assert combined(7) == 14


def test_a_thread_that_is_interrupted_while_it_waits_is_not_waited_for() -> None:
    gate = Gate()
    combined = Combiner(gate, most=16)
    threads, results = callers(combined, [2, 3])
    usual = signal.signal(signal.SIGALRM, interrupt)
    try:
        with one_is_running(combined, gate):
            start(combined, threads)
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            with pytest.raises(Interruption):
                combined(5)
    finally:
        signal.signal(signal.SIGALRM, usual)
    for thread in threads:
        thread.join(WITHIN_S)
    assert results == {2: 4, 3: 6} and gate.calls == [[1], [2, 3]]


def head_of(inputs: int, outputs: int, *, bias: bool = False, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs, bias=bias, dtype=dtype)


@pytest.mark.parametrize("bias", [False, True])
def test_a_batched_head_gives_many_threads_what_each_would_get_alone(bias: bool) -> None:
    plain = head_of(64, 5000, bias=bias)
    batched = BatchedHead(plain)
    shapes = [(1, 1, 64), (2, 1, 64), (64,), (1, 3, 64), (1, 9, 64)] * 4
    inputs = [torch.randn(shape) for shape in shapes]
    found: dict[int, torch.Tensor] = {}

    @torch.no_grad()
    def ask(index: int) -> None:
        for _ in range(20):
            found[index] = batched(inputs[index])

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, one in enumerate(inputs):
        expected = plain(one)
        assert found[index].shape == expected.shape
        torch.testing.assert_close(found[index], expected, atol=1e-5, rtol=1e-5)


def test_a_batched_head_has_the_weights_of_the_layer_under_their_names_and_trains_like_it() -> None:
    plain = head_of(8, 16, bias=True)
    batched = BatchedHead(plain)
    assert batched.weight is plain.weight and batched.bias is plain.bias
    assert batched.state_dict().keys() == plain.state_dict().keys()
    inputs = torch.randn(1, 1, 8, requires_grad=True)
    output = batched(inputs)
    output.sum().backward()
    torch.testing.assert_close(inputs.grad, plain.weight.sum(0).view(1, 1, 8))
    assert batched.weight.grad is not None


def test_inputs_that_the_layer_refuses_are_refused_likewise() -> None:
    batched = BatchedHead(head_of(8, 16))
    with torch.no_grad():
        for wrong in (torch.ones(1, 1, 7), torch.ones(1, 1, 8, dtype=torch.float64)):
            with pytest.raises(RuntimeError):
                batched(wrong)
        assert batched(torch.ones(0, 1, 8)).shape == (0, 1, 16)


def test_under_inference_mode_others_get_ordinary_tensors() -> None:
    batched = BatchedHead(head_of(8, 16))
    with torch.inference_mode():
        logits = batched(torch.ones(1, 1, 8))
    logits += 1  # an inference tensor would refuse that outside
    assert not logits.is_inference()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_packed_head_gives_a_row_the_same_whatever_is_in_the_batch(dtype: torch.dtype) -> None:
    if not can_pack(dtype):
        pytest.skip("this machine cannot")
    plain = head_of(576, 20_000, dtype=dtype)
    packed, rows = LinearWithCopy(plain, PackedLinear(plain)), torch.randn(16, 576).to(dtype)
    together = packed(rows)
    torch.testing.assert_close(together, plain(rows), atol=2e-2 if dtype == torch.bfloat16 else 1e-4, rtol=1e-2)
    for count in (1, 3, 16):
        assert torch.equal(packed(rows[:count]), together[:count])


@torch.no_grad()
def test_a_packed_head_whose_weights_were_changed_uses_the_new_ones() -> None:
    head, rows = head_of(576, 20_000), torch.randn(1, 1, 576)
    batched = BatchedHead(LinearWithCopy(head, PackedLinear(head)))
    before = batched(rows)
    batched.weight.mul_(2)
    torch.testing.assert_close(batched(rows), 2 * before, atol=1e-3, rtol=1e-3)
    batched.weight = torch.nn.Parameter(batched.weight * 2, requires_grad=False)
    torch.testing.assert_close(batched(rows), 4 * before, atol=1e-3, rtol=1e-3)


def test_those_who_ran_together_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(combining, "_PATIENCE", 1e6)
    gate = Gate()
    combined = Combiner(gate, 16)
    first, _ = callers(combined, [2, 3, 4])
    with one_is_running(combined, gate):
        start(combined, first)
    for thread in first:
        thread.join(WITHIN_S)
    later, _ = callers(combined, [5, 6, 7])
    for thread in later:
        thread.start()
        time.sleep(0.05)
    for thread in later:
        thread.join(WITHIN_S)
    assert gate.calls == [[1], [2, 3, 4], [5, 6, 7]]
