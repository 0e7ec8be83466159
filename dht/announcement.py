"""The announcement: what a server says of itself, and the checks that a stranger's record must pass.

An announcement is small on purpose (signed, under 1 KiB for a server of 16 blocks, 17 bytes more for each
further one, at most 640 more for the ways to other servers): a client that looks for a model reads those of all its
servers.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Self

import msgpack
from pydantic import BaseModel, ConfigDict, Field, model_validator

from swarm.dht.packing import unpacked

LEASE_S = 12.0
"""How long an announcement is valid: a server that crashed is forgotten within this time."""
RENEWAL_S = 4.0
"""How often a server announces itself anew: two renewals may be lost before anyone forgets it."""
CLOCK_SLACK_S = 3.0
"""How far peers' clocks may differ (hivemind's own limit)."""
MAX_RECORD_BYTES = 8 * 1024
MAX_RTTS = 8
MAX_BATCH_SIZES = 8

Rate = Annotated[float, Field(ge=0, le=1e15, allow_inf_nan=False)]
"""Of anything per second."""
PeerId = Annotated[str, Field(pattern=r"^[1-9A-HJ-NP-Za-km-z]{1,64}$")]
"""In base58; nothing that could play with a terminal."""


class State(StrEnum):
    """Where a server is in its life."""

    JOINING = "joining"
    """It is loading its blocks and will serve soon."""
    ONLINE = "online"
    DRAINING = "draining"
    """It finishes its sessions and takes no new one."""
    OFFLINE = "offline"
    """It has left. Stored instead of a deletion, which a DHT does not have."""


class Announcement(BaseModel):
    """One server's record for one model."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    peer_id: str = Field(max_length=64)
    model: str = Field(pattern=r"^[0-9a-f]{64}$")
    """The digest that names the model."""
    model_name: str = Field(default="", max_length=96)
    """What the server's owner calls the model; for people."""
    state: State
    num_blocks: int = Field(ge=1, le=100_000)
    start: int = Field(ge=0)
    end: int = Field(ge=1)
    """The span is ``[start, end)``."""
    loaded: tuple[int, int] | None = None
    """All that is in memory, if that is more than the span: the server may host another part a moment later."""
    block_digests: tuple[str, ...] = Field(default=(), max_length=1000)
    """The first 16 hex digits of each hosted block's digest, or nothing."""
    dtype: str = Field(max_length=16)
    """The precision in which the server computes."""
    quantization: str = Field(default="", max_length=16)
    """What its weights were quantized to, if they were."""
    kept_experts: dict[Annotated[int, Field(ge=0)], Annotated[str, Field(pattern=r"^([0-9a-f]{2}){0,512}$")]] = Field(
        default={}, max_length=1000
    )
    """Blocks of which not all routed experts are here, and a bitmap, in hexadecimal, of those that are
    (:mod:`swarm.dht.expert_announcement`); the server has the others computed elsewhere."""
    throughput: float = Field(ge=0, allow_inf_nan=False)
    """Decode steps per second through the whole span, one sequence, as measured by the server."""
    decode_steps_per_s: dict[Annotated[int, Field(ge=1, le=1024)], Rate] = Field(default={}, max_length=MAX_BATCH_SIZES)
    """Decode steps per second through the whole span when so many sessions are at work, all of theirs counted."""
    prefill_tokens_per_s: Rate | None = None
    """Positions per second of one prompt, through the whole span."""
    rtts_s: dict[PeerId, Annotated[float, Field(ge=0, le=3600, allow_inf_nan=False)]] = Field(
        default={}, max_length=MAX_RTTS
    )
    """Seconds of a round trip to servers with which it is likely to share sessions, likely successors first."""
    upload_bytes_per_s: Rate | None = None
    """To whichever of these servers took most; None: unknown, as for a server that is alone."""
    download_bytes_per_s: Rate | None = None
    """Likewise."""
    free_kv_tokens: int = Field(ge=0)
    """Positions of KV cache, on the whole span, that are not taken."""
    sessions: int = Field(default=0, ge=0)
    moves: int = Field(default=0, ge=0, le=1_000_000_000)
    """How often it has moved to other blocks since it joined."""
    tentative: bool = False
    """It has just come and looks around: it may still choose other blocks."""
    addresses: tuple[str, ...] = Field(default=(), max_length=8)
    version: str = Field(max_length=32)
    public_name: str = Field(default="", max_length=64)
    """What the owner wants to be called in public; empty unless they chose one."""
    issued_at: float = Field(allow_inf_nan=False)
    """Unix time at which the server wrote this; of two announcements the later one counts."""

    @model_validator(mode="after")
    def _check_span(self) -> Self:
        if not self.start < self.end <= self.num_blocks:
            raise ValueError(f"[{self.start}, {self.end}) is not a span of {self.num_blocks} blocks")
        if self.loaded is not None and not 0 <= self.loaded[0] <= self.start < self.end <= self.loaded[1]:
            raise ValueError(f"[{self.start}, {self.end}) is no part of what is loaded, {list(self.loaded)}")
        if self.in_memory[1] > self.num_blocks:
            raise ValueError(f"{self.in_memory[1]} blocks of {self.num_blocks} cannot be loaded")
        if self.block_digests and len(self.block_digests) != self.end - self.start:
            raise ValueError("there must be one digest for every hosted block")
        if any(len(text) > 128 for text in (*self.addresses, *self.block_digests)):
            raise ValueError("an address or digest is too long")
        return self

    @property
    def precision(self) -> str:
        """For people, and to compare: servers of unequal precision give unequal results."""
        return precision_name(self.dtype, self.quantization)

    @property
    def in_memory(self) -> tuple[int, int]:
        """The span, and what is loaded besides."""
        return self.loaded or (self.start, self.end)

    def hosts(self, block: int) -> bool:
        """Whether `block` lies in the span."""
        return self.start <= block < self.end

    def pack(self) -> bytes:
        """As msgpack; what is left out is the default."""
        packed: bytes = msgpack.packb(self.model_dump(mode="json", exclude_defaults=True), use_bin_type=True)
        return packed

    @classmethod
    def unpack(cls, packed: bytes) -> Announcement:
        """Raises ValueError for anything that is not an announcement."""
        return unpacked(cls, packed, "an announcement")


def precision_name(dtype: str, quantization: str) -> str:
    """How :attr:`Announcement.precision` names a precision."""
    return f"{quantization} weights, {dtype}" if quantization else dtype


def directory_key(model: str) -> str:
    """The DHT key under which the servers of a model announce themselves, each under its peer id as subkey."""
    return f"swarm/1/servers/{model}"
