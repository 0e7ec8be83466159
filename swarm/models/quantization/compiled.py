"""What numba compiles for this processor: a linear layer with 8-bit weights as one function.

For a row or two that is faster than any of torch's kernels, which are a dozen operations a layer; on processors for
which torch has no fast kernel for integers, also for many. LLVM makes multiplications of pairs of 16-bit numbers of the
inner loop (``vpmaddwd`` on x86-64 since 2013). Sums are integers, so they are those of every other exact kernel.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from typing import Any

import numpy
import torch

MOST_INPUTS = 1 << 16
"""Sums of so many products of bytes fit into 32 bits."""


def multiply_split(
    rows: torch.Tensor, middle: int, most: int, least: float, weight: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """Split rows as :func:`split_into_bytes` does, multiply both bytes, less 128, and put the products together.

    Args:
        rows: float32 ``[rows, inputs]``.
        weight: int8 ``[outputs, inputs]``, of at most ``MOST_INPUTS``, contiguous.
        scale: float32 ``[outputs]``.

    Returns:
        float32 ``[rows, outputs]``

    Raises:
        ImportError: numba is not installed.
    """
    product = torch.empty(len(rows), len(weight))
    threads = torch.get_num_threads()
    compiled = _layer(threads > 1)
    if threads > 1:
        _use_threads(threads)
    compiled(
        rows.contiguous().numpy(), *_constants(middle, most, least), weight.numpy(), scale.numpy(), product.numpy()
    )  # fmt: skip
    return product


def split_into_bytes(rows: torch.Tensor, middle: int, most: int, least: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Levels of 16 bits, as bytes: level 0 is ``middle``, and the largest number of each row is ``most`` above it.

    Args:
        rows: float32 ``[rows, inputs]``.
        least: what counts as the largest of a row that has nothing larger.

    Returns:
        uint8 ``[2 · rows, inputs]``, all low bytes, then all high ones; float32 ``[rows, 1]``, what a level is worth.
    """
    levels = torch.empty(2 * len(rows), rows.shape[1], dtype=torch.uint8)
    worth = torch.empty(len(rows), 1)
    _splitting()(rows.contiguous().numpy(), *_constants(middle, most, least), levels.numpy(), worth.numpy())
    return levels, worth


def _constants(middle: int, most: int, least: float) -> tuple[numpy.float32, numpy.float32, numpy.float32]:
    return numpy.float32(middle + 0.5), numpy.float32(most), numpy.float32(least)


@functools.cache
def _layer(parallel: bool) -> Callable[..., None]:
    numba, split, multiply = _numba(), _splitting(), _multiplication(parallel)
    float32, uint8 = numpy.float32, numpy.uint8

    def layer(rows: Any, shift: Any, most: Any, least: Any, weight: Any, scale: Any, product: Any) -> None:
        count = rows.shape[0]
        levels = numpy.empty((2 * count, rows.shape[1]), uint8)
        worth = numpy.empty((count, 1), float32)
        split(rows, shift, most, least, levels, worth)
        halves = numpy.empty((2 * count, weight.shape[0]), float32)
        multiply(levels, weight, scale, halves)
        for row in range(count):
            for output in range(weight.shape[0]):
                whole = float32(halves[row, output] + float32(256) * halves[count + row, output])
                product[row, output] = whole * worth[row, 0]

    compiled: Callable[..., None] = numba.njit(nogil=True)(layer)
    return compiled


@functools.cache
def _multiplication(parallel: bool) -> Callable[..., None]:
    numba = _numba()
    every = numba.prange if parallel else range
    int16, int32, float32 = numpy.int16, numpy.int32, numpy.float32  # numba widens results unless told otherwise

    def multiply(rows: Any, weight: Any, scale: Any, product: Any) -> None:
        signed = numpy.empty(rows.shape, int16)
        for row in range(rows.shape[0]):
            for index in range(rows.shape[1]):
                signed[row, index] = int16(rows[row, index]) - int16(128)
        for output in every(weight.shape[0]):
            of_output = weight[output]
            for row in range(rows.shape[0]):
                of_row = signed[row]
                total = int32(0)
                for index in range(weight.shape[1]):
                    total = int32(total + int32(of_row[index]) * int32(of_output[index]))
                product[row, output] = float32(total) * scale[output]

    compiled: Callable[..., None] = numba.njit(nogil=True, parallel=parallel)(multiply)
    return compiled


@functools.cache
def _splitting() -> Callable[..., None]:
    numba = _numba()
    int32, float32, uint8 = numpy.int32, numpy.float32, numpy.uint8

    def split(rows: Any, shift: Any, most: Any, least: Any, levels: Any, worth: Any) -> None:
        count = rows.shape[0]
        for row in range(count):
            largest = least
            for index in range(rows.shape[1]):
                largest = max(largest, abs(rows[row, index]))
            factor = float32(float32(float32(1) / largest) * most)  # as torch rounds a number over a tensor
            for index in range(rows.shape[1]):
                level = int32(float32(float32(rows[row, index] * factor) + shift))
                levels[row, index] = uint8(level & 255)
                levels[count + row, index] = uint8(level >> 8)
            worth[row, 0] = largest / most

    compiled: Callable[..., None] = numba.njit(nogil=True)(split)
    return compiled


@functools.cache
def _numba() -> Any:
    """It imports SciPy if it is there, for what is not used here; servers have better use for 37 MB."""
    hides = "scipy" not in sys.modules
    if hides:
        sys.modules["scipy"] = None  # type: ignore[assignment]
    try:
        importlib.import_module("numba.np.arraymath")  # what else it would import with the first compilation
        return importlib.import_module("numba")
    finally:
        if hides:
            del sys.modules["scipy"]


def _use_threads(count: int) -> None:
    numba = _numba()
    numba.set_num_threads(min(count, numba.config.NUMBA_NUM_THREADS))
