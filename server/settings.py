"""What the owner of a server can choose."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from swarm.placement import MovePolicy
from swarm.server.experts.wanted import WantedExperts


@dataclass(frozen=True)
class ServerSettings:
    """Everything that ``swarm-server`` takes on its command line, with the same defaults."""

    model: str
    """Alias, directory, .gguf file or Hub id."""
    initial_peers: tuple[str, ...] = ()
    """Multiaddrs of peers to join through; none: begin a new swarm."""
    blocks: tuple[int, int] | None = None
    """The span to host; None: as many blocks as fit (with ``offload``: whose KV cache fits), where needed most."""
    num_blocks: int | None = None
    """With ``blocks=None``: host exactly this many."""
    experts_only: bool = False
    """Host routed experts of a mixture-of-experts model without their blocks."""
    experts: WantedExperts | None = None
    """The routed experts to host; None: all of the hosted blocks, or (``experts_only``) as many as fit, where they are
    needed most."""
    experts_deadline_s: float = 30.0
    """A step waits so long for experts that nobody hosts at the moment."""
    memory_bytes: int | None = None
    """What the server may use in all; None: 80% of what is free."""
    kv_tokens: int | None = None
    """Positions of KV cache to offer; None: what memory allows, up to 65,536."""
    device: str = "auto"
    dtype: torch.dtype | None = None
    """Precision; None: that of the checkpoint."""
    quantization: str | None = None
    """Hold the weights as ``"int8"``; None: as they are."""
    offload: bool = False
    """Host also what does not fit in memory, and read it from disk at every step."""
    threads: int | None = None
    """CPU threads to compute with; None: torch's choice."""
    measure_again: bool = False
    """Measure this machine's speed even if it is known from an earlier start."""
    listen: tuple[str, ...] = ("/ip4/0.0.0.0/tcp/0",)
    announce: tuple[str, ...] = ()
    public_network: bool = True
    """Open the NAT, use relays: off for swarms on one machine or network."""
    identity: Path | None = None
    """Key file; None: a new identity for every run."""
    public_name: str = ""
    revision: str | None = None
    allow_untested_family: bool = False
    max_sessions: int = 256
    reuses_prompts: bool = True
    """Beginnings that several sessions have in common are computed once."""
    idle_timeout_s: float = 60.0
    """A client that says nothing for this long has gone."""
    drain_timeout_s: float = 10.0
    """How long a leaving server waits for its sessions to move."""
    rebalances: bool = True
    """With ``blocks=None``: move to other blocks when that is much better for everybody."""
    rebalance_interval_s: float = 20.0
    """How often it looks whether to move, give or take a half."""
    claim_wait_s: float = 3.0
    """So long after it has claimed a move, others must have seen the claim."""
    settle_wait_s: float = 1.5
    """A server that joins looks so long who else does, before it loads."""
    failed_move_pause_s: float = 600.0
    """It does not try to move for so long after a move that failed; twice as long after the next."""
    move_policy: MovePolicy = field(default_factory=MovePolicy)
    """What moves cost, and what they must bring."""
