"""Hold the linear layers of a span in 8 or 4 bits: more fits, and a decode step, which reads every weight, is faster.

``int8`` is for every machine, ``nf4`` for GPUs and new CPUs, ``int4`` for CPUs. Everything that is no linear layer
(norms, biases) stays as it is. How a scheme's levels are multiplied is chosen on each machine
(:mod:`swarm.models.quantization.kernels`); what they mean is the same everywhere.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from swarm.models.quantization import int4, int8, nf4
from swarm.models.quantization.int4 import Int4Linear
from swarm.models.quantization.int8 import BytesOfLast, Int8Linear
from swarm.models.quantization.nf4 import Nf4Linear

SCHEMES = ("int8", "nf4", "int4")
"""What weights may be quantized to."""

QUANTIZED_LINEARS = (Int8Linear, Nf4Linear, Int4Linear)
"""What takes the place of linear layers."""

SCHEMES_ON = {"cpu": SCHEMES, "cuda": ("int8", "nf4")}
"""Likewise, by type of device."""

_BYTES_PER_WEIGHT = {"int8": int8.BYTES_PER_WEIGHT, "nf4": nf4.BYTES_PER_WEIGHT, "int4": int4.BYTES_PER_WEIGHT}


def bytes_per_weight(scheme: str | None, dtype: torch.dtype) -> float:
    """What a weight of a linear layer occupies, with its share of scales where they are more than next to nothing."""
    return dtype.itemsize if scheme is None else _BYTES_PER_WEIGHT[scheme]


def quantize_linears(module: nn.Module, scheme: str, *, memory: BytesOfLast | None = None) -> None:
    """Replace, in place, every linear layer in `module` by one of `scheme` (one of :data:`SCHEMES`).

    Raises:
        ValueError: there is no such scheme.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"{scheme!r} is none of {', '.join(SCHEMES)}")
    memory = memory or BytesOfLast()
    for name, child in module.named_children():
        if isinstance(child, nn.Linear | Conv1D):
            weight = child.weight.data.t() if isinstance(child, Conv1D) else child.weight.data
            setattr(module, name, _quantized(weight, child.bias, scheme, memory))
        else:
            quantize_linears(child, scheme, memory=memory)


def _quantized(weight: torch.Tensor, bias: torch.Tensor | None, scheme: str, memory: BytesOfLast) -> nn.Module:
    if scheme == "int8":
        return Int8Linear.quantize(weight, bias, memory)
    return (Int4Linear if scheme == "int4" else Nf4Linear).quantize(weight, bias)
