"""The claim: what a server that is about to move says of it, so that servers do not all move at once.

A claim lives for seconds, and as long as it is renewed. It is no right: everybody judges by
:func:`swarm.placement.may_move` what follows from the claims that are alive.
"""

from __future__ import annotations

from typing import Self

import msgpack
from pydantic import BaseModel, ConfigDict, Field, model_validator

from swarm.dht.announcement import LEASE_S, PeerId, Rate
from swarm.dht.packing import unpacked
from swarm.placement import Move, Urgency

CLAIM_LEASE_S = LEASE_S
"""How long a claim is valid unless it is renewed: who died while it moved stands in nobody's way for longer."""
MAX_CLAIM_BYTES = 1024
"""A third of it suffices."""


class MoveClaim(BaseModel):
    """One server's record of the move that it wants to make, or is making."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    peer_id: PeerId
    model: str = Field(pattern=r"^[0-9a-f]{64}$")
    num_blocks: int = Field(ge=1, le=100_000)
    old: tuple[int, int]
    """The span ``[start, end)`` that it gives up."""
    new: tuple[int, int]
    urgency: Urgency
    gain: float = Field(ge=-1e15, le=1e15, allow_inf_nan=False)
    steps_per_s: Rate
    """Through the span that it gives up."""
    new_steps_per_s: Rate | None = None
    """Through the other one; None: as fast."""
    is_focus: bool = False
    """Both are in memory."""
    issued_at: float = Field(allow_inf_nan=False)
    """Unix time."""

    @model_validator(mode="after")
    def _check_spans(self) -> Self:
        for start, end in (self.old, self.new):
            if not 0 <= start < end <= self.num_blocks:
                raise ValueError(f"[{start}, {end}) is not a span of {self.num_blocks} blocks")
        return self

    @classmethod
    def of(cls, move: Move, model: str, num_blocks: int, issued_at: float) -> MoveClaim:
        """What is to be published of `move`."""
        return cls(
            peer_id=move.peer_id,
            model=model,
            num_blocks=num_blocks,
            old=move.old,
            new=move.new,
            urgency=move.urgency,
            gain=move.gain,
            steps_per_s=move.steps_per_s,
            new_steps_per_s=move.new_steps_per_s,
            is_focus=move.is_focus,
            issued_at=issued_at,
        )

    @property
    def move(self) -> Move:
        """As placement takes it."""
        faster = self.steps_per_s if self.new_steps_per_s is None else self.new_steps_per_s
        return Move(
            self.peer_id, self.old, self.new, self.urgency, self.gain, self.steps_per_s, faster, self.is_focus
        )  # fmt: skip

    def pack(self) -> bytes:
        """As msgpack."""
        packed: bytes = msgpack.packb(self.model_dump(mode="json"), use_bin_type=True)
        return packed

    @classmethod
    def unpack(cls, packed: bytes) -> MoveClaim:
        """Raises ValueError for anything that is not a claim."""
        if len(packed) > MAX_CLAIM_BYTES:
            raise ValueError(f"{len(packed)} bytes are too many for a claim")
        return unpacked(cls, packed, "a claim")


def moves_key(model: str) -> str:
    """The DHT key under which the servers of a model claim their moves, each under its peer id as subkey."""
    return f"swarm/1/moves/{model}"
