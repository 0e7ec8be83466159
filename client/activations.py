"""What a session has sent into one span so far: enough to bring a replacement to the same state."""

from __future__ import annotations

import torch


class ActivationLog:
    """The hidden states at one block boundary, ``[batch, positions, hidden]``, in a buffer that doubles."""

    def __init__(self) -> None:
        self._buffer: torch.Tensor | None = None
        self._length = 0

    def __len__(self) -> int:
        """Positions kept."""
        return self._length

    def append(self, hidden_states: torch.Tensor) -> None:
        """Keep further positions."""
        batch, count, size = hidden_states.shape
        if count == 0:
            return
        needed = self._length + count
        if self._buffer is None or self._buffer.shape[1] < needed:
            grown = torch.empty(batch, max(needed, 2 * self._length, 64), size, dtype=hidden_states.dtype)
            if self._buffer is not None:
                grown[:, : self._length] = self._buffer[:, : self._length]
            self._buffer = grown
        self._buffer[:, self._length : needed] = hidden_states
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

    def since(self, position: int) -> torch.Tensor:
        """The positions from `position` on: a view."""
        assert self._buffer is not None
        return self._buffer[:, position : self._length]
