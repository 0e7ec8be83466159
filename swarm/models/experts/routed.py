"""The module that stands where a layer had its routed experts: it computes those that are here, and has the others
computed elsewhere.

What it returns does not depend on who computed what: every expert's output comes back unweighted, and a token's are
weighted and summed in the order in which the router chose them, as transformers does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import nn


class Elsewhere(Protocol):
    """Computes experts on other machines. Called on the thread that computes."""

    def begin(
        self, block: int, hidden_states: torch.Tensor, tokens: torch.Tensor, experts: torch.Tensor
    ) -> Callable[[], torch.Tensor]:
        """Begin to have ``experts[i]`` of `block` computed for the token ``tokens[i]``, for all i.

        Args:
            hidden_states: ``[tokens, hidden]``
            tokens: ``[n]`` int64, rows of `hidden_states`.
            experts: ``[n]`` int64

        Returns:
            A function that waits for the outputs, ``[n, hidden]``, not weighted. It raises ExpertsMissing if some
            expert is nowhere.
        """


class RoutedExperts(nn.Module):
    """Takes the place of transformers' module in one decoder layer.

    Attributes:
        elsewhere: where other experts are computed; None: while the machine's speed is being measured they count for
            nothing.
        meanwhile: called once others compute, and before they are waited for.
    """

    def __init__(self, block: int, count: int, kept: Sequence[int], here: nn.Module | None) -> None:
        """
        Args:
            count: experts of the block.
            kept: those that `here` computes, in ascending order.
            here: transformers' module with just those; None: there are none.
        """
        super().__init__()
        self.block, self.count, self.kept, self.here = block, count, tuple(sorted(kept)), here
        self.elsewhere: Elsewhere | None = None
        self.meanwhile: Callable[[], None] = lambda: None
        number_here = torch.full((count,), -1, dtype=torch.int64)
        number_here[list(self.kept)] = torch.arange(len(self.kept))
        self.register_buffer("_number_here", number_here, persistent=False)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """
        Args:
            hidden_states: ``[tokens, hidden]``
            top_k_index: ``[tokens, k]`` int64, the experts of each token.
            top_k_weights: ``[tokens, k]``

        Returns:
            ``[tokens, hidden]``
        """
        tokens, k = top_k_index.shape
        experts = top_k_index.reshape(-1)
        numbers = self._number_here.to(experts.device)[experts]  # -1: not here
        outputs = hidden_states.new_zeros(tokens * k, hidden_states.shape[-1])
        away = ((numbers < 0) & (top_k_weights.reshape(-1) != 0)).nonzero().flatten()
        finish = None
        if len(away) and self.elsewhere is not None:
            finish = self.elsewhere.begin(self.block, hidden_states, away // k, experts[away])
        here = (numbers >= 0).nonzero().flatten()
        if len(here) and self.here is not None:
            outputs[here] = compute_rows(self.here, hidden_states[here // k], numbers[here])
        self.meanwhile()
        if finish is not None:
            outputs[away] = finish().to(outputs)
        weighted = outputs * top_k_weights.reshape(-1, 1)
        return weighted.view(tokens, k, -1).sum(dim=1).to(hidden_states.dtype)


def compute_rows(module: nn.Module, hidden_states: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """What expert ``numbers[i]`` of transformers' `module` makes of ``hidden_states[i]``, not weighted.

    Args:
        hidden_states: ``[n, hidden]``
        numbers: ``[n]`` int64

    Returns:
        ``[n, hidden]``
    """
    ones = hidden_states.new_ones(len(numbers), 1)
    outputs: torch.Tensor = module(hidden_states, numbers[:, None], ones)
    return outputs


def keep_experts(module: nn.Module, kept: int) -> None:
    """Leave room in transformers' `module`, which is on the meta device, for so many experts."""
    count = int(module.num_experts)
    for name, weight in list(module.named_parameters(recurse=False)):
        if weight.shape[0] == count:
            setattr(module, name, nn.Parameter(weight.new_empty(kept, *weight.shape[1:]), requires_grad=False))
    module.num_experts = kept  # type: ignore[assignment]


def routed_experts(layers: Sequence[nn.Module]) -> list[RoutedExperts]:
    """All of ours in some decoder layers."""
    return [module for layer in layers for module in layer.modules() if isinstance(module, RoutedExperts)]
