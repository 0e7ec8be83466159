"""Join linear layers that are fed with the same hidden states into one, which reads them once and is called once."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import nn

from swarm.models.quantization import QUANTIZED_LINEARS


class FusedLinear(nn.Module):
    """Stands for several layers: its outputs are theirs, one after the other.

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


def fuse_in_place(parent: nn.Module, names: Sequence[str]) -> bool:
    """Let linear layers of `parent` that are fed with the same be parts of one. False: they are not of a kind."""
    linears = [getattr(parent, name) for name in names]
    try:
        fused = FusedLinear(fuse(linears))
    except ValueError:
        return False
    begin = 0
    for name, linear in zip(names, linears, strict=True):
        setattr(parent, name, PartOfFused(fused, begin, begin + _outputs(linear)))
        begin += _outputs(linear)
    return True


def fuse(linears: Sequence[nn.Module]) -> nn.Module:
    """A layer whose outputs are those of `linears`, one after the other.

    Quantized layers give exactly the same numbers; sums of others may differ in the last bits. The weights of plain
    layers become views of the fused one, so that nothing is held twice; quantized layers should be dropped after this.

    Args:
        linears: all of the same kind, inputs, precision and device; some may have a bias.

    Raises:
        ValueError: they are not.
    """
    kinds = {type(linear) for linear in linears}
    if len(kinds) != 1:
        raise ValueError(f"layers of different kinds cannot be fused: {', '.join(sorted(map(str, kinds)))}")
    kind = kinds.pop()
    if kind is nn.Linear:
        return _fuse_plain([linear for linear in linears if isinstance(linear, nn.Linear)])
    if kind in QUANTIZED_LINEARS:
        fused: nn.Module = kind.fuse(linears, _fuse_biases(linears))
        return fused
    raise ValueError(f"{kind.__name__} is no layer that can be fused")


def _fuse_plain(linears: Sequence[nn.Linear]) -> nn.Linear:
    one = linears[0].weight
    if any((each.weight.shape[1], each.weight.dtype) != (one.shape[1], one.dtype) for each in linears):
        raise ValueError("layers of unequal inputs or precision cannot be fused")
    weight = one.new_empty(sum(len(linear.weight) for linear in linears), one.shape[1])
    fused = nn.Linear(one.shape[1], len(weight), bias=False, device="meta")
    fused.bias = _fuse_biases(linears)
    fused.weight = nn.Parameter(weight, requires_grad=False)
    for linear, part in zip(linears, weight.split([len(linear.weight) for linear in linears]), strict=True):
        linear.weight.data = part.copy_(linear.weight.data)
    return fused


def _fuse_biases(linears: Sequence[nn.Module]) -> nn.Parameter | None:
    biases = [linear.bias for linear in linears]
    some = next((bias for bias in biases if bias is not None), None)
    if some is None:
        return None
    each = [
        some.new_zeros(_outputs(linear)) if bias is None else bias.data
        for linear, bias in zip(linears, biases, strict=True)
    ]
    return nn.Parameter(torch.cat(each), requires_grad=False)


def _outputs(linear: nn.Module) -> int:
    outputs: int = linear.out_features if isinstance(linear, nn.Linear) else linear.outputs
    return outputs
