"""Decide what the device does next. Pure: what waits in, what to run out.

Steps of a position or a few (decode, short prompts) of all sessions run as one batch: the weights are read once for all
of them. Where such steps and pieces of long prompts (prefill) wait for one another, they take turns: after a batch of
tokens, prompts have as much time as it took, and one piece at least (a piece that is known already takes next to none).
What can wait (work for a standby) runs when nothing else is there. Within each kind, first come, first served; as a
session has one step here at a time, that is fair.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

MAX_TOGETHER = 96
"""Positions in one batch, of all its sequences."""
MAX_SHORT = 8
"""Positions of a step that is no piece of a long prompt."""


@dataclass(frozen=True)
class Waiting:
    """A piece of work that waits for the device."""

    positions: int = 1
    """Of all its sequences."""
    group: Hashable = None
    """Works of one group can run together; None: it runs alone."""
    can_wait: bool = False

    @property
    def is_short(self) -> bool:
        """It can run together with others, and makes them no slower."""
        return self.group is not None and self.positions <= MAX_SHORT


def choose(waiting: Sequence[Waiting], *, prompts_first: bool) -> list[int]:
    """The indices of what to run now: one, or several as one batch.

    Args:
        waiting: in the order in which they came; not empty.
        prompts_first: it is not the turn of short steps.

    Returns:
        What it is done for first, and then what runs with it.
    """
    urgent = [index for index, work in enumerate(waiting) if not work.can_wait]
    candidates = urgent or list(range(len(waiting)))
    short = [index for index in candidates if waiting[index].is_short]
    long = [index for index in candidates if not waiting[index].is_short]
    first, *others = long + short if prompts_first else short + long
    chosen, positions = [first], waiting[first].positions
    for index in others if waiting[first].group is not None else ():
        same = waiting[index].group == waiting[first].group
        if same and positions + waiting[index].positions <= MAX_TOGETHER:
            chosen.append(index)
            positions += waiting[index].positions
    return chosen


def may_grow(waiting: Sequence[Waiting], company: int) -> bool:
    """Whether what waits is one batch that has room for more, and is of fewer works than the `company` expected."""
    if len(waiting) >= company or any(work.can_wait or work.group is None for work in waiting):
        return False
    return sum(work.positions for work in waiting) < MAX_TOGETHER
