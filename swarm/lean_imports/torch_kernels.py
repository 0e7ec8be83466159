"""Import torch without the kernels, written in Python, that it has for its meta device: 17 MB, and half a second.

Models are made on that device, for which torch has kernels in C++. The others are for compilers, and are
imported before the first of these is.

Import this before anything that imports torch.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from types import ModuleType

_KERNELS = "torch._meta_registrations"
_COMPILERS = ("torch._dynamo", "torch._inductor")


class _KernelsBeforeCompilers(MetaPathFinder):
    """Finds nothing, but sees what is imported."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        if name in _COMPILERS:
            sys.meta_path.remove(self)
            import_module(_KERNELS)


def _complete_generators() -> None:
    """Do what torch's random numbers need of those kernels; if it is another torch, import them after all."""
    try:
        from torch._opaque_base import OpaqueBaseMeta

        torch._C._set_generator_metaclass(OpaqueBaseMeta)
        torch.Generator()
    except (ImportError, AttributeError, RuntimeError):
        import_module(_KERNELS)


if "torch" not in sys.modules:
    sys.modules[_KERNELS] = ModuleType(_KERNELS)
    import torch

    del sys.modules[_KERNELS], torch._meta_registrations
    sys.meta_path.insert(0, _KernelsBeforeCompilers())
    _complete_generators()
