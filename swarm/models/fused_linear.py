"""Join linear layers that are fed with the same hidden states into one, which reads them once and is called once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from swarm.models.quantization import QUANTIZED_LINEARS


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
