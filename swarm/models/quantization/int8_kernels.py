"""Ways to multiply rows with 8-bit weights.

Some multiply integers, and take each row as two bytes: their sums are the same in whatever batch a row comes, and by
whichever of them. Others multiply in floating point, for machines that have no fast product of integers. What they
give differs by the rounding of rows to 16 bits.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch

from swarm.models.packed_linear import multiply_rounded
from swarm.models.quantization.groups import multiply_by_chunks
from swarm.models.quantization.int8_bags import Bags
from swarm.models.quantization.int8_levels import Int8Levels, RowBytes
from swarm.models.quantization.kernels import Kernel, Trial, fastest, sampled_outputs

_TOLERANCE = 1e-4
"""Of what rounding rows to 16 bits changes, 1.5e-5, several times; sums that saturate are off by more."""


def kernel_for(shape: Sequence[int], device: torch.device) -> Kernel[Int8Levels]:
    """The fastest for a weight ``[outputs, inputs]``. It multiplies and returns float32."""
    kernels = KERNELS if device.type == "cpu" else CUDA_KERNELS
    return fastest("int8", shape, device, kernels, lambda: trial(shape, device))


def trial(shape: Sequence[int], device: torch.device) -> Trial[Int8Levels]:
    """Weights and rows at random, and the largest sums there may be: kernels for old processors may saturate."""
    generator = torch.Generator().manual_seed(0)
    outputs, inputs = sampled_outputs(*shape), shape[1]

    def rows(count: int) -> torch.Tensor:
        return (2 * torch.rand(count, inputs, generator=generator) - 1).to(device)

    levels = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8, generator=generator)
    levels[0] = 127
    weight = Int8Levels(levels.to(device), torch.ones(outputs, device=device))
    few, many = [rows(1), rows(4), rows(16)], rows(128)
    few[1][0] = 1
    true = weight.levels.double().t()
    return Trial(weight, few, many, lambda rows: rows.double() @ true, _TOLERANCE)


@runtime_checkable
class OfBytes(Protocol):
    """A kernel that multiplies integers, less 128, and may be given rows that were quantized already."""

    def multiply_bytes(self, rows: RowBytes, *arranged: torch.Tensor) -> torch.Tensor:
        """What :meth:`Kernel.multiply` returns for the rows that `rows` stands for."""


class _Integers:
    """What all kernels of integers do with the products of low and of high bytes."""

    def multiply(self, rows: torch.Tensor, *arranged: torch.Tensor) -> torch.Tensor:
        return self.multiply_bytes(RowBytes.of(rows), *arranged)

    def multiply_bytes(self, rows: RowBytes, *arranged: torch.Tensor) -> torch.Tensor:
        low, high = self._products(rows.bytes_, *arranged).chunk(2)
        return torch.add(low, high, alpha=256).mul_(rows.scale)

    def _products(self, rows: torch.Tensor, *arranged: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class _Packed(_Integers):
    """oneDNN's own order, which differs from processor to processor. It takes levels from 0 to 255."""

    name = "packed"

    def arrange(self, levels: Int8Levels) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.ops.onednn.qlinear_prepack(levels.levels, None), levels.scale

    def restore(self, *arranged: torch.Tensor) -> Int8Levels:
        weight, scale = arranged
        return Int8Levels(weight.to_dense().t(), scale)

    def _products(self, rows: torch.Tensor, *arranged: torch.Tensor) -> torch.Tensor:
        weight, scale = arranged

        def product(some: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = torch.ops.onednn.qlinear_pointwise(
                some, 1.0, 128, weight, scale, _zeros(len(scale)), None,
                1.0, 0, torch.float32, "none", [], "",
            )  # fmt: skip
            return result

        return multiply_rounded(rows, product)


class _AsTheyAre:
    """A row of weights for every output."""

    def arrange(self, levels: Int8Levels) -> tuple[torch.Tensor, torch.Tensor]:
        return levels.levels.contiguous(), levels.scale

    def restore(self, *arranged: torch.Tensor) -> Int8Levels:
        weight, scale = arranged
        return Int8Levels(weight, scale)


class ByRows(_Integers, _AsTheyAre):
    """torch's product of integers."""

    name = "rows"

    def _products(self, rows: torch.Tensor, *arranged: torch.Tensor) -> torch.Tensor:
        weight, scale = arranged
        return torch._int_mm(_signed(rows), weight.t()) * scale


class _ByColumns(ByRows):
    """A column of weights for every output."""

    name = "columns"

    def arrange(self, levels: Int8Levels) -> tuple[torch.Tensor, torch.Tensor]:
        return levels.levels.t().contiguous(), levels.scale

    def restore(self, *arranged: torch.Tensor) -> Int8Levels:
        weight, scale = arranged
        return Int8Levels(weight.t(), scale)

    def _products(self, rows: torch.Tensor, *arranged: torch.Tensor) -> torch.Tensor:
        weight, scale = arranged
        return torch._int_mm(_signed(rows), weight) * scale


class _Bitsandbytes(ByRows):
    """What ``Linear8bitLt`` calls, for CUDA. Written from its source; never yet run on a GPU."""

    name = "bitsandbytes"

    def _products(self, rows: torch.Tensor, *arranged: torch.Tensor) -> torch.Tensor:
        from bitsandbytes.functional import int8_linear_matmul

        weight, scale = arranged
        product: torch.Tensor = int8_linear_matmul(_signed(rows), weight) * scale
        return product


class _InFloats(_AsTheyAre):
    """Works everywhere."""

    name = "floats"

    def multiply(self, rows: torch.Tensor, *arranged: torch.Tensor) -> torch.Tensor:
        weight, scale = arranged
        return multiply_by_chunks(rows, len(weight), lambda first, to: weight[first:to].float().t()) * scale


KERNELS: Sequence[Kernel[Int8Levels]] = (_Packed(), _ByColumns(), ByRows(), Bags(), _InFloats())
CUDA_KERNELS: Sequence[Kernel[Int8Levels]] = (_Bitsandbytes(), _InFloats())


def _signed(rows: torch.Tensor) -> torch.Tensor:
    return (rows ^ 128).view(torch.int8)


@functools.cache
def _zeros(count: int) -> torch.Tensor:
    return torch.zeros(count, dtype=torch.int32)
