"""Run blocks of which some experts are nowhere: routers then choose among the others. The result is another one than
the model's, and must be marked so.

Families' routers compute in ways of their own, but all of them begin with a product with a matrix that has one row for
each expert. There, while the block runs, experts that are missing get the score minus infinity.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from swarm.models.experts.routed import RoutedExperts


@contextlib.contextmanager
def without_experts(layers: tuple[nn.Module, ...], missing: Mapping[int, frozenset[int]]) -> Iterator[None]:
    """Meanwhile, routers of `layers` do not choose what is `missing`, by block.

    Raises:
        ValueError: a block's router was not found.
    """
    mode = _Masked()
    with contextlib.ExitStack() as stack:
        for layer in layers:
            for module in layer.modules():
                for child in module.children():
                    if isinstance(child, RoutedExperts) and missing.get(child.block):
                        mode.watch(stack, module, child, missing[child.block])
        stack.enter_context(mode)
        yield


class _Masked(TorchFunctionMode):
    """Masks the product of the router of the block that is running."""

    def __init__(self) -> None:
        super().__init__()
        self._running: tuple[torch.Size, list[int]] | None = None

    def watch(
        self, stack: contextlib.ExitStack, parent: nn.Module, experts: RoutedExperts, missing: frozenset[int]
    ) -> None:
        """Mask `missing` whenever `parent`, which holds a router and its `experts`, runs."""
        ours = {id(weight) for weight in experts.parameters()}
        shapes = {
            weight.shape
            for weight in parent.parameters()
            if id(weight) not in ours and weight.dim() == 2 and weight.shape[0] == experts.count
        }
        if len(shapes) != 1:
            raise ValueError(f"the router of block {experts.block} was not found: nothing can be left out")
        (shape,) = shapes

        def begin(*_: Any) -> None:
            self._running = (shape, sorted(missing))

        def end(*_: Any) -> None:
            self._running = None

        stack.callback(parent.register_forward_pre_hook(begin).remove)
        stack.callback(parent.register_forward_hook(end, always_call=True).remove)

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if function is torch.nn.functional.linear and self._running is not None:
            shape, missing = self._running
            weight = args[1] if len(args) > 1 else (kwargs or {}).get("weight")
            if weight is not None and weight.shape == shape:
                result = result.clone()
                result[..., missing] = float("-inf")
        return result
