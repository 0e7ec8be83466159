"""Import transformers' model code without what a server or a client never runs: 110 MB.

These are SciPy (losses of object detectors), accelerate (loading to several devices), torch's distributed tensors with
SymPy (training on clusters) and torch's compiler (`torch._dynamo`), which transformers imports only to decorate some
functions. All are hidden while transformers is imported here, not afterwards: who needs the compiler later, gets it.

Import this before anything that imports models.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
import transformers.utils
import transformers.utils.import_utils

_COMPILER = "torch._dynamo"
_MASK_HELPER = f"{_COMPILER}._trace_wrapped_higher_order_op"


def _import_model_code() -> None:
    with contextlib.ExitStack() as hidden:
        for place in (transformers.utils, transformers.utils.import_utils):
            hidden.enter_context(_replaced(place, "is_scipy_available", _no))
            hidden.enter_context(_replaced(place, "is_accelerate_available", _no))
        hidden.enter_context(_replaced(torch.distributed, "is_available", _no))
        if _COMPILER not in sys.modules:
            hidden.enter_context(_replaced(torch.compiler, "disable", _leave_as_it_is))
            hidden.enter_context(_module(_COMPILER, _CompilerStandIn(_COMPILER)))
            hidden.enter_context(_module(_MASK_HELPER, _MaskHelperStandIn(_MASK_HELPER)))
        import_module("transformers.modeling_utils")
        import_module("transformers.masking_utils")
        import_module("transformers.generation.utils")


class _CompilerStandIn(ModuleType):
    """Every attribute is a decorator that does nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _leave_as_it_is


class _MaskHelperStandIn(ModuleType):
    """Makes the one thing that transformers takes from this module when it is used (for masks that few models have)."""

    @staticmethod
    def TransformGetItemToIndex() -> Any:
        from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

        return TransformGetItemToIndex()


def _no(*_: Any) -> bool:
    return False


def _leave_as_it_is(function: Callable[..., Any] | None = None, *_: Any, **__: Any) -> Any:
    return function if function is not None else _leave_as_it_is


@contextlib.contextmanager
def _replaced(place: Any, name: str, stand_in: object) -> Iterator[None]:
    before = getattr(place, name)
    setattr(place, name, stand_in)
    try:
        yield
    finally:
        setattr(place, name, before)


@contextlib.contextmanager
def _module(name: str, stand_in: ModuleType) -> Iterator[None]:
    sys.modules[name] = stand_in
    try:
        yield
    finally:
        del sys.modules[name]


if "transformers.modeling_utils" not in sys.modules:
    _import_model_code()
