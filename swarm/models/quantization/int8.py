"""Linear layers with 8-bit weights and a scale for every output; rows stay as they are, or are held in 16 bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import nn

from swarm.models.quantization.int8_bags import OVERHEAD
from swarm.models.quantization.int8_kernels import ByRows, OfBytes, kernel_for
from swarm.models.quantization.int8_levels import BytesOfLast, Int8Levels
from swarm.models.quantization.kernels import Kernel

BYTES_PER_WEIGHT = 1.0 + OVERHEAD
"""At most, by whichever kernel."""


class Int8Linear(nn.Module):
    """A linear layer with 8-bit weights."""

    scale: torch.Tensor

    def __init__(
        self,
        levels: Int8Levels,
        bias: torch.Tensor | None,
        memory: BytesOfLast,
        kernel: Kernel[Int8Levels] | None = None,
    ) -> None:
        """
        Args:
            memory: shared with layers that may be fed with the same hidden states.
            kernel: default: the fastest.
        """
        super().__init__()
        self._kernel = kernel or kernel_for(levels.levels.shape, levels.levels.device)
        weight, scale = self._kernel.arrange(levels)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias = bias
        self._memory = memory

    @classmethod
    def quantize(cls, weight: torch.Tensor, bias: torch.Tensor | None, memory: BytesOfLast) -> Self:
        """Of a floating-point `weight`, ``[outputs, inputs]``."""
        return cls(Int8Levels.of(weight), bias, memory)

    @classmethod
    def for_file(cls, weight: torch.Tensor, bias: torch.Tensor | None, memory: BytesOfLast) -> Self:
        """Likewise, with weights that can be kept in a file; without numbers if there are none (meta device)."""
        if weight.is_meta:
            outputs, inputs = weight.shape
            levels = Int8Levels(
                torch.empty(outputs, inputs, dtype=torch.int8, device="meta"), torch.empty(outputs, device="meta")
            )
            return cls(levels, bias, memory, ByRows())
        return cls(Int8Levels.of(weight), bias, memory, ByRows())

    @classmethod
    def fuse(cls, linears: Sequence[Int8Linear], bias: torch.Tensor | None) -> Self:
        """One layer with the outputs of all `linears`, exactly as they are."""
        each = [one._kernel.restore(one.weight, one.scale) for one in linears]
        levels = Int8Levels(torch.cat([of.levels for of in each]), torch.cat([of.scale for of in each]))
        return cls(levels, bias, linears[0]._memory)

    @property
    def outputs(self) -> int:
        """How many there are."""
        return len(self.scale)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """``[…, inputs]`` to ``[…, outputs]``, in the precision given."""
        if isinstance(self._kernel, OfBytes):
            product = self._kernel.multiply_bytes(self._memory.bytes_of(hidden_states), self.weight, self.scale)
        else:
            rows = hidden_states.reshape(-1, hidden_states.shape[-1]).float()
            product = self._kernel.multiply(rows, self.weight, self.scale)
        if self.bias is not None:
            product += self.bias
        return product.to(hidden_states.dtype).view(*hidden_states.shape[:-1], -1)
