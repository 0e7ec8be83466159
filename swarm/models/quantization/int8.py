"""Linear layers with 8-bit weights: a scale for every output, and products of integers.

Rows that come in are quantized, too, each with a scale of its own, but to 16 bits, which are multiplied as two bytes.
One byte is too little where a few numbers of a row are far greater than the others: the perplexity of SmolLM2 becomes
2.8% worse, not 0.1% (LLM.int8(), arXiv:2208.07339, treats such numbers apart; that depends on the batch). Sums of
integers are the same in whatever batch a row comes; kernels that put them together in another order differ in the last
bits of float32. For machines where no other kernel works there is one that multiplies in floating point.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import nn

from swarm.models.native import panels
from swarm.models.native.library import PANEL, library
from swarm.models.native.panels import Panels
from swarm.models.packed_linear import multiply_rounded
from swarm.models.quantization.groups import multiply_by_chunks, parts_of
from swarm.models.quantization.kernels import Kernel, Trial, fastest, sampled_outputs

BYTES_PER_WEIGHT = 1.0

_SMALLEST = 1e-30
"""Rows of zeros have a scale, too."""
_MIDDLE = 0x8080
"""Both bytes of it are the zero of their byte."""
_LEVELS = 0x7F7F
"""The largest level: 127 in both bytes."""
_BYTES = slice(0, 2) if sys.byteorder == "little" else slice(2, 4)
_TOLERANCE = 1e-6


class Int8Linear(nn.Module):
    """A linear layer with 8-bit weights, fed with 16-bit levels of each row."""

    scale: torch.Tensor

    def __init__(
        self, kernel: Kernel[Int8Levels], weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
    ) -> None:
        """
        Args:
            weight, scale: as `kernel` arranges them.
        """
        super().__init__()
        self._kernel = kernel
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias = bias

    @classmethod
    def quantize(cls, weight: torch.Tensor, bias: torch.Tensor | None) -> Self:
        """Of a floating-point `weight`, ``[outputs, inputs]``."""
        return cls._of(Int8Levels.of(weight), bias)

    @classmethod
    def for_file(cls, weight: torch.Tensor, bias: torch.Tensor | None) -> Self:
        """Likewise, with weights that can be kept in a file; without numbers if there are none (meta device)."""
        outputs, inputs = weight.shape
        kernel: _InPanels | _ByRows = _InPanels() if inputs % 2 == 0 and panels_in_files() else _ByRows()
        if weight.is_meta:
            arranged = torch.empty(kernel.shape(outputs, inputs), dtype=torch.int8, device="meta")
            return cls(kernel, arranged, torch.empty(outputs, device="meta"), bias)
        return cls(kernel, *kernel.arrange(Int8Levels.of(weight)), bias)

    @classmethod
    def fuse(cls, linears: Sequence[Int8Linear], bias: torch.Tensor | None) -> Self:
        """One layer with the outputs of all `linears`, exactly as they are."""
        each = [one._kernel.restore(one.weight, one.scale) for one in linears]
        return cls._of(Int8Levels(torch.cat([of.levels for of in each]), torch.cat([of.scale for of in each])), bias)

    @classmethod
    def _of(cls, levels: Int8Levels, bias: torch.Tensor | None) -> Self:
        kernel = kernel_for(levels.levels.shape, levels.levels.device)
        return cls(kernel, *kernel.arrange(levels), bias)

    @property
    def outputs(self) -> int:
        """How many there are."""
        return len(self.scale)

    def panels(self) -> Panels | None:
        """As it can be handed to compiled code, if the weights lie so."""
        of_panels = isinstance(self._kernel, _InPanels)
        return panels.of_bytes(self.weight.data, self.scale, self.bias) if of_panels else None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """``[…, inputs]`` to ``[…, outputs]``, in the precision given."""
        product = self._kernel.multiply(hidden_states, self.weight, self.scale)
        if self.bias is not None:
            product += self.bias
        return product.to(hidden_states.dtype).view(*hidden_states.shape[:-1], -1)


@dataclass(frozen=True)
class Int8Levels:
    """A weight is level · scale."""

    levels: torch.Tensor
    """int8 -127 … 127, ``[outputs, inputs]``"""
    scale: torch.Tensor
    """float32, ``[outputs]``"""

    @classmethod
    def of(cls, weight: torch.Tensor) -> Self:
        """The nearest to floating-point ``[outputs, inputs]``."""
        levels, scales = zip(*map(cls._quantized, parts_of(weight)), strict=True)
        return cls(torch.cat(levels), torch.cat(scales))

    @staticmethod
    def _quantized(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weight = weight.float()
        scale = weight.abs().amax(dim=1, keepdim=True).div_(127).clamp_(min=_SMALLEST)
        return (weight / scale).round_().to(torch.int8), scale.squeeze(1)


@dataclass(frozen=True)
class RowBytes:
    """Rows in 16 bits: a number is ``(256 · (high - 128) + low - 128) · scale``."""

    bytes_: torch.Tensor
    """uint8, ``[2 · rows, inputs]``: all low bytes, then all high ones"""
    scale: torch.Tensor
    """float32, ``[rows, 1]``"""

    @classmethod
    def of(cls, rows: torch.Tensor) -> Self:
        """The nearest to float32 ``[rows, inputs]``."""
        largest = rows.abs().amax(dim=1, keepdim=True).clamp_(min=_SMALLEST)
        levels = (rows * (_LEVELS / largest)).round_().add_(_MIDDLE).to(torch.int32)
        two = levels.view(torch.uint8).view(*rows.shape, 4)[..., _BYTES].movedim(-1, 0)
        return cls(two.reshape(-1, rows.shape[1]), largest.div_(_LEVELS))


class _BytesOfLast:
    """The bytes of the last hidden states: layers that are fed with the same ones (query, key, value) share them."""

    def __init__(self) -> None:
        self._last: tuple[weakref.ref[torch.Tensor], RowBytes] | None = None

    def __call__(self, hidden_states: torch.Tensor) -> RowBytes:
        """Of ``[…, inputs]``, row by row. Several threads may ask at a time."""
        last = self._last
        if last is not None and last[0]() is hidden_states:
            return last[1]
        made = RowBytes.of(hidden_states.reshape(-1, hidden_states.shape[-1]).float())
        self._last = weakref.ref(hidden_states), made
        return made


_bytes_of_last = _BytesOfLast()


def panels_in_files() -> bool:
    """Whether weights are kept in files in panels here: such files are others'."""
    return library() is not None


def kernel_for(shape: Sequence[int], device: torch.device) -> Kernel[Int8Levels]:
    """The fastest for a weight ``[outputs, inputs]``. It multiplies ``[…, inputs]`` and returns float32."""
    kernels = KERNELS if device.type == "cpu" else CUDA_KERNELS
    kernels = [one for one in kernels if library() is not None or not isinstance(one, _InPanels)]
    return fastest("int8", shape, device, kernels, lambda: trial(shape, device), _InPanels.name)


def trial(shape: Sequence[int], device: torch.device) -> Trial[Int8Levels]:
    """Rows at random, and one with the largest sums there may be: kernels for old processors may saturate."""
    generator = torch.Generator().manual_seed(0)
    outputs, inputs = sampled_outputs(*shape), shape[1]
    levels = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8, generator=generator)
    levels[0] = 127
    weight = Int8Levels(levels.to(device), torch.ones(outputs, device=device))
    true = weight.levels.double().t()

    def random(rows: int) -> torch.Tensor:
        some = torch.randn(rows, inputs, generator=generator)
        some[0] = 1.0
        return some.to(device)

    def product(rows: torch.Tensor) -> torch.Tensor:
        low, high = (RowBytes.of(rows).bytes_.double() - 128).chunk(2)
        return (low + 256 * high) @ true * RowBytes.of(rows).scale

    return Trial(weight, [random(1), random(16)], random(64), product, _TOLERANCE)


class _InPanels:
    """What is compiled on this machine (:mod:`swarm.models.native`)."""

    name = "panels"

    def arrange(self, levels: Int8Levels) -> tuple[torch.Tensor, torch.Tensor]:
        panels.needed()
        if levels.levels.shape[1] % 2:
            raise ValueError("panels hold pairs of inputs")
        return panels.bytes_in_panels(levels.levels), levels.scale.contiguous()

    def shape(self, outputs: int, inputs: int) -> tuple[int, ...]:
        """That of an arranged weight."""
        return -(-outputs // PANEL), inputs // 2, PANEL, 2

    def restore(self, *arranged: torch.Tensor) -> Int8Levels:
        weight, scale = arranged
        return Int8Levels(panels.bytes_of_panels(weight, len(scale)), scale)

    def multiply(self, rows: torch.Tensor, *arranged: torch.Tensor) -> torch.Tensor:
        return panels.of_bytes(*arranged).multiply(rows.reshape(-1, rows.shape[-1]))


class _OnBytes:
    """Multiplies the two bytes of every number on its own."""

    def multiply(self, rows: torch.Tensor, *arranged: torch.Tensor) -> torch.Tensor:
        """``[…, inputs]`` to float32 ``[rows, outputs]``."""
        split = _bytes_of_last(rows)
        low, high = self.multiply_bytes(split.bytes_, *arranged).chunk(2)
        return torch.add(low, high, alpha=256).mul_(split.scale)

    def multiply_bytes(self, rows: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Of bytes, less 128, each output times its scale: uint8 ``[rows, inputs]`` to float32 ``[rows, outputs]``."""
        raise NotImplementedError


class _Packed(_OnBytes):
    """oneDNN's own order, which differs from processor to processor. It takes levels from 0 to 255."""

    name = "packed"

    def arrange(self, levels: Int8Levels) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.ops.onednn.qlinear_prepack(levels.levels, None), levels.scale

    def restore(self, *arranged: torch.Tensor) -> Int8Levels:
        weight, scale = arranged
        return Int8Levels(weight.to_dense().t(), scale)

    def multiply_bytes(self, rows: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        def product(some: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = torch.ops.onednn.qlinear_pointwise(
                some, 1.0, 128, weight, scale, _zeros(len(scale)), None,
                1.0, 0, torch.float32, "none", [], "",
            )  # fmt: skip
            return result

        return multiply_rounded(rows, product)


class _ByRows(_OnBytes):
    """A row of weights for every output."""

    name = "rows"

    def arrange(self, levels: Int8Levels) -> tuple[torch.Tensor, torch.Tensor]:
        return levels.levels.contiguous(), levels.scale

    def shape(self, outputs: int, inputs: int) -> tuple[int, ...]:
        """That of an arranged weight."""
        return outputs, inputs

    def restore(self, *arranged: torch.Tensor) -> Int8Levels:
        weight, scale = arranged
        return Int8Levels(weight, scale)

    def multiply_bytes(self, rows: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return torch._int_mm(_signed(rows), weight.t()) * scale


class _ByColumns(_ByRows):
    """A column of weights for every output."""

    name = "columns"

    def arrange(self, levels: Int8Levels) -> tuple[torch.Tensor, torch.Tensor]:
        return levels.levels.t().contiguous(), levels.scale

    def restore(self, *arranged: torch.Tensor) -> Int8Levels:
        weight, scale = arranged
        return Int8Levels(weight.t(), scale)

    def multiply_bytes(self, rows: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return torch._int_mm(_signed(rows), weight) * scale


class _Bitsandbytes(_ByRows):
    """What ``Linear8bitLt`` calls, for CUDA. Written from its source; never yet run on a GPU."""

    name = "bitsandbytes"

    def multiply_bytes(self, rows: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        from bitsandbytes.functional import int8_linear_matmul

        product: torch.Tensor = int8_linear_matmul(_signed(rows), weight) * scale
        return product


class _InFloats(_ByRows):
    """Works everywhere; sums beyond 2²⁴ are rounded."""

    name = "floats"

    def multiply_bytes(self, rows: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        product = multiply_by_chunks(_signed(rows).float(), len(weight), lambda first, to: weight[first:to].float().t())
        return product.mul_(scale)


KERNELS: Sequence[Kernel[Int8Levels]] = (_InPanels(), _Packed(), _ByColumns(), _ByRows(), _InFloats())
CUDA_KERNELS: Sequence[Kernel[Int8Levels]] = (_Bitsandbytes(), _InFloats())


def _signed(rows: torch.Tensor) -> torch.Tensor:
    return (rows ^ 128).view(torch.int8)


@functools.cache
def _zeros(count: int) -> torch.Tensor:
    return torch.zeros(count, dtype=torch.int32)
