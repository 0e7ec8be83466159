"""The listing: a server's word that there is a model, so that somebody who knows of none finds all of a swarm's.

All listings are under one key. They change next to never, so their lease is long and renewing them costs next to
nothing: who wants to know what a model's servers do now looks these up under the model's own key.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Self

import msgpack
from pydantic import BaseModel, ConfigDict, Field, model_validator

from swarm.dht.announcement import PeerId
from swarm.dht.expert_announcement import MAX_EXPERTS
from swarm.dht.packing import unpacked

LISTING_LEASE_S = 120.0
"""How long a listing is valid unless it is renewed or withdrawn."""
LISTING_RENEWAL_S = 40.0
MAX_LISTING_BYTES = 2048
MODELS_KEY = "swarm/1/models"
"""The DHT key under which servers list the models that they host, each under its peer id as subkey."""

_Block = Annotated[int, Field(ge=0, le=100_000)]


class ModelListing(BaseModel):
    """One server's record of the model that it hosts."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    peer_id: PeerId
    model: str = Field(pattern=r"^[0-9a-f]{64}$")
    """The digest that names the model."""
    model_name: str = Field(default="", max_length=96)
    """What the server's owner calls the model; for people."""
    num_blocks: int = Field(ge=1, le=100_000)
    experts: tuple[tuple[_Block, _Block, Annotated[int, Field(ge=1, le=MAX_EXPERTS)]], ...] = Field(
        default=(), max_length=64
    )
    """``(start, end, count)``: the blocks ``[start, end)`` have so many routed experts each, of which not all are with
    their blocks; as far as this server knows."""
    withdrawn: bool = False
    """It has left. Stored instead of a deletion, which a DHT does not have."""
    issued_at: float = Field(allow_inf_nan=False)
    """Unix time."""

    @model_validator(mode="after")
    def _check_experts(self) -> Self:
        if any(not start < end <= self.num_blocks for start, end, _ in self.experts):
            raise ValueError("experts of blocks that the model does not have")
        return self

    def pack(self) -> bytes:
        """As msgpack; what is left out is the default."""
        packed: bytes = msgpack.packb(self.model_dump(mode="json", exclude_defaults=True), use_bin_type=True)
        return packed

    @classmethod
    def unpack(cls, packed: bytes) -> ModelListing:
        """Raises ValueError for anything that is not a listing."""
        if len(packed) > MAX_LISTING_BYTES:
            raise ValueError(f"{len(packed)} bytes are too many for a listing")
        return unpacked(cls, packed, "a listing")


def expert_runs(counts: Mapping[int, int]) -> tuple[tuple[int, int, int], ...]:
    """As :attr:`ModelListing.experts` from experts by block; what exceeds its limit is left out."""
    runs: list[tuple[int, int, int]] = []
    for block, count in sorted(counts.items()):
        if runs and runs[-1][1:] == (block, count):
            runs[-1] = (runs[-1][0], block + 1, count)
        else:
            runs.append((block, block + 1, count))
    return tuple(runs[:64])
