"""Linear layers with 4-bit weights, equally spaced between the least and the greatest of each group of 32.

That is how GGUF's 4-bit types hold weights, too, so a checkpoint that is in 4 bits already loses next to nothing more.

What is compiled for the machine (:mod:`swarm.models.native`) multiplies them with rows in 16 bits. Where nothing is,
they compute in bfloat16, for which alone torch has a fast kernel on CPUs. Its inputs and outputs are rounded to 8 bits
of mantissa: a difference in the last bit of a float32 hidden state may become one of 0.4% of that number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import nn
from torch.nn import functional

from swarm.models.native import panels
from swarm.models.native.library import PANEL, library
from swarm.models.native.panels import Panels
from swarm.models.quantization.groups import multiply_by_chunks, parts_of, whole_groups, whole_rows
from swarm.models.quantization.kernels import Kernel, Trial, fastest, sampled_outputs

GROUP = 32
"""Consecutive inputs of one output that share a scale; the kernel has 64 and more, too, which lose more."""
BYTES_PER_WEIGHT = 0.5 + 2 * torch.bfloat16.itemsize / GROUP

_BLOCK = 64
"""Outputs are padded to a multiple of this: the kernel's blocks."""
_TOLERANCE = 1e-2


@dataclass(frozen=True)
class Int4Levels:
    """A weight is ``(level - 8) · scale + zero``."""

    levels: torch.Tensor
    """uint8 0 … 15, ``[outputs, inputs]``, both padded"""
    scale_and_zero: torch.Tensor
    """bfloat16, ``[groups, outputs, 2]``"""

    @classmethod
    def of(cls, weight: torch.Tensor) -> Self:
        """The nearest to floating-point ``[outputs, inputs]``."""
        levels, scales = zip(*map(cls._quantized, parts_of(weight)), strict=True)
        return cls(torch.cat(levels), torch.cat(scales, dim=1)).padded()

    def padded(self) -> Self:
        """With a whole number of the kernel's blocks of outputs."""
        missing = -len(self.levels) % _BLOCK
        return type(self)(
            functional.pad(self.levels, (0, 0, 0, missing)),
            functional.pad(self.scale_and_zero, (0, 0, 0, missing)).contiguous(),
        )

    @staticmethod
    def _quantized(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        groups = whole_groups(weight, GROUP)
        low, high = groups.amin(dim=2), groups.amax(dim=2)
        scale = ((high - low) / 15).bfloat16()
        zero = (low + 8 * scale.float()).bfloat16()
        steps = scale.float().where(scale != 0, 1).unsqueeze(2)
        levels = ((groups - zero.float().unsqueeze(2)) / steps).round_().add_(8).clamp_(0, 15).to(torch.uint8)
        return levels.flatten(1), torch.stack([scale, zero], dim=2).transpose(0, 1)

    def dequantized(self) -> torch.Tensor:
        """float32, ``[outputs, inputs]``."""
        scale, zero = self.scale_and_zero.float().transpose(0, 1).unsqueeze(3).unbind(2)
        levels = self.levels.float().unflatten(1, (-1, GROUP))
        return ((levels - 8) * scale + zero).flatten(1)


class Int4Linear(nn.Module):
    """A linear layer with 4-bit weights."""

    scale_and_zero: torch.Tensor

    def __init__(self, levels: Int4Levels, outputs: int, bias: torch.Tensor | None) -> None:
        """
        Args:
            outputs: how many there are without padding.
        """
        super().__init__()
        self._kernel = kernel_for(levels.levels.shape, levels.levels.device)
        weight, scale_and_zero = self._kernel.arrange(levels)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("scale_and_zero", scale_and_zero)
        self.bias = bias
        self.outputs = outputs

    @classmethod
    def quantize(cls, weight: torch.Tensor, bias: torch.Tensor | None) -> Self:
        """Of a floating-point `weight`, ``[outputs, inputs]``."""
        return cls(Int4Levels.of(weight), weight.shape[0], bias)

    @classmethod
    def fuse(cls, linears: Sequence[Int4Linear], bias: torch.Tensor | None) -> Self:
        """One layer with the outputs of all `linears`, exactly as they are."""
        each = [one._kernel.restore(one.weight, one.scale_and_zero) for one in linears]
        levels = torch.cat([of.levels[: one.outputs] for of, one in zip(each, linears, strict=True)])
        scales = torch.cat([of.scale_and_zero[:, : one.outputs] for of, one in zip(each, linears, strict=True)], dim=1)
        return cls(Int4Levels(levels, scales).padded(), len(levels), bias)

    def panels(self) -> Panels | None:
        """As it can be handed to compiled code, if the weights lie so."""
        of_panels = isinstance(self._kernel, _InPanels)
        return panels.of_nibbles(self.weight.data, self.scale_and_zero, self.outputs, self.bias) if of_panels else None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """``[…, inputs]`` to ``[…, outputs]``, in the precision given."""
        product = self._kernel.multiply(whole_rows(hidden_states, GROUP), self.weight, self.scale_and_zero)
        product = product[:, : self.outputs].to(hidden_states.dtype)
        if self.bias is not None:
            product = product + self.bias
        return product.view(*hidden_states.shape[:-1], self.outputs)


def kernel_for(shape: Sequence[int], device: torch.device) -> Kernel[Int4Levels]:
    """The fastest for a padded weight ``[outputs, inputs]``. It returns bfloat16 or float32."""
    kernels = [one for one in KERNELS if library() is not None or not isinstance(one, _InPanels)]
    return fastest("int4", shape, device, kernels, lambda: trial(shape, device), _InPanels.name)


def trial(shape: Sequence[int], device: torch.device) -> Trial[Int4Levels]:
    """Weights and rows at random."""
    random = torch.Generator().manual_seed(0)
    levels = Int4Levels.of(torch.randn(sampled_outputs(*shape), shape[1], generator=random).to(device))
    few, some, many = (torch.randn(rows, shape[1], generator=random).to(device) for rows in (1, 16, 512))
    weight = levels.dequantized().double().t()
    return Trial(levels, [few, some], many, lambda rows: rows.double() @ weight, _TOLERANCE)


class _InPanels:
    """What is compiled on this machine."""

    name = "panels"

    def arrange(self, levels: Int4Levels) -> tuple[torch.Tensor, torch.Tensor]:
        panels.needed()
        return panels.nibbles_in_panels(levels.levels), panels.scales_in_panels(levels.scale_and_zero)

    def restore(self, *arranged: torch.Tensor) -> Int4Levels:
        weight, scales = arranged
        return Int4Levels(panels.nibbles_of_panels(weight), panels.scales_of_panels(scales))

    def multiply(self, rows: torch.Tensor, *arranged: torch.Tensor) -> torch.Tensor:
        weight, scales = arranged
        return panels.of_nibbles(weight, scales, len(weight) * PANEL).multiply(rows)


@dataclass(frozen=True)
class _Blocks:
    """torch's kernel, which reads blocks of outputs; for many rows the weight is dequantized and multiplied as usual.

    In a block, the levels of an input lie together, those of the first half of the outputs in the low halves of bytes.
    torch reads blocks of 64 outputs where there is AVX512, and of 32 where there is AVX2.
    """

    block: int
    many: int
    """From so many rows on, weights are dequantized."""

    @property
    def name(self) -> str:
        return f"blocks of {self.block}, dequantized from {self.many} rows on"

    def arrange(self, levels: Int4Levels) -> tuple[torch.Tensor, torch.Tensor]:
        low, high = levels.levels.unflatten(0, (-1, self.block)).transpose(1, 2).chunk(2, dim=2)
        outputs, inputs = levels.levels.shape
        return (low | (high << 4)).contiguous().view(outputs, inputs // 2), levels.scale_and_zero

    def restore(self, *arranged: torch.Tensor) -> Int4Levels:
        weight, scale_and_zero = arranged
        return Int4Levels(self._by_inputs(weight).t().contiguous(), scale_and_zero)

    def multiply(self, rows: torch.Tensor, *arranged: torch.Tensor) -> torch.Tensor:
        weight, scale_and_zero = arranged
        if len(rows) < self.many:
            product: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
                rows.bfloat16(), weight, GROUP, scale_and_zero
            )
            return product
        scale, zero = scale_and_zero.unsqueeze(1).unbind(3)

        def dequantize(first: int, to: int) -> torch.Tensor:
            levels = self._by_inputs(weight[first:to]).view(torch.int8).sub_(8).unflatten(0, (-1, GROUP))
            return torch.addcmul(zero[..., first:to], levels.bfloat16(), scale[..., first:to]).flatten(0, 1)

        return multiply_by_chunks(rows.bfloat16(), len(weight), dequantize, multiple=self.block)

    def _by_inputs(self, weight: torch.Tensor) -> torch.Tensor:
        """Levels, ``[inputs, outputs]``."""
        outputs, half = weight.shape
        blocks = weight.view(outputs // self.block, 2 * half, self.block // 2)
        return torch.cat([blocks & 15, blocks >> 4], dim=2).transpose(0, 1).reshape(2 * half, outputs)


KERNELS: Sequence[Kernel[Int4Levels]] = (
    _InPanels(),
    *(_Blocks(block, many) for block in (64, 32) for many in (1 << 30, 256)),
    _Blocks(64, 0),
)
