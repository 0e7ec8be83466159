"""For which of its experts a server is asked, lately: newcomers take those of which there is the greatest need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from swarm.dht.expert_announcement import MAX_HEATS, heat_of

HALF_LIFE_S = 600.0
"""What was asked so long ago counts half."""


class Asked:
    """Tokens by hosted expert. Times are in seconds of any one clock."""

    def __init__(self, hosted: Mapping[int, Sequence[int]], now: float) -> None:
        """
        Args:
            hosted: by block, in ascending order.
        """
        self._hosted: dict[int, NDArray[np.int64]] = {}
        self._tokens: dict[int, NDArray[np.float64]] = {}
        self._faded_at = now
        for block, experts in hosted.items():
            self.host(block, experts)

    def host(self, block: int, experts: Sequence[int]) -> None:
        """From now on these of `block`, in ascending order; none: it is not hosted any more."""
        self._hosted.pop(block, None)
        self._tokens.pop(block, None)
        if experts:
            self._hosted[block], self._tokens[block] = np.asarray(experts), np.zeros(len(experts))

    def count(self, block: int, experts: NDArray[np.int64], now: float) -> None:
        """A call: ``[n]``, experts of `block`, one for each token that is sent to it, that were hosted when it came."""
        self._fade(now)
        if not np.isin(experts, self._hosted.get(block, ())).all():
            return
        np.add.at(self._tokens[block], np.searchsorted(self._hosted[block], experts), 1.0)

    def heats(self, now: float) -> dict[int, bytes]:
        """As they are announced, of blocks that were asked for lately, as far as a record has room."""
        self._fade(now)
        heats: dict[int, bytes] = {}
        room = MAX_HEATS
        for block, tokens in self._tokens.items():
            heat = bytes(heat_of(float(count)) for count in tokens)
            if any(heat) and len(heat) <= room:
                heats[block] = heat
                room -= len(heat)
        return heats

    def _fade(self, now: float) -> None:
        if now - self._faded_at < 1.0:
            return
        share = 0.5 ** ((now - self._faded_at) / HALF_LIFE_S)
        for tokens in self._tokens.values():
            tokens *= share
        self._faded_at = now
