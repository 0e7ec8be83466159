"""Which blocks a server that joins should host."""

from __future__ import annotations

from collections.abc import Iterable


def choose_span(hosted: Iterable[tuple[int, int]], num_blocks: int, length: int) -> tuple[int, int]:
    """The `length` consecutive blocks that fewest servers host.

    Coverages are compared worst block first: a span that contains a block nobody hosts wins over any that
    does not; among equals the earliest wins, so that the choice is the same for everybody who knows the same.

    Args:
        hosted: the spans ``(start, end)`` of the servers that are there or joining.

    Returns:
        ``(start, end)`` with ``end - start == min(length, num_blocks)``.
    """
    if length < 1:
        raise ValueError("a server must host at least one block")
    coverage = [0] * num_blocks
    for start, end in hosted:
        for block in range(max(start, 0), min(end, num_blocks)):
            coverage[block] += 1
    length = min(length, num_blocks)
    starts = range(num_blocks - length + 1)
    best = min(starts, key=lambda start: (sorted(coverage[start : start + length]), start))
    return best, best + length
