"""What a user of the network can choose."""

from __future__ import annotations

from dataclasses import dataclass

from swarm.protocol.codec import CODECS
from swarm.routing import PROFILES


@dataclass(frozen=True)
class ClientSettings:
    """How a client looks for servers and how patient it is. All times in seconds."""

    initial_peers: tuple[str, ...] = ()
    """Multiaddrs of peers to join through."""
    deadline_s: float = 60.0
    """How long to look for a server for a block that has none, before giving up with an error. Waiting for room on
    servers that are merely full is not a part of it."""
    room_deadline_s: float | None = None
    """How long to wait for room on servers that are full; None: ten times `deadline_s`."""
    peer_timeout_s: float = 2.0
    """A server that leaves a ping unanswered for this long (and some of the link's round trips) is taken for dead."""
    chain: bool = True
    """Servers send straight to one another where they can; False: all passes through the client."""
    redundancy: int = 1
    """2: for every span a second server is kept up to date, which takes over at once when the first is lost."""
    activation_codec: str | None = None
    """How hidden states travel: ``"int8"``, ``"bfloat16"``, ``"float16"``; None: losslessly."""
    connect_timeout_s: float = 5.0
    allowed_servers: tuple[str, ...] | None = None
    """Use only these peer ids."""
    blocked_servers: tuple[str, ...] = ()
    """Never use these peer ids."""
    pinned_servers: tuple[str, ...] = ()
    """Blocks that any of these peer ids host are given to nobody else; if one cannot be used, that is an error."""
    profile: str | None = None
    """What sessions are reckoned to do when a route is chosen: ``"interactive"``, ``"long prompt"``, ``"batch"``,
    ``"training"``; None: what each session asks for (its length, prompt and number of sequences)."""
    reroute_every_s: float | None = None
    """How often, give or take a half, a session that works looks for a much better way; then it tells its positions to
    other servers before its next step, which takes a moment. None: it stays where it is until a server fails."""
    allow_degraded: bool = False
    """(mixtures of experts) Let servers leave out experts that nobody hosts, and choose the next best, rather than wait
    for them. Steps to which that happened say so (``session.last_step.degraded``): their output is not the model's."""
    quantization: str | None = None
    """Use only servers whose weights were quantized so (``"int8"``, …); None: only those that were not."""
    any_precision: bool = False
    """Also use servers that compute in another precision than the client's; output may then differ from local."""

    def __post_init__(self) -> None:
        if self.redundancy not in (1, 2):
            raise ValueError(f"redundancy={self.redundancy} is neither 1 nor 2")
        if self.activation_codec is not None and self.activation_codec not in CODECS:
            raise ValueError(f"activation_codec={self.activation_codec!r} is none of {', '.join(CODECS)}")
        if self.profile is not None and self.profile not in PROFILES:
            raise ValueError(f"profile={self.profile!r} is none of {', '.join(PROFILES)}")
        for peer_id in self.pinned_servers:
            if peer_id in self.blocked_servers:
                raise ValueError(f"{peer_id} is both pinned and blocked")
            if self.allowed_servers is not None and peer_id not in self.allowed_servers:
                raise ValueError(f"{peer_id} is pinned, but not among the allowed servers")

    @property
    def patience_for_room_s(self) -> float:
        """:attr:`room_deadline_s`, or its default."""
        return self.room_deadline_s if self.room_deadline_s is not None else 10 * self.deadline_s
