"""The experts that every token goes through, computed while other servers compute the routed ones.

Some families call their shared experts after the routed ones: then they are computed ahead, with what entered the
layer's mixture. Some call them before the router: then they are put off. Either way the numbers are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from swarm.models.experts.routed import RoutedExperts


def beside_routed(mixture: nn.Module, routed: RoutedExperts) -> None:
    """Let shared experts be computed once `routed` has asked others, and before it waits for them.

    Args:
        mixture: transformers' module of a router, `routed`, and shared experts, if there are any.
    """
    for name, module in list(mixture.named_children()):
        if name.startswith("shared_") and not isinstance(module, nn.Linear):  # that would be their gate
            shared = _SharedExperts(module)
            setattr(mixture, name, shared)
            mixture.register_forward_pre_hook(shared.begin)
            routed.meanwhile = shared.compute


class _SharedExperts(nn.Module):
    """Takes the place of transformers' module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self._entered: torch.Tensor | None = None
        self._ahead: torch.Tensor | None = None
        self._put_off: _PutOff | None = None
        self._is_time = False

    def begin(self, _: nn.Module, entered: tuple[torch.Tensor, ...]) -> None:
        """The mixture begins."""
        self._entered = entered[0] if entered else None
        self._ahead = self._put_off = None
        self._is_time = False

    def compute(self) -> None:
        """It is time: others are computing, too."""
        self._is_time = True
        if self._put_off is not None:
            self._put_off.value()
            self._put_off = self._entered = None
        elif self._entered is not None:
            self._ahead = self.module(self._entered)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor | _PutOff:
        """
        Args:
            hidden_states: ``[..., hidden]``

        Returns:
            ``[..., hidden]``; before it is time, something that becomes this tensor when it is needed.
        """
        if not self._is_time:
            self._put_off = _PutOff(lambda: self.module(hidden_states))
            return self._put_off
        ahead, entered, self._ahead, self._entered = self._ahead, self._entered, None, None
        if ahead is not None and hidden_states is entered:
            return ahead
        outputs: torch.Tensor = self.module(hidden_states)
        return outputs


class _PutOff:
    """What a function will return, while it has not been called: whatever is done with this, as if it were the tensor,
    calls it. (No tensor by type: what torch imports for those is not there on servers, see :mod:`swarm.lean_imports`.)
    """

    def __init__(self, compute: Callable[[], torch.Tensor]) -> None:
        self._compute = compute
        self._value: torch.Tensor | None = None

    def value(self) -> torch.Tensor:
        """The tensor."""
        if self._value is None:
            self._value = self._compute()
        return self._value

    def __getattr__(self, name: str) -> Any:
        return getattr(self.value(), name)

    def __add__(self, other: Any) -> Any:
        return self.value() + other

    def __mul__(self, other: Any) -> Any:
        return self.value() * other

    def __getitem__(self, index: Any) -> Any:
        return self.value()[index]

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = tree_map_only(_PutOff, _PutOff.value, (args, kwargs or {}))
        return function(*args, **kwargs)
