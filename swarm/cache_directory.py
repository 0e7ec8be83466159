"""Where Swarm keeps what it can compute again: ``$SWARM_HOME``, else ``~/.cache/swarm``."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path


def swarm_home() -> Path:
    """The root of everything that Swarm writes by itself."""
    return Path(os.environ.get("SWARM_HOME") or Path.home() / ".cache" / "swarm")


def cache_directory(name: str) -> Path:
    """A directory of its own for one kind of file, made if need be."""
    directory = swarm_home() / name
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def write_atomically(path: Path, text: str) -> None:
    """Write a whole file or none; readers never see half of it. A full disk is not an error: it is only a cache."""
    _write_then_rename(path, lambda temporary: temporary.write_text(text))


def fill_directory_atomically(path: Path, fill: Callable[[Path], object]) -> None:
    """Let `fill` write into a directory that appears as `path` when it is complete. A full disk is not an error."""
    _write_then_rename(path, fill)


def _write_then_rename(path: Path, write: Callable[[Path], object]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        temporary.replace(path)
    except OSError:  # also when another process was faster and its directory is already there
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.unlink(missing_ok=True)
