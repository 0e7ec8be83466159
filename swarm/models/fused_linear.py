"""One linear layer in place of several that are fed with the same: their weights are read in one go."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import nn


class FusedLinear(nn.Module):
    """A layer whose output is the outputs of others side by side.

    Attributes:
        linear: the layer that computes.
    """

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear
        self._of: weakref.ref[torch.Tensor] | None = None
        self._output: torch.Tensor | None = None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """``[…, inputs]`` to ``[…, outputs of all]``."""
        output: torch.Tensor = self.linear(hidden_states)
        return output

    def once(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The same, computed once for all parts that are fed with the very same tensor, one after another."""
        if self._output is None or self._of is None or self._of() is not hidden_states:
            self._of = weakref.ref(hidden_states, self._forget)
            self._output = self(hidden_states)
        return self._output

    def _forget(self, _: object) -> None:
        self._output = None


class PartOfFused(nn.Module):
    """Stands where a layer was that is now part of another."""

    def __init__(self, fused: FusedLinear, begin: int, end: int) -> None:
        super().__init__()
        self.fused, self.begin, self.end = fused, begin, end

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """``[…, inputs]`` to ``[…, outputs of this part]``."""
        return self.fused.once(hidden_states)[..., self.begin : self.end]


def fuse(parent: nn.Module, names: Sequence[str]) -> FusedLinear | None:
    """Replace, in place, linear layers of `parent` that are fed with the same. None: such layers cannot be fused."""
    linears = [getattr(parent, name) for name in names]
    if any(type(linear) is not nn.Linear for linear in linears) or len({one.bias is None for one in linears}) > 1:
        return None
    sizes = [linear.out_features for linear in linears]
    with torch.device("meta"):
        whole = nn.Linear(linears[0].in_features, sum(sizes), bias=False)
    whole.weight = nn.Parameter(torch.cat([linear.weight.data for linear in linears]), requires_grad=False)
    if linears[0].bias is not None:
        whole.bias = nn.Parameter(torch.cat([linear.bias.data for linear in linears]), requires_grad=False)
    fused, begin = FusedLinear(whole), 0
    for name, size in zip(names, sizes, strict=True):
        setattr(parent, name, PartOfFused(fused, begin, begin + size))
        begin += size
    return fused
