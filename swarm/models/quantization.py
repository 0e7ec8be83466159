"""Hold the linear layers of a span in 8 bits: more fits, and a decode step, which reads every weight, is faster.

``int8`` has a scale for every output, and quantizes what comes in row by row, too (LLM.int8() without outliers:
Dettmers et al. 2022, arXiv:2208.07339): products are sums of integers, the same whatever else is in the batch.
Everything that is no linear layer (norms, biases) stays as it is.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

SCHEMES = ("int8",)
"""What weights may be quantized to."""


def bytes_per_weight(scheme: str | None, dtype: torch.dtype) -> float:
    """What a weight of a linear layer occupies; scales are next to nothing."""
    return 1.0 if scheme == "int8" else dtype.itemsize


def quantize_linears(module: nn.Module, scheme: str, *, memory: LevelsOfLast | None = None) -> None:
    """Replace, in place, every linear layer in `module` by one of `scheme` (one of :data:`SCHEMES`).

    Raises:
        ValueError: there is no such scheme.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"{scheme!r} is none of {', '.join(SCHEMES)}")
    memory = memory or LevelsOfLast()
    for name, child in module.named_children():
        if isinstance(child, nn.Linear | Conv1D):
            weight = child.weight.data.t() if isinstance(child, Conv1D) else child.weight.data
            setattr(module, name, Int8Linear(weight, child.bias, memory))
        else:
            quantize_linears(child, scheme, memory=memory)


class Int8Linear(nn.Module):
    """A linear layer with 8-bit weights, fed with 8-bit levels of each row."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, memory: LevelsOfLast) -> None:
        """
        Args:
            weight: ``[outputs, inputs]``, floating-point.
            memory: shared with layers that may be fed with the same hidden states.
        """
        super().__init__()
        levels = _levels(weight.float())
        self.weight = nn.Parameter(levels.levels, requires_grad=False)
        self.scale = nn.Parameter(levels.scale.squeeze(1), requires_grad=False)
        self.bias = bias
        self._memory = memory

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """``[…, inputs]`` to ``[…, outputs]``, in the precision given."""
        rows = self._memory.levels_of(hidden_states)
        product = torch._int_mm(rows.levels, self.weight.t()).float().mul_(rows.scale).mul_(self.scale)
        if self.bias is not None:
            product += self.bias
        return product.to(hidden_states.dtype).view(*hidden_states.shape[:-1], -1)


@dataclass(frozen=True)
class _Levels:
    levels: torch.Tensor
    """int8, ``[rows, columns]``"""
    scale: torch.Tensor
    """float32, ``[rows, 1]``"""


class LevelsOfLast:
    """The levels of the last hidden states: layers that are fed with the same ones (query, key, value) share them."""

    def __init__(self) -> None:
        self._of: weakref.ref[torch.Tensor] | None = None
        self._levels: _Levels | None = None

    def levels_of(self, hidden_states: torch.Tensor) -> _Levels:
        """Levels of ``[…, inputs]``, row by row."""
        if self._levels is None or self._of is None or self._of() is not hidden_states:
            self._of = weakref.ref(hidden_states)
            self._levels = _levels(hidden_states.reshape(-1, hidden_states.shape[-1]).float())
        return self._levels


def _levels(rows: torch.Tensor) -> _Levels:
    if rows.is_meta:  # a skeleton: there is nothing to compute, and torch would import its compiler for it
        return _Levels(torch.empty(rows.shape, dtype=torch.int8, device="meta"), rows.new_empty(rows.shape[0], 1))
    scale = (rows.abs().amax(dim=1, keepdim=True) / 127).clamp_(min=torch.finfo(torch.float32).tiny)
    return _Levels((rows / scale).round_().to(torch.int8), scale)
