"""Linear layers with 4-bit weights at quantiles of a normal distribution (NF4: Dettmers et al. 2023, arXiv:2305.14314).

Levels, their order and their groups are those of bitsandbytes (``Linear4bit``), whose kernel multiplies them on CUDA.
That was written from its source: the same calls are tested on CPUs, never yet on a GPU. CPUs that multiply bfloat16 run
a kernel of bitsandbytes, too; on others weights are dequantized, which is slow: there ``int4`` is better.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import nn
from torch.nn import functional

from swarm.models.quantization.groups import multiply_by_chunks, whole_groups, whole_rows
from swarm.models.quantization.kernels import Kernel, Trial, fastest, sampled_outputs

GROUP = 64
"""Consecutive inputs of one output that share a scale."""
BYTES_PER_WEIGHT = 0.5 + torch.bfloat16.itemsize / GROUP

_BLOCK = 32
"""Outputs are padded to a multiple of this: the kernel's blocks."""
_VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_TOLERANCE = 1e-2


@dataclass(frozen=True)
class Nf4Levels:
    """A weight is one of 16 values, times the scale of its group."""

    levels: torch.Tensor
    """uint8 0 … 15, ``[outputs, inputs]``, both padded"""
    scale: torch.Tensor
    """bfloat16, as one of the kernels takes it; ``[outputs, groups]``"""

    @classmethod
    def of(cls, weight: torch.Tensor) -> Self:
        """The nearest to floating-point ``[outputs, inputs]``."""
        groups = whole_groups(weight, GROUP)
        scale = groups.abs().amax(dim=2).bfloat16()
        values = _values(weight.device)
        levels = torch.bucketize(
            groups / scale.float().where(scale != 0, 1).unsqueeze(2), (values[1:] + values[:-1]) / 2
        )
        return cls(levels.to(torch.uint8).flatten(1), scale).padded()

    def padded(self) -> Self:
        """With a whole number of the kernel's blocks of outputs."""
        missing = -len(self.levels) % _BLOCK
        return type(self)(
            functional.pad(self.levels, (0, 0, 0, missing)), functional.pad(self.scale, (0, 0, 0, missing))
        )

    def dequantized(self) -> torch.Tensor:
        """float32, ``[outputs, inputs]``."""
        values = torch.index_select(_values(self.levels.device), 0, self.levels.flatten().int())
        return values.view(len(self.levels), -1, GROUP).mul_(self.scale.unsqueeze(2)).flatten(1)


class Nf4Linear(nn.Module):
    """A linear layer with 4-bit weights."""

    scale: torch.Tensor

    def __init__(self, levels: Nf4Levels, outputs: int, bias: torch.Tensor | None) -> None:
        """
        Args:
            outputs: how many there are without padding.
        """
        super().__init__()
        self._kernel = kernel_for(levels.levels.shape, levels.levels.device)
        weight, scale = self._kernel.arrange(levels)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias = bias
        self.outputs = outputs

    @classmethod
    def quantize(cls, weight: torch.Tensor, bias: torch.Tensor | None) -> Self:
        """Of a floating-point `weight`, ``[outputs, inputs]``."""
        return cls(Nf4Levels.of(weight), weight.shape[0], bias)

    @classmethod
    def fuse(cls, linears: Sequence[Nf4Linear], bias: torch.Tensor | None) -> Self:
        """One layer with the outputs of all `linears`, exactly as they are."""
        each = [one._kernel.restore(one.weight, one.scale) for one in linears]
        levels = torch.cat([of.levels[: one.outputs] for of, one in zip(each, linears, strict=True)])
        scale = torch.cat([of.scale[: one.outputs] for of, one in zip(each, linears, strict=True)])
        return cls(Nf4Levels(levels, scale).padded(), len(levels), bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """``[…, inputs]`` to ``[…, outputs]``, in the precision given."""
        product = self._kernel.multiply(whole_rows(hidden_states, GROUP), self.weight, self.scale)
        product = product[:, : self.outputs].to(hidden_states.dtype)
        if self.bias is not None:
            product = product + self.bias
        return product.view(*hidden_states.shape[:-1], self.outputs)


def kernel_for(shape: Sequence[int], device: torch.device) -> Kernel[Nf4Levels]:
    """The fastest for a padded weight ``[outputs, inputs]``."""
    kernels = KERNELS if device.type == "cpu" else CUDA_KERNELS
    return fastest("nf4", shape, device, kernels, lambda: trial(shape, device))


def trial(shape: Sequence[int], device: torch.device) -> Trial[Nf4Levels]:
    """Weights and rows at random."""
    random = torch.Generator().manual_seed(0)
    levels = Nf4Levels.of(torch.randn(sampled_outputs(*shape), shape[1], generator=random).to(device))
    few, some, many = (torch.randn(rows, shape[1], generator=random).to(device) for rows in (1, 16, 512))
    weight = levels.dequantized().double().t()
    return Trial(levels, [few, some], many, lambda rows: rows.double() @ weight, _TOLERANCE)


class _Pairs:
    """The order of bitsandbytes: the first of two levels in the high half of a byte."""

    def arrange(self, levels: Nf4Levels) -> tuple[torch.Tensor, torch.Tensor]:
        first, second = levels.levels.unflatten(1, (-1, 2)).unbind(2)
        return (first << 4) | second, levels.scale

    def restore(self, *arranged: torch.Tensor) -> Nf4Levels:
        weight, scale = arranged
        return Nf4Levels(torch.stack([weight >> 4, weight & 15], dim=2).flatten(1), scale)


class _Linear4bit(_Pairs):
    """What ``Linear4bit`` calls, for CUDA. Never yet run there."""

    name = "Linear4bit"

    def multiply(self, rows: torch.Tensor, *arranged: torch.Tensor) -> torch.Tensor:
        weight, scale = arranged
        product: torch.Tensor = _bitsandbytes().matmul_4bit(rows, weight.view(-1, 1), _state(weight, scale, rows.dtype))
        return product


@dataclass(frozen=True)
class _Dequantized(_Pairs):
    """bitsandbytes dequantizes, torch multiplies."""

    dtype: torch.dtype

    @property
    def name(self) -> str:
        return f"dequantized to {self.dtype}"

    def multiply(self, rows: torch.Tensor, *arranged: torch.Tensor) -> torch.Tensor:
        weight, scale = arranged

        def dequantize(first: int, to: int) -> torch.Tensor:
            part = weight[first:to]
            chunk: torch.Tensor = _bitsandbytes().functional.dequantize_4bit(
                part.view(-1, 1), _state(part, scale[first:to], self.dtype)
            )
            return chunk.t()

        return multiply_by_chunks(rows.to(self.dtype), len(weight), dequantize)


class _LookedUp(_Pairs):
    """Works everywhere, without bitsandbytes; slowly."""

    name = "looked up"

    def multiply(self, rows: torch.Tensor, *arranged: torch.Tensor) -> torch.Tensor:
        weight, scale = arranged

        def dequantize(first: int, to: int) -> torch.Tensor:
            return self.restore(weight[first:to], scale[first:to]).dequantized().to(rows.dtype).t()

        return multiply_by_chunks(rows, len(weight), dequantize)


class _Blocks:
    """bitsandbytes' kernel for CPUs that multiply bfloat16 (AVX512-BF16).

    It reads blocks of 32 outputs. In a block, two levels of each output follow one another; those of the first 16
    outputs are in the low halves of bytes.
    """

    name = "blocks"

    def arrange(self, levels: Nf4Levels) -> tuple[torch.Tensor, torch.Tensor]:
        outputs, inputs = levels.levels.shape
        pairs = levels.levels.view(outputs // _BLOCK, _BLOCK, inputs // 2, 2).transpose(1, 2)
        low, high = pairs.reshape(-1, 2, _BLOCK).unbind(1)
        return (low | (high << 4)).view(outputs, inputs // 2), levels.scale.t().contiguous()

    def restore(self, *arranged: torch.Tensor) -> Nf4Levels:
        weight, scale = arranged
        outputs, half = weight.shape
        pairs = torch.stack([weight & 15, weight >> 4], dim=-1).view(outputs // _BLOCK, half, _BLOCK, 2)
        halves = pairs.transpose(2, 3).reshape(outputs // _BLOCK, half, _BLOCK, 2)
        return Nf4Levels(halves.transpose(1, 2).reshape(outputs, 2 * half), scale.t().contiguous())

    def multiply(self, rows: torch.Tensor, *arranged: torch.Tensor) -> torch.Tensor:
        _bitsandbytes()  # registers the operator
        weight, scale = arranged
        shape = (len(weight), rows.shape[1])
        product: torch.Tensor = torch.ops.bitsandbytes.gemv_4bit(
            rows.bfloat16(), weight, shape, scale, _values(rows.device), GROUP
        )
        return product


@functools.cache
def _bitsandbytes() -> Any:
    """The package, which takes seconds to import, and without its advice to install one that downloads kernels."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    return importlib.import_module("bitsandbytes")


def _state(weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> Any:
    shape = torch.Size((len(weight), 2 * weight.shape[1]))
    return _bitsandbytes().functional.QuantState(
        scale.flatten().float(), shape, _values(weight.device), GROUP, "nf4", dtype
    )


@functools.cache
def _values(device: torch.device) -> torch.Tensor:
    return torch.tensor(_VALUES, device=device)


KERNELS: Sequence[Kernel[Nf4Levels]] = (
    _Blocks(), _Dequantized(torch.bfloat16), _Dequantized(torch.float32), _LookedUp()
)  # fmt: skip
CUDA_KERNELS: Sequence[Kernel[Nf4Levels]] = (_Linear4bit(), _LookedUp())
