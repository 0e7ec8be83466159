"""Whether servers may begin with the likeliest next token before it has been chosen.

A greedy choice is nearly always the token to which the logits give most. Which one that is, a head can say before it
hands over its logits, and a draft of it before it has made any (:mod:`swarm.models.draft_head`). Servers then work
while this machine makes exact logits and chooses: a token takes that much less. A wrong guess costs them a step for
nothing, so only who has been right may act. What is generated is what was chosen, in any case.
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
