"""Where Swarm keeps what it can compute again: ``$SWARM_HOME``, else ``~/.cache/swarm``."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

logger = logging.getLogger(__name__)

_PATIENCE_S = 60.0
"""After this, somebody who should have computed something is not waited for any more: perhaps it is stopped."""


_of_thread = threading.local()


def swarm_home() -> Path:
    """The root of everything that Swarm writes by itself."""
    return Path(os.environ.get("SWARM_HOME") or Path.home() / ".cache" / "swarm")


def cache_directory(name: str) -> Path:
    """A directory of its own for one kind of file; it is made when something is written to it."""
    return swarm_home() / name


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a whole file or none; readers never see half of it. A full disk is a warning: it is only a cache."""
    data = content.encode() if isinstance(content, str) else content
    _write_then_rename(path, lambda temporary: temporary.write_bytes(data))


def fill_directory_atomically(path: Path, fill: Callable[[Path], object]) -> None:
    """Let `fill` write into a directory that appears as `path` when it is complete. A full disk is a warning."""
    _write_then_rename(path, fill)


@contextlib.contextmanager
def alone_in(directory: Path) -> Iterator[None]:
    """While something of `directory` is looked for, and made: others on this machine wait, and then find it.

    So servers that start together compute nothing twice, and measure nothing while others measure. A thread that is
    alone there already goes on at once.
    """
    held = _of_thread.__dict__.setdefault("held", set[Path]())
    if directory in held:
        yield
        return
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # a cache that cannot be written to is a cache that nobody shares
            directory.mkdir(parents=True, exist_ok=True)
            opened = os.open(directory, os.O_RDONLY)
            stack.callback(os.close, opened)
            _lock(opened)
        held.add(directory)
        stack.callback(held.discard, directory)
        yield


def _lock(opened: int) -> None:
    """Lock it until it is closed; or do without, if somebody else does not let go of it."""
    given_up_at = time.monotonic() + _PATIENCE_S
    while time.monotonic() < given_up_at:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            time.sleep(0.02)


def _write_then_rename(path: Path, write: Callable[[Path], object]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        temporary.replace(path)
    except Exception as error:
        # The tokenizers library raises a bare Exception for a full disk.
        if not isinstance(error, OSError) and type(error) is not Exception:
            raise
        if getattr(error, "errno", None) not in (errno.EEXIST, errno.ENOTEMPTY):  # another process was faster
            logger.warning("%s could not be kept, and will be computed again next time: %s", path, error)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        with contextlib.suppress(OSError):
            temporary.unlink()
