"""Spans that lie side by side: halves, quarters, eighths … of the model, which nest in one another.

Where servers begin and end anywhere, the sum of their speeds is ragged, and each that leaves tears a hole that fits
nobody else. Of tiles, each is covered by the same servers over its whole length: one that comes fills up the slowest
tile, and no move is needed to make the swarm even.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from swarm.placement.coverage import Flags


def tile_lengths(num_blocks: int) -> list[int]:
    """How long tiles are, the longest first: the model, halves, quarters, …, rounded up."""
    lengths = [num_blocks]
    while lengths[-1] > 1:
        lengths.append(_half(lengths[-1]))
    return lengths


@lru_cache(maxsize=1024)
def tile_starts(length: int, num_blocks: int) -> Flags | None:
    """Where tiles of this length begin, ``[starts]``; None: no tile is so long.

    The two halves of a tile overlap by a block if its length is odd.
    """
    starts, whole = [0], num_blocks
    while whole > length:
        half = _half(whole)
        starts = [start for first in starts for start in (first, first + whole - half)]
        whole = half
    if whole != length:
        return None
    flags = np.zeros(num_blocks - length + 1, dtype=bool)
    flags[starts] = True
    flags.setflags(write=False)
    return flags


def _half(length: int) -> int:
    return -(-length // 2)
