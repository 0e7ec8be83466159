"""A streamer for ``generate()`` that notes when tokens come."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class TokenTimes:
    """Give it to ``generate(streamer=…)``; once for each answer."""

    on_token: Callable[[int], object] = lambda _: None
    """Called with the number of tokens so far, the prompt not counted."""
    times: list[float] = field(default_factory=list)
    """Of the prompt, and of every token, by ``time.monotonic()``."""

    def put(self, value: object) -> None:
        """(streamer) A token, or first the prompt."""
        self.times.append(time.monotonic())
        if len(self.times) > 1:
            self.on_token(len(self.times) - 1)

    def end(self) -> None:
        """(streamer)"""

    @property
    def first_s(self) -> float:
        """From the prompt to the first token."""
        return self.times[1] - self.times[0]

    @property
    def gaps_s(self) -> list[float]:
        """Between one token and the next."""
        return [later - earlier for earlier, later in itertools.pairwise(self.times[1:])]

    @property
    def step_s(self) -> float:
        """The median gap, but for the first, which may still be of the prompt's time."""
        return statistics.median(self.gaps_s[1:])
