"""Whether servers may begin with the likeliest next token before it has been chosen.

A greedy choice is nearly always the token to which the logits give most, and so does a draft of the head in 8 bits
(:mod:`swarm.models.draft_head`), in a quarter of the time. Servers can then work while this machine makes the exact
logits and chooses: a token takes that much less. A wrong guess costs them a step for nothing, so only those may act who
have been right. What is generated is what was chosen, in any case.
"""

from __future__ import annotations

_FIRST_REQUIRED, _MOST_REQUIRED = 2, 64


class Foresight:
    """What was expected of one session, and how far that can be trusted."""

    def __init__(self) -> None:
        self._expected: int | None = None
        self._acted = False
        self._right = 0
        self._required = _FIRST_REQUIRED

    @property
    def is_trusted(self) -> bool:
        """Enough guesses in a row were right: two, and twice as many after every one that cost servers something."""
        return self._right >= self._required

    def expect(self, token: int) -> bool:
        """The next token will most likely be this; returns whether to act upon it."""
        self._expected, self._acted = token, self.is_trusted
        return self._acted

    def chosen(self, token: int) -> None:
        """The next token is this."""
        if self._expected == token:
            self._right += 1
        elif self._expected is not None:
            self._right = 0
            if self._acted:
                self._required = min(2 * self._required, _MOST_REQUIRED)
        self._expected = None
