"""Numbers in 8-bit levels, for weights; and rows as pairs of bytes, for kernels that multiply integers.

Rows get 16 bits, each row with a scale of its own. One byte is too little where a few numbers of a row are far greater
than the others: the perplexity of SmolLM2 becomes 2.8% worse, not 0.1% (LLM.int8(), arXiv:2208.07339, treats such
numbers apart; that depends on the batch).
"""

from __future__ import annotations

import sys
import weakref
from dataclasses import dataclass
from typing import Self

import torch

_SMALLEST = 1e-30
"""Rows of zeros have a scale, too."""
_MIDDLE = 0x8080
"""Both bytes of it are the zero of their byte."""
_LEVELS = 0x7F7F
"""The largest level: 127 in both bytes."""
_BYTES = slice(0, 2) if sys.byteorder == "little" else slice(2, 4)


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
        weight = weight.float()
        scale = weight.abs().amax(dim=1, keepdim=True).div_(127).clamp_(min=_SMALLEST)
        return cls((weight / scale).round_().to(torch.int8), scale.squeeze(1))


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
        levels = (rows * (_LEVELS / largest)).add_(_MIDDLE + 0.5).to(torch.int32)
        two = levels.view(torch.uint8).view(*rows.shape, 4)[..., _BYTES].movedim(-1, 0)
        return cls(two.reshape(-1, rows.shape[1]), largest.div_(_LEVELS))


class BytesOfLast:
    """The bytes of the last hidden states: layers that are fed with the same ones (query, key, value) share them."""

    def __init__(self) -> None:
        self._last: tuple[weakref.ref[torch.Tensor], RowBytes] | None = None

    def bytes_of(self, hidden_states: torch.Tensor) -> RowBytes:
        """Of ``[…, inputs]``, row by row. Several threads may ask at a time."""
        last = self._last
        if last is not None and last[0]() is hidden_states:
            return last[1]
        made = RowBytes.of(hidden_states.reshape(-1, hidden_states.shape[-1]).float())
        self._last = weakref.ref(hidden_states), made
        return made
