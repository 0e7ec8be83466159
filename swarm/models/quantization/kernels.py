"""Of several kernels for the same product, find the one that is fastest on this machine, and remember it.

A kernel is used only where it works: one that raises, or whose product is not that of the dequantized weights, is left
out. All kernels of a scheme read the same levels, so servers that choose differently agree up to rounding.
"""

from __future__ import annotations

import functools
import logging
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch

from swarm.models.choices import Situation, choice

logger = logging.getLogger(__name__)

Levels = TypeVar("Levels")
"""How a scheme holds a weight before a kernel has arranged it."""

_ROUNDS = 3
_WORTHWHILE = 0.95
"""A kernel is preferred to an earlier one of the list when it takes at most this share of its time."""
_FORGIVEN = 2
"""A favourite may take so many times as long."""
_SAMPLE_BYTES = 48 * 1024**2
"""Decode steps are timed over this much, which few caches hold."""
_MOST_COPIES = 128
_HOPELESS = 4
"""A kernel that takes so many times as long as another for few rows of one weight is timed no further."""
_SAMPLE_WEIGHTS = 1 << 21


class Kernel(Protocol[Levels]):
    """A way to multiply with quantized weights."""

    @property
    def name(self) -> str:
        """How the choice is remembered: unique in its scheme."""

    def arrange(self, levels: Levels) -> tuple[torch.Tensor, ...]:
        """The weight in the order in which this kernel reads it."""

    def restore(self, *arranged: torch.Tensor) -> Levels:
        """What :meth:`arrange` was given."""

    def multiply(self, rows: torch.Tensor, *arranged: torch.Tensor) -> torch.Tensor:
        """``[rows, inputs]`` to ``[rows, outputs]``."""


@dataclass(frozen=True)
class Trial(Generic[Levels]):
    """What kernels are tried on: made-up weights of a real shape."""

    levels: Levels
    few: Sequence[torch.Tensor]
    """Rows ``[rows, inputs]``, as in decode steps, which read weights that no cache holds."""
    many: torch.Tensor
    """Likewise, as in prefill."""
    product: Callable[[torch.Tensor], torch.Tensor]
    """The true product for rows."""
    tolerance: float
    """What the product may differ, as a relative norm."""


def fastest(
    scheme: str,
    shape: Sequence[int],
    device: torch.device,
    kernels: Sequence[Kernel[Levels]],
    trial: Callable[[], Trial[Levels]],
    favourite: str | None = None,
) -> Kernel[Levels]:
    """The kernel that is fastest for a weight ``[outputs, inputs]``, as remembered, else as measured now (0.3 s).

    Args:
        kernels: the candidates; of equals the first is taken.
        trial: makes what they are tried on.
        favourite: the one of them that has other merits, and is taken unless it takes twice as long.

    Raises:
        RuntimeError: none of them works.
    """
    situation = Situation.here(scheme, shape, device, [kernel.name for kernel in kernels])
    name = choice(situation, lambda: _measure(situation, kernels, trial(), favourite))
    return next(kernel for kernel in kernels if kernel.name == name)


def decide(times: Mapping[str, Sequence[float]], favourite: str | None = None) -> str:
    """The name of the kernel with the least geometric mean; of those that are about equal, the first.

    Args:
        times: for every kernel, the seconds that the same calls took.
        favourite: as for :func:`fastest`.
    """

    def ratio(name: str, best: str) -> float:
        ratios = [time_s / best_s for time_s, best_s in zip(times[name], times[best], strict=True)]
        return math.prod(ratios) ** (1 / len(ratios))

    best, *others = times
    for name in others:
        if ratio(name, best) <= _WORTHWHILE:
            best = name
    return favourite if favourite in times and ratio(favourite, best) <= _FORGIVEN else best


def sampled_outputs(outputs: int, inputs: int) -> int:
    """How many outputs of a weight to try kernels on: of a very large one, a part will do."""
    return min(outputs, max(1, _SAMPLE_WEIGHTS // inputs // 64) * 64)


def works(kernel: Kernel[Levels], trial: Trial[Levels]) -> bool:
    """Whether `kernel` runs on this machine and computes the true product."""
    return _computes(kernel, trial, _true_products(trial))


def _computes(kernel: Kernel[Levels], trial: Trial[Levels], products: Sequence[torch.Tensor]) -> bool:
    """Likewise; `products` are the true ones, of all rows of the trial."""
    try:
        arranged = kernel.arrange(trial.levels)
        found = [kernel.multiply(rows, *arranged).double() for rows in (*trial.few, trial.many)]
    except Exception as error:  # whatever a backend raises that lacks something
        logger.debug("%s does not work here: %r", kernel.name, error)
        return False
    return all(
        one.shape == true.shape and bool((one - true).norm() <= trial.tolerance * true.norm())
        for one, true in zip(found, products, strict=True)
    )


def _true_products(trial: Trial[Levels]) -> list[torch.Tensor]:
    return [trial.product(rows) for rows in (*trial.few, trial.many)]


def _measure(
    situation: Situation, kernels: Sequence[Kernel[Levels]], trial: Trial[Levels], favourite: str | None
) -> str:
    products, hopeful = _true_products(trial), _hopeful(kernels, trial)
    working = [kernel for kernel in hopeful if _computes(kernel, trial, products)]
    if not working:
        working = [one for one in kernels if one not in hopeful and _computes(one, trial, products)]
    if not working:
        raise RuntimeError(f"no kernel for {situation.scheme} weights works on {situation.processor}")
    if len(working) == 1:
        return working[0].name
    calls = {kernel.name: _calls(kernel, trial) for kernel in working}
    times: dict[str, list[list[float]]] = {name: [] for name in calls}
    for _ in range(1 + _ROUNDS):
        for name, ways in calls.items():
            times[name].append([_time(call, trial.many.device) for call in ways])
    medians = {name: [statistics.median(of) for of in zip(*rounds[1:], strict=True)] for name, rounds in times.items()}
    name = decide(medians, favourite)
    logger.info("%s of %s, in ms: %s", name, situation, {one: [1e3 * s for s in of] for one, of in medians.items()})
    return name


def _hopeful(kernels: Sequence[Kernel[Levels]], trial: Trial[Levels]) -> list[Kernel[Levels]]:
    """Those worth the time that it takes to try them with many rows: some take a hundred times as long as others."""
    times: dict[str, float] = {}
    for kernel in kernels:
        try:
            arranged = kernel.arrange(trial.levels)
            ways = [functools.partial(_multiply_once, kernel, rows, arranged) for rows in trial.few]
            each = [min(_time(way, trial.many.device) for _ in range(2)) for way in ways]
        except Exception as error:  # as above
            logger.debug("%s does not work here: %r", kernel.name, error)
            continue
        times[kernel.name] = math.prod(each) ** (1 / len(each))
    limit = _HOPELESS * min(times.values(), default=0.0)
    return [kernel for kernel in kernels if times.get(kernel.name, math.inf) <= limit]


def _multiply_once(kernel: Kernel[Levels], rows: torch.Tensor, arranged: Sequence[torch.Tensor]) -> torch.Tensor:
    return kernel.multiply(rows, *arranged).cpu()


def _calls(kernel: Kernel[Levels], trial: Trial[Levels]) -> list[Callable[[], object]]:
    arranged = kernel.arrange(trial.levels)
    size_bytes = sum(tensor.numel() * tensor.element_size() for tensor in arranged)
    copies = [
        [tensor.clone() for tensor in arranged] for _ in range(min(-(-_SAMPLE_BYTES // size_bytes), _MOST_COPIES))
    ]

    def decode(rows: torch.Tensor) -> torch.Tensor:
        return torch.stack([kernel.multiply(rows, *copy)[0, 0] for copy in copies]).cpu()

    return [
        *(functools.partial(decode, rows) for rows in trial.few),
        functools.partial(_multiply_once, kernel, trial.many, arranged),
    ]


def _time(call: Callable[[], object], device: torch.device) -> float:
    # A thread's own time does not count what else runs on the machine; of several threads, all are waited for.
    clock = time.thread_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    begun = clock()
    call()
    return clock() - begun
