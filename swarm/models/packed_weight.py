"""A copy of a weight matrix in the order in which oneDNN multiplies few rows by it fastest.

Measured on one core of an EPYC (AVX-512), SmolLM2's head, fp32: 1 row takes 2.5 ms instead of 4.1, 16 rows 5.8 instead
of 16.5; and a row's result is the same, bit for bit, whatever else is in the batch. torch packs weights so for compiled
models only; the operators are not public, so they are tried out first.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

logger = logging.getLogger(__name__)

_ROWS = 16
"""To pack for: what is best for these is no worse for one."""
_LEAST_BYTES, _MOST_BYTES = 8 * 1024**2, 1024**3
"""Caches hold what is smaller; a copy of what is larger costs too much memory."""
_ROUNDS = 5
_WORTHWHILE = 0.9
_TOLERANCE = {torch.float32: 1e-4}
_HALF_TOLERANCE = 2e-2


@dataclass(frozen=True)
class PackedWeight:
    """Made by :func:`pack`."""

    _packed: torch.Tensor
    _bias: torch.Tensor | None
    _weight: torch.Tensor
    _version: int

    def is_of(self, weight: torch.Tensor) -> bool:
        """Whether `weight` is what was packed, and has not been changed since (by training, or by loading another)."""
        return weight is self._weight and weight._version == self._version

    def linear(self, rows: torch.Tensor) -> torch.Tensor:
        """``[n, inputs]`` to ``[n, outputs]``. Without gradients."""
        return _multiply(rows, self._packed, self._bias)


@torch.no_grad()
def pack(weight: torch.Tensor, bias: torch.Tensor | None) -> PackedWeight | None:
    """Pack ``[outputs, inputs]``; None if that is not possible here, not worth it, or would change results."""
    if weight.device.type != "cpu" or not _LEAST_BYTES <= weight.numel() * weight.element_size() <= _MOST_BYTES:
        return None
    rows = torch.randn(_ROWS, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight.dtype)
    try:
        packed = PackedWeight(
            torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _ROWS), bias, weight, weight._version
        )
        expected, found = functional.linear(rows, weight, bias).float(), packed.linear(rows).float()
    except (RuntimeError, NotImplementedError, AttributeError) as error:  # this torch, or this machine, cannot
        logger.debug("weights cannot be packed: %r", error)
        return None
    tolerance = _TOLERANCE.get(weight.dtype, _HALF_TOLERANCE)
    if not float((found - expected).norm()) <= tolerance * float(expected.norm()):
        logger.warning("packed weights change results on this machine: not used")
        return None
    one = rows[:1]
    plain_s, packed_s = _least_times(lambda: functional.linear(one, weight, bias), lambda: packed.linear(one))
    return packed if packed_s <= _WORTHWHILE * plain_s else None


def _multiply(rows: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, packed, bias, "none", [], "")
    return product


def _least_times(*runs: Callable[[], object]) -> list[float]:
    """Of each of `runs`, which take turns."""
    times_s: list[list[float]] = [[] for _ in runs]
    for _ in range(_ROUNDS):
        for run, mine in zip(runs, times_s, strict=True):
            begun = time.perf_counter()
            run()
            mine.append(time.perf_counter() - begun)
    return [min(mine) for mine in times_s]
