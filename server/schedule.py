"""Decide what the device does next. Pure: what waits in, what to run out.

Steps of a position or a few (decode, short prompts) of all sessions run as one batch: the weights are read once for all
of them. Where such steps and long prompts (prefill) wait for one another, they take turns, so that nobody's token waits
for more than one piece of somebody's prompt. What can wait (work for a standby) runs when nothing else is there. Within
each kind, first come, first served; as a session has one step here at a time, that is fair.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

MAX_TOGETHER = 64
"""Positions in one batch, of all its sequences."""


@dataclass(frozen=True)
class Waiting:
    """A piece of work that waits for the device."""

    positions: int = 1
    """Of all its sequences."""
    group: Hashable = None
    """Works of one group can run together; None: it runs alone."""
    can_wait: bool = False


def choose(waiting: Sequence[Waiting], *, after_together: bool) -> list[int]:
    """The indices of what to run now: one, or several as one batch.

    Args:
        waiting: in the order in which they came; not empty.
        after_together: what ran last was of a group.
    """
    urgent = [index for index, work in enumerate(waiting) if not work.can_wait]
    candidates = urgent or list(range(len(waiting)))
    grouped = [index for index in candidates if waiting[index].group is not None]
    alone = [index for index in candidates if waiting[index].group is None]
    if not grouped or (alone and after_together):
        return alone[:1]
    chosen: list[int] = []
    positions = 0
    for index in grouped:
        same = waiting[index].group == waiting[grouped[0]].group
        if same and (not chosen or positions + waiting[index].positions <= MAX_TOGETHER):
            chosen.append(index)
            positions += waiting[index].positions
    return chosen
