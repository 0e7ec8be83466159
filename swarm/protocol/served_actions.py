"""What a session asks of the server that holds it, and what it is told (:mod:`swarm.protocol.served_session`)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from swarm.protocol.messages import Link, Message, Recall, Replay, Step


@dataclass(frozen=True)
class Work:
    """New positions to run through the span."""

    position: int
    """Where they begin: roll the cache back to here first, then reorder its rows."""
    reorder: list[int] | None
    hidden_states: torch.Tensor
    """[batch, n, hidden]"""
    position_ids: torch.Tensor | None
    mask: torch.Tensor | None
    source: Step | Replay | Recall = field(repr=False)

    @property
    def recalled(self) -> int:
        """So many positions are not carried: begin anew, with what is known of the session's prefix."""
        return self.source.positions if isinstance(self.source, Recall) else 0

    @property
    def count(self) -> int:
        """Positions per sequence."""
        return self.recalled + self.hidden_states.shape[1]

    def split(self, count: int) -> list[Work]:
        """The same in parts of at most `count` positions per sequence, one to be run after the other."""
        if self.hidden_states.shape[1] <= count:
            return [self]
        parts = []
        for begin in range(0, self.hidden_states.shape[1], count):
            states, ids, mask = (
                tensor[:, begin : begin + count] if tensor is not None else None
                for tensor in (self.hidden_states, self.position_ids, self.mask)
            )
            assert states is not None
            reorder = self.reorder if begin == 0 else None
            parts.append(Work(self.position + begin, reorder, states, ids, mask, self.source))
        return parts


@dataclass(frozen=True)
class Compute:
    """Run `work` and report with :meth:`ServedSession.computed` or :meth:`ServedSession.failed`."""

    work: Work


@dataclass(frozen=True)
class Spent:
    """Seconds that computing a result took; see :class:`HopTime`."""

    queue_s: float = 0.0
    compute_s: float = 0.0
    experts_s: float = 0.0
    together: int = 1

    def and_then(self, other: Spent) -> Spent:
        """On both, one after the other."""
        return Spent(
            self.queue_s + other.queue_s,
            self.compute_s + other.compute_s,
            self.experts_s + other.experts_s,
            max(self.together, other.together),
        )


NOTHING_SPENT = Spent()


@dataclass(frozen=True)
class ToClient:
    """Send this to the client."""

    message: Message
    tensors: dict[str, torch.Tensor] | None = None


@dataclass(frozen=True)
class ToSuccessor:
    """Send this over a link."""

    link: int
    message: Message
    tensors: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Dial:
    """Connect to a successor and attach; report with ``link_opened`` or ``link_lost``."""

    link: Link


@dataclass(frozen=True)
class HangUp:
    """Close a link."""

    link: int


@dataclass(frozen=True)
class End:
    """The session is over: free everything."""


Action = Compute | ToClient | ToSuccessor | Dial | HangUp | End
