"""What a session asks of whoever carries it out, and what it reports (:mod:`swarm.protocol.routed_session`)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from swarm.protocol.messages import HopTime, Message


@dataclass(frozen=True)
class Place:
    """A server, and the blocks ``[start, end)`` that it is to run."""

    peer_id: str
    start: int
    end: int
    addresses: tuple[str, ...] = ()


@dataclass(frozen=True)
class FindRoute:
    """Look for servers of ``[start, end)``; answer with ``route_found``."""

    start: int
    end: int


@dataclass(frozen=True)
class FindStandby:
    """Look for one more server of ``[start, end)``, none of `without`; answer with ``standby_found``."""

    hop: int
    start: int
    end: int
    without: frozenset[str]
    leaving: str | None
    """The server that is to be followed, if it has said that it leaves."""


@dataclass(frozen=True)
class OpenHop:
    """Dial a server and open a session on it; report its messages, or ``lost``."""

    hop: int
    place: Place
    token: str
    standby: bool
    prefix: tuple[bytes, ...] = ()
    """Names of the pages that will come first."""


@dataclass(frozen=True)
class ToHop:
    """Send this to a server."""

    hop: int
    message: Message
    tensors: dict[str, torch.Tensor] | None = None


@dataclass(frozen=True)
class CloseHop:
    """The session on a server is over."""

    hop: int


@dataclass(frozen=True)
class Delivered:
    """Step `sequence` has passed all blocks."""

    sequence: int
    hidden_states: torch.Tensor
    """``[batch, n, hidden]``: of the positions that were wanted"""
    hops: tuple[HopTime, ...]


@dataclass(frozen=True)
class Replaced:
    """The blocks of a server that was lost or left are served again. (One that never let the session in is not
    mentioned: nothing was lost with it.)"""

    place: Place
    reason: str
    lost_at: float | None
    """As given to ``lost``; None: it was followed by its standby between two steps, and nobody waited."""
    by_standby: bool


Action = FindRoute | FindStandby | OpenHop | ToHop | CloseHop | Delivered | Replaced
