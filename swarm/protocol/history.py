"""What went over one block boundary in a session so far: enough to bring a replacement to the same state."""

from __future__ import annotations

import torch

_MOST_AT_FIRST = 4096
"""Positions to make room for before anything has come."""


class GrowingTensor:
    """``[batch, positions, …]``, appended to along the positions, in a buffer that doubles."""

    def __init__(self, room: int = 64) -> None:
        """
        Args:
            room: positions of the first buffer.
        """
        self._room = room
        self._buffer: torch.Tensor | None = None
        self._length = 0

    def __len__(self) -> int:
        """Positions kept."""
        return self._length

    def append(self, more: torch.Tensor) -> None:
        """Keep further positions."""
        batch, count, *rest = more.shape
        if count == 0:
            return
        needed = self._length + count
        if self._buffer is None or self._buffer.shape[1] < needed:
            grown = torch.empty(batch, max(needed, 2 * self._length, self._room), *rest, dtype=more.dtype)
            if self._buffer is not None:
                grown[:, : self._length] = self._buffer[:, : self._length]
            self._buffer = grown
        self._buffer[:, self._length : needed] = more
        self._length = needed

    def truncate(self, position: int) -> None:
        """Forget the positions from `position` on."""
        self._length = min(self._length, position)
        if self._length == 0:
            self._buffer = None  # what follows may be other sequences

    def reorder(self, rows: torch.Tensor) -> None:
        """Row i goes on as what row ``rows[i]`` was; there may be more or fewer rows than before."""
        if self._buffer is not None:
            kept = self._buffer[:, : self._length].index_select(0, rows)
            self._buffer, self._length = None, 0
            self.append(kept)

    def between(self, begin: int, end: int) -> torch.Tensor:
        """The positions ``[begin, end)``: a view. ``0 <= begin < end <= len(self)``."""
        assert self._buffer is not None
        return self._buffer[:, begin:end]


class History:
    """Hidden states at a boundary, ``[batch, position, hidden]``, with the position ids and mask that go with them."""

    def __init__(self, expected: int = 64) -> None:
        """
        Args:
            expected: positions; more are kept as well.
        """
        self._hidden_states = GrowingTensor(min(expected, _MOST_AT_FIRST))
        self._position_ids = GrowingTensor()  # [batch, position] int64, once they were not the default
        self._mask = GrowingTensor()  # [batch, position] uint8, once anything was padded

    def __len__(self) -> int:
        """Positions kept."""
        return len(self._hidden_states)

    @property
    def batch(self) -> int:
        """Sequences kept; 0 while there is nothing."""
        return int(self._hidden_states.between(0, 1).shape[0]) if len(self) else 0

    def append(
        self, hidden_states: torch.Tensor, position_ids: torch.Tensor | None = None, mask: torch.Tensor | None = None
    ) -> None:
        """Keep further positions; ``None`` means the default: ids that count on, nothing padded."""
        batch, count, _ = hidden_states.shape
        begin = len(self)
        if position_ids is not None or len(self._position_ids):
            self._append_or_fill(self._position_ids, position_ids, torch.arange(begin + count), batch, begin)
        if mask is not None or len(self._mask):
            self._append_or_fill(self._mask, mask, torch.ones(begin + count, dtype=torch.uint8), batch, begin)
        self._hidden_states.append(hidden_states)

    def truncate(self, position: int) -> None:
        """Forget the positions from `position` on."""
        for kept in self._all():
            kept.truncate(position)

    def reorder(self, rows: torch.Tensor) -> None:
        """Row i goes on as what row ``rows[i]`` was; there may be more or fewer rows than before."""
        for kept in self._all():
            kept.reorder(rows)

    def between(self, begin: int, end: int, at_hand: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """The positions ``[begin, end)`` as the tensors of a step: copies, for they are written when time allows.

        Args:
            at_hand: their hidden states, if the caller has them: taken as they are.
        """
        states = at_hand if at_hand is not None else self._hidden_states.between(begin, end).clone()
        tensors = {"hidden_states": states}
        if len(self._position_ids):
            tensors["position_ids"] = self._position_ids.between(begin, end).clone()
        if len(self._mask):
            tensors["mask"] = self._mask.between(begin, end).clone()
        return tensors

    def _all(self) -> tuple[GrowingTensor, ...]:
        return self._hidden_states, self._position_ids, self._mask

    @staticmethod
    def _append_or_fill(
        kept: GrowingTensor, given: torch.Tensor | None, default: torch.Tensor, batch: int, begin: int
    ) -> None:
        if not len(kept) and begin:
            kept.append(default[:begin].expand(batch, begin))
        kept.append(default[begin:].expand(batch, -1) if given is None else given)
