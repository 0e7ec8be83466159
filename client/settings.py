"""What a user of the network can choose."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ClientSettings:
    """How a client looks for servers and how patient it is. All times in seconds."""

    initial_peers: tuple[str, ...] = ()
    """Multiaddrs of peers to join through."""
    deadline_s: float = 60.0
    """How long to look for a server for a block that has none, before giving up with an error."""
    peer_timeout_s: float = 5.0
    """A server that leaves a ping unanswered for this long is taken for dead."""
    connect_timeout_s: float = 5.0
    allowed_servers: tuple[str, ...] | None = None
    """Use only these peer ids."""
    blocked_servers: tuple[str, ...] = ()
    """Never use these peer ids."""
    any_precision: bool = False
    """Also use servers that compute in another precision than the client's; output may then differ from local."""
