"""Numbers of blocks and experts, for people: neighbours as a run, ``0–3, 7``."""

from __future__ import annotations

from collections.abc import Iterable


def runs(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """Ascending numbers as runs, first and last of each."""
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and found[-1][1] == number - 1:
            found[-1] = (found[-1][0], number)
        else:
            found.append((number, number))
    return found


def runs_text(found: Iterable[tuple[int, int]]) -> str:
    """``[(0, 3), (7, 7)]`` is ``0–3, 7``."""
    return ", ".join(str(first) if first == last else f"{first}–{last}" for first, last in found)
