"""Spare every start of a program the second in which transformers reads the sources of all its model families.

It reads some 2,000 files, and twice, to learn which of them defines what. That depends on nothing but its release, so
the answer is kept in the cache directory. If it isn't there, or is damaged, or the release is somebody's working copy,
transformers reads the files as ever.

Import this before transformers (``import swarm`` does).
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

from swarm.cache_directory import cache_directory, write_atomically

_MODULE, _FUNCTION = "transformers.utils.import_utils", "create_import_structure_from_path"
_ALL_MODELS = os.path.join("transformers", "models")  # noqa: PTH118

Index = dict[Any, Any]
"""Names of directories and modules, or sets of what they need (frozensets), each with an index of its own, or with the
set of names that it defines."""


def remember_index() -> None:
    """Let transformers, when it is imported, look up what was learned before."""
    if _MODULE not in sys.modules and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def to_json(index: Index) -> list[Any]:
    """Pairs of keys and values; sets are sorted lists."""
    return [
        [
            sorted(key) if isinstance(key, frozenset) else key,
            {"in": to_json(value)} if isinstance(value, dict) else sorted(value),
        ]
        for key, value in index.items()
    ]


def from_json(pairs: Any) -> Index:
    """What :func:`to_json` was given.

    Raises:
        TypeError, ValueError, KeyError: it was given nothing of the kind.
    """
    index: Index = {}
    for key, value in pairs:
        inner = from_json(value["in"]) if isinstance(value, dict) else set(_names(value))
        index[key if isinstance(key, str) else frozenset(_names(key))] = inner
    return index


class _Finder(MetaPathFinder):
    """Finds one module, once, as it would be found anyway."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        read = getattr(module, _FUNCTION, None)
        release = getattr(sys.modules.get("transformers"), "__version__", "")
        if read is not None and release and "dev" not in release:
            setattr(module, _FUNCTION, _remembering(read, release))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


def _remembering(read: Callable[[Any], Index], release: str) -> Callable[[Any], Index]:
    known: dict[str, Index] = {}
    is_reading = False

    def remembered(module_path: str | os.PathLike[str]) -> Index:
        nonlocal is_reading
        directory = os.fspath(module_path)
        directory = os.path.dirname(directory) if directory.endswith(".py") else directory  # noqa: PTH120
        if is_reading or not directory.endswith(_ALL_MODELS):
            return read(module_path)
        if directory not in known:
            is_reading = True
            try:
                known[directory] = _kept(directory, release, read)
            finally:
                is_reading = False
        return known[directory]

    return remembered


def _kept(directory: str, release: str, read: Callable[[Any], Index]) -> Index:
    digest = hashlib.sha256(f"{release} {directory}".encode()).hexdigest()
    file = cache_directory("transformers") / f"{digest[:24]}.json"
    try:
        return from_json(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError, KeyError):
        index = read(directory)
        write_atomically(file, json.dumps(to_json(index)))
        return index


def _names(value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ValueError("this is no list of names")
    return value
