"""Answers as bytes: made once a look however many ask, and compressed once."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from swarm.health.board import Board
from swarm.health.presenting import Snapshot
from swarm.health.views import View

_LEVEL = 4
_WORTH_COMPRESSING_BYTES = 1000
_MOST_KEPT = 256


@dataclass(frozen=True)
class Rendered:
    """A body."""

    etag: str
    body: bytes

    @cached_property
    def gzipped(self) -> bytes | None:
        """None: it is too short to be worth it."""
        return gzip.compress(self.body, _LEVEL, mtime=0) if len(self.body) >= _WORTH_COMPRESSING_BYTES else None


class Renderings:
    """Those of the latest look."""

    def __init__(self, board: Board) -> None:
        self._board, self._lock = board, threading.Lock()
        self._sequence = -1
        self._kept: dict[str, Rendered | None] = {}
        self._boot = f"{id(self):x}"
        """Sequences begin anew with every start of the dashboard."""

    def get(self, name: str, make: Callable[[Snapshot], View | None]) -> Rendered | None:
        """What `make` makes of the latest snapshot, as JSON; None if it does. It takes a while for the first to ask."""
        with self._lock:
            snapshot = self._board.latest
            if snapshot.sequence != self._sequence:
                self._sequence, self._kept = snapshot.sequence, {}
            if name not in self._kept:
                view = make(snapshot)
                if view is None:
                    return None
                if len(self._kept) >= _MOST_KEPT:
                    self._kept.clear()
                rendered = Rendered(f'"{self._boot}-{snapshot.sequence}"', view.model_dump_json().encode())
                _ = rendered.gzipped
                self._kept[name] = rendered
            return self._kept[name]
