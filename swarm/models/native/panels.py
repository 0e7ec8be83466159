"""Weights in panels, as compiled code multiplies with them: those of 32 outputs for one input side by side.

The product of a row is the same, to the last bit, whatever other rows are multiplied with it. Measured for the largest
layer of SmolLM2 (3072 × 576), one thread of a Xeon that reads memory at 10 to 16 GB/s, µs at 1 / 4 / 12 / 64 rows: fp32
572 / 584 / 702 / 1626, int8 129 / 137 / 211 / 855, int4 78 / 115 / 209 / 1023; torch's fp32: 560 / 1104 / 1732 / 2597.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from swarm.models.native.library import BYTES, FLOATS, NIBBLES, PANEL, Library, Linear, library


@dataclass(frozen=True)
class Panels:
    """A linear layer that can be called, and handed to compiled code."""

    outputs: int
    inputs: int
    kind: int
    weight: torch.Tensor
    scale: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    """float32"""

    def structure(self) -> Linear:
        """Its addresses; the tensors must stay where they are."""
        scale = self.scale.data_ptr() if self.scale is not None else None
        bias = self.bias.data_ptr() if self.bias is not None else None
        return Linear(self.kind, self.outputs, self.inputs, self.weight.data_ptr(), scale, bias)

    def multiply(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """``[…, inputs]`` to float32 ``[…, outputs]``."""
        rows = hidden_states.reshape(-1, self.inputs).float().contiguous()
        product = torch.empty(len(rows), self.outputs)
        needed().linear(self.structure(), rows.data_ptr(), len(rows), product.data_ptr(), torch.get_num_threads())
        return product.view(*hidden_states.shape[:-1], self.outputs)


class PanelLinear(nn.Module):
    """Computes what an ``nn.Linear`` in float32 does, on CPUs."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """
        Args:
            weight: float32 ``[outputs, inputs]``
        """
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(floats_in_panels(weight), requires_grad=False)
        self.bias = bias

    def panels(self) -> Panels:
        """As it can be handed to compiled code."""
        return Panels(self.out_features, self.in_features, FLOATS, self.weight.data, bias=self.bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """``[…, inputs]`` to ``[…, outputs]``."""
        if torch.is_grad_enabled() and hidden_states.requires_grad:
            return functional.linear(hidden_states, self.dense(), self.bias)
        return self.panels().multiply(hidden_states)

    def plain(self) -> nn.Linear:
        """The ordinary layer that this one stands for."""
        with torch.device("meta"):
            linear = nn.Linear(self.in_features, self.out_features, bias=False)
        linear.weight, linear.bias = nn.Parameter(self.dense(), requires_grad=False), self.bias
        return linear

    def dense(self) -> torch.Tensor:
        """The weight, ``[outputs, inputs]``."""
        return self.weight.data.transpose(1, 2).reshape(-1, self.in_features)[: self.out_features]


def needed() -> Library:
    """The compiled library, where it must be there.

    Raises:
        RuntimeError: it is not.
    """
    found = library()
    if found is None:
        raise RuntimeError("nothing is compiled for this machine")
    return found


def can_use_panels(dtype: torch.dtype) -> bool:
    """Whether weights of this type can be held and multiplied in panels here."""
    return dtype is torch.float32 and library() is not None


def floats_in_panels(weight: torch.Tensor) -> torch.Tensor:
    """float32 ``[outputs, inputs]`` as ``[panels, inputs, PANEL]``."""
    return _whole_panels(weight).transpose(1, 2).contiguous()


def bytes_in_panels(levels: torch.Tensor) -> torch.Tensor:
    """int8 ``[outputs, inputs]``, an even number of these, as ``[panels, pairs, PANEL, 2]``."""
    return _whole_panels(levels).unflatten(2, (-1, 2)).transpose(1, 2).contiguous()


def bytes_of_panels(panels: torch.Tensor, outputs: int) -> torch.Tensor:
    """What :func:`bytes_in_panels` was given."""
    return panels.transpose(1, 2).flatten(2).flatten(0, 1)[:outputs].contiguous()


def nibbles_in_panels(levels: torch.Tensor) -> torch.Tensor:
    """uint8 0 … 15 ``[outputs, inputs]``, of whole panels and groups, as ``[panels, inputs / 4, PANEL, 2]``."""
    fours = _whole_panels(levels).unflatten(2, (-1, 2, 2)).permute(0, 2, 3, 1, 4)
    return (fours[:, :, 0] | (fours[:, :, 1] << 4)).contiguous()


def nibbles_of_panels(panels: torch.Tensor) -> torch.Tensor:
    """What :func:`nibbles_in_panels` was given."""
    return torch.stack([panels & 15, panels >> 4], dim=2).permute(0, 3, 1, 2, 4).flatten(2).flatten(0, 1)


def scales_in_panels(scales: torch.Tensor) -> torch.Tensor:
    """bfloat16 ``[groups, outputs, 2]`` as ``[panels, groups, 2, PANEL]``."""
    return scales.unflatten(1, (-1, PANEL)).permute(1, 0, 3, 2).contiguous()


def scales_of_panels(panels: torch.Tensor) -> torch.Tensor:
    """What :func:`scales_in_panels` was given."""
    return panels.permute(1, 0, 3, 2).flatten(1, 2)


def of_bytes(weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None) -> Panels:
    """A layer of what :func:`bytes_in_panels` made, and float32 ``scale[outputs]``."""
    return Panels(len(scale), 2 * weight.shape[1], BYTES, weight, scale, bias)


def of_nibbles(weight: torch.Tensor, scales: torch.Tensor, outputs: int, bias: torch.Tensor | None = None) -> Panels:
    """A layer of what :func:`nibbles_in_panels` and :func:`scales_in_panels` made."""
    return Panels(outputs, 4 * weight.shape[1], NIBBLES, weight, scales, bias)


def _whole_panels(weight: torch.Tensor) -> torch.Tensor:
    """``[outputs, inputs]`` as ``[panels, PANEL, inputs]``, filled up with zeros."""
    return functional.pad(weight, (0, 0, 0, -len(weight) % PANEL)).unflatten(0, (-1, PANEL))
