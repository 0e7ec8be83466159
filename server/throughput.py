"""Measure how fast this machine computes a span, phase by phase, in about a second."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from tqdm import tqdm

from swarm.models import Span
from swarm.models.paged_cache import PagePool
from swarm.models.pages import pages_for
from swarm.models.together import Together
from swarm.page_names import PAGE

BATCHES = (1, 4, 16)
"""Sessions whose decode steps run together."""
PREFILL_POSITIONS = 64
"""As many as clients send at once at least."""
BUDGET_S = 0.8
"""Shared by the phases; a span that takes longer is measured once in each."""
MAX_SAMPLES = 20
_SHOW_AFTER_S = 2.0
_UNDISTURBED = 0.9
"""So much of the time that passes must have been this thread's."""


@dataclass(frozen=True)
class ComputeSpeed:
    """What a machine does with one span; each figure is the best of a few."""

    prefill_tokens_per_s: float
    """Positions of one prompt."""
    decode_steps_per_s: Mapping[int, float]
    """By the number of sessions; the steps of all of them are counted."""
    is_undisturbed: bool = True
    """Nothing else took much of the processor meanwhile: the figures are worth remembering for long."""

    def of_part(self, share: float) -> ComputeSpeed:
        """Through a part of the span, of so many of its blocks."""
        decode = {count: rate / share for count, rate in self.decode_steps_per_s.items()}
        return replace(self, prefill_tokens_per_s=self.prefill_tokens_per_s / share, decode_steps_per_s=decode)

    def slowed(self, step_s: float) -> ComputeSpeed:
        """If every step took so much longer, whatever its size."""
        decode = {count: count / (count / rate + step_s) for count, rate in self.decode_steps_per_s.items() if rate > 0}
        prefill_s = PREFILL_POSITIONS / max(self.prefill_tokens_per_s, 1e-9) + step_s
        return replace(self, prefill_tokens_per_s=PREFILL_POSITIONS / prefill_s, decode_steps_per_s=decode)


def measure_compute(span: Span, hidden_size: int, together: Together | None) -> ComputeSpeed:
    """Run made-up sessions through `span`. Must be called on the thread that owns the device.

    Args:
        together: how sessions run as one batch; None: they run one by one, so that many make as many steps as one.
    """
    batches = BATCHES if together is not None else BATCHES[:1]
    budget_s = BUDGET_S / (len(batches) + 1)
    positions = min(PREFILL_POSITIONS, getattr(span.configs[0], "max_position_embeddings", PREFILL_POSITIONS))
    decode: dict[int, float] = {}

    def time_s(run: Callable[[], object]) -> float:
        return (usual_s if span.offloaded else best_s)(run, budget_s)

    begun, begun_computing = time.perf_counter(), time.thread_time()
    with tqdm(total=len(batches) + 1, desc="Measuring speed", delay=_SHOW_AFTER_S, leave=False) as bar:
        for count in batches:
            decode[count] = count / time_s(_decode(span, hidden_size, together, count))
            bar.update()
        prefill = positions / time_s(_prefill(span, hidden_size, together, positions))
        bar.update()
    computed_s, passed_s = time.thread_time() - begun_computing, time.perf_counter() - begun
    undisturbed = span.device.type != "cpu" or computed_s >= _UNDISTURBED * passed_s
    return ComputeSpeed(prefill, {count: decode.get(count, decode[1]) for count in BATCHES}, undisturbed)


def best_s(run: Callable[[], object], budget_s: float, clock: Callable[[], float] = time.perf_counter) -> float:
    """The shortest time that `run` takes, as often as fits into the budget: once at least, if it is slow."""
    return min(_times_s(run, budget_s, clock))


def usual_s(run: Callable[[], object], budget_s: float, clock: Callable[[], float] = time.perf_counter) -> float:
    """The mean without the first: where blocks are read from disk, each run leaves the next one waiting."""
    run()
    return statistics.mean(_times_s(run, budget_s, clock))


def _times_s(run: Callable[[], object], budget_s: float, clock: Callable[[], float]) -> list[float]:
    until, times = clock() + budget_s, list[float]()
    for _ in range(MAX_SAMPLES):
        begun = clock()
        if times and begun + min(times) > until:
            break
        run()
        times.append(clock() - begun)
    return times


def _decode(span: Span, hidden_size: int, together: Together | None, sessions: int) -> Callable[[], object]:
    pool = PagePool.for_span(span, hidden_size, pages=sessions)
    caches = [pool.new_cache(span.start, span.end, PAGE) for _ in range(sessions)]
    noise = _noise(span, sessions, 1, hidden_size)
    states = [noise[row : row + 1] for row in range(sessions)]

    def step() -> object:
        for cache in caches:
            cache.roll_back(1)  # stay on one page
        if together is None or (sessions == 1 and not together.runs_one_faster):
            caches[0].begin(1, 1)
            return span.forward(states[0], caches[0]).to("cpu")
        steps = [(one, cache, None) for one, cache in zip(states, caches, strict=True)]
        return torch.cat(together.forward(span, steps)).to("cpu")

    return step


def _prefill(span: Span, hidden_size: int, together: Together | None, positions: int) -> Callable[[], object]:
    states = _noise(span, 1, positions, hidden_size)
    if together is None or not together.runs_one_faster or positions > together.most_positions:
        return lambda: span.forward(states, span.new_cache()).to("cpu")
    cache = PagePool.for_span(span, hidden_size, pages=pages_for(positions)).new_cache(span.start, span.end, positions)

    def prompt() -> object:
        cache.roll_back(0)
        return together.forward(span, [(states, cache, None)])[0].to("cpu")

    return prompt


def _noise(span: Span, sessions: int, positions: int, hidden_size: int) -> torch.Tensor:
    """Hidden states that differ, so that sessions choose different experts as real ones do."""
    noise = torch.randn(sessions, positions, hidden_size, generator=torch.Generator().manual_seed(0))
    return noise.to(span.device, span.dtype)
