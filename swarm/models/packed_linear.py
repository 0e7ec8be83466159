"""A linear layer whose weights lie in memory as oneDNN multiplies with them fastest.

BLAS libraries copy a matrix into blocks before they multiply with more than a row or two, each time anew. Here it is
kept in blocks: there is no other copy. Measured for 15 blocks of SmolLM2, fp32, one thread, ms at 1 / 4 / 16 / 64 rows:
13.5 / 20.7 / 32.8 / 82.9 as it was loaded, 11.6 / 20.9 / 30.4 / 81.6 transposed, 8.1 / 8.8 / 15.4 / 34.5 in blocks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

_ROWS = 16
"""oneDNN chooses blocks for so many rows; these are good for any number."""
_NUMBERS_OF_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
"""0.6 MB and 1 ms for each and every shape."""
_MOST_ROWS = _NUMBERS_OF_ROWS[-1]


class PackedLinear(nn.Module):
    """Computes what an ``nn.Linear`` (or GPT-2's ``Conv1D``) does, on CPUs."""

    def __init__(self, linear: nn.Linear | Conv1D) -> None:
        super().__init__()
        weight = linear.weight.data.t().contiguous() if isinstance(linear, Conv1D) else linear.weight.data
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(pack(weight), requires_grad=False)
        self.bias = linear.bias

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """``[…, inputs]`` to ``[…, outputs]``."""
        if torch.is_grad_enabled() and hidden_states.requires_grad:
            return functional.linear(hidden_states, self.weight.to_dense(), self.bias)
        return multiply(hidden_states, self.weight, self.bias)

    def plain(self) -> nn.Linear:
        """The ordinary layer that this one stands for."""
        with torch.device("meta"):
            linear = nn.Linear(self.in_features, self.out_features, bias=False)
        linear.weight = nn.Parameter(self.weight.to_dense(), requires_grad=False)
        linear.bias = self.bias
        return linear


class LinearWithCopy(nn.Linear):
    """The layer that it is made from, with the same parameters; it multiplies with a copy of its weights.

    Once the weights are others (by training, or by loading), it multiplies with these.
    """

    def __init__(self, linear: nn.Linear, copy: nn.Module) -> None:
        """
        Args:
            copy: takes what `linear` takes, and gives what it gives, or close to it.
        """
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        # In a tuple, they are no part of this module: not to be trained, saved or moved with it.
        self._copy, self._copy_of = (copy,), (linear.weight, linear.weight._version)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """``[…, inputs]`` to ``[…, outputs]``."""
        if self._can_use_copy(hidden_states):
            return self._copy[0](hidden_states)  # type: ignore[no-any-return]
        return super().forward(hidden_states)

    def _can_use_copy(self, hidden_states: torch.Tensor) -> bool:
        return (
            not (torch.is_grad_enabled() and (hidden_states.requires_grad or self.weight.requires_grad))
            and self.weight is self._copy_of[0]
            and self.weight._version == self._copy_of[1]
            and hidden_states.dtype == self.weight.dtype
            and hidden_states.device == self.weight.device
            and not torch.is_autocast_enabled(hidden_states.device.type)
        )


def pack(weight: torch.Tensor) -> torch.Tensor:
    """``[outputs, inputs]`` in blocks."""
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)
    return packed


def multiply(rows: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``[…, inputs]`` × what :func:`pack` made → ``[…, outputs]``."""
    return multiply_rounded(
        rows, lambda some: torch.ops.mkldnn._linear_pointwise(some, packed, bias, "none", [], "")
    )  # fmt: skip


def multiply_rounded(rows: torch.Tensor, multiply: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """``[…, inputs]`` to ``[…, outputs]`` by a function of oneDNN's, which is given one of a few numbers of rows.

    For every number of rows and shape, oneDNN compiles a program of its own and keeps it.
    """
    flat = rows.reshape(-1, rows.shape[-1])
    count = len(flat)
    if count > _MOST_ROWS:
        product = torch.cat([multiply_rounded(some, multiply) for some in flat.split(_MOST_ROWS)])
    else:
        padding = next(number for number in _NUMBERS_OF_ROWS if number >= count) - count
        product = multiply(functional.pad(flat, (0, 0, 0, padding)) if padding else flat)[:count]
    return product.view(*rows.shape[:-1], -1)


@functools.cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether this machine and build of torch can."""
    try:
        weight = torch.eye(32, dtype=dtype)
        return torch.equal(multiply(weight, pack(weight)), weight)
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
