"""Where the time of a step went: what servers said of themselves, and what is left for the network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from swarm.protocol.messages import HopTime


@dataclass(frozen=True)
class HopTiming:
    """The part of one server in a step, in seconds."""

    peer_id: str
    start: int
    end: int
    queue_s: float
    """Waited for the device."""
    compute_s: float
    """The device worked on it."""
    compute_share_s: float
    """Of that, this session's part: where the device worked on several sessions at once, each has an equal part."""
    network_s: float
    """The way there (for the last server also the way back): this server's share of the time that no server accounts
    for, in proportion to what the links' pings took."""
    experts_s: float = 0.0
    """Of `compute_s`: the server waited for servers of experts."""
    relayed: bool = False
    """It came through the client, because the server before it could not dial this one."""
    codec: str | None = None
    """How the result was sent on; None: losslessly."""
    degraded: bool = False
    """Experts were left out, now or earlier in this session."""

    @property
    def total_s(self) -> float:
        return self.network_s + self.queue_s + self.compute_s


@dataclass(frozen=True, eq=False)
class StepTiming:
    """A step, from the client's call to its result, in seconds."""

    total_s: float
    pieces: Sequence[Sequence[HopTime]] = field(default=(), repr=False)
    """What the servers said, for every piece of the step."""
    peers: Mapping[int, str] = field(default_factory=dict, repr=False)
    """The server that begins at each block."""
    ways_s: Mapping[int, float] = field(default_factory=dict, repr=False)
    """From the client to the server that begins at each block, one way."""

    @cached_property  # of most steps nobody asks
    def hops(self) -> tuple[HopTiming, ...]:
        """Server by server: :attr:`total_s`, divided among them."""
        hops = [hop for hop in (self.pieces[-1] if self.pieces else ()) if hop.start in self.peers]
        of_hop = {hop.start: [one for step in self.pieces for one in step if one.start == hop.start] for hop in hops}
        queue_s = {start: sum(one.queue_s for one in of_it) for start, of_it in of_hop.items()}
        compute_s = {start: sum(one.compute_s for one in of_it) for start, of_it in of_hop.items()}
        shares_s = {start: sum(one.compute_s / one.together for one in of_it) for start, of_it in of_hop.items()}
        rest_s = max(0.0, self.total_s - sum(queue_s.values()) - sum(compute_s.values()))
        ways, before = [], None
        for hop in hops:
            from_client = self.ways_s.get(hop.start, 0.0)
            if before is None:
                ways.append(from_client)
            else:
                ways.append(
                    before.link_s if before.link_s is not None else self.ways_s.get(before.start, 0.0) + from_client
                )
            before = hop
        if hops:
            ways[-1] += self.ways_s.get(hops[-1].start, 0.0)
        known = min((way for way in ways if way), default=1.0)
        ways = [way or known for way in ways]  # no ping has come back yet
        whole = sum(ways)
        return tuple(
            HopTiming(
                self.peers[hop.start],
                hop.start,
                hop.end,
                queue_s[hop.start],
                compute_s[hop.start],
                shares_s[hop.start],
                rest_s * way / whole,
                sum(one.experts_s for one in of_hop[hop.start]),
                relayed=index > 0 and hops[index - 1].link_s is None,
                codec=hop.codec,
                degraded=any(one.degraded for one in of_hop[hop.start]),
            )
            for index, (hop, way) in enumerate(zip(hops, ways, strict=True))
        )

    @property
    def degraded(self) -> bool:
        """Experts were left out: the output is not the model's (only with ``allow_degraded=True``)."""
        return any(hop.degraded for hop in self.hops)
