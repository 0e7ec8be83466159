"""What a server of experts says of itself: which experts of which blocks it hosts, as one bitmap a block."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Annotated, Self

import msgpack
from pydantic import BaseModel, ConfigDict, Field, model_validator

from swarm.dht.announcement import PeerId, Rate, State
from swarm.dht.packing import unpacked

MAX_EXPERTS = 4096
"""Of one block."""

MAX_HEATS = 4096
"""So many experts, at most, are announced with how hot they are, a byte each: a record has 8 KB."""
_STEPS_PER_DOUBLING = 8

Bitmap = Annotated[bytes, Field(min_length=1, max_length=MAX_EXPERTS // 8)]
"""Bit ``n % 8`` of byte ``n // 8`` (the lowest first): expert n is hosted."""


class ExpertAnnouncement(BaseModel):
    """One server's record of the experts of one model that it hosts."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    peer_id: PeerId
    model: str = Field(pattern=r"^[0-9a-f]{64}$")
    """The digest that names the model."""
    model_name: str = Field(default="", max_length=96)
    """What the server's owner calls the model; for people."""
    state: State
    bitmaps: dict[Annotated[int, Field(ge=0, le=100_000)], Bitmap] = Field(max_length=1000)
    """By block."""
    coming: dict[Annotated[int, Field(ge=0, le=100_000)], Bitmap] = Field(default={}, max_length=1000)
    """Likewise, all that it will host soon, and nothing else: it takes over what nobody hosts. Empty: it stays."""
    dtype: str = Field(max_length=16)
    """The precision in which the server computes."""
    tentative: bool = False
    """It has just come and looks around: it may still choose other experts."""
    room_bytes: int = Field(default=0, ge=0, le=1 << 60)
    """Of memory for experts: so that servers that come at once can all tell who will take what."""
    rows_per_s: Rate | None = None
    """Experts that it computes in a second, a token each, when many tokens come at once; by its own measurement."""
    calls_under_way: int = Field(default=0, ge=0)
    """How busy it is."""
    heats: dict[Annotated[int, Field(ge=0, le=100_000)], Annotated[bytes, Field(max_length=MAX_EXPERTS)]] = Field(
        default={}, max_length=1000
    )
    """By block, a byte for each hosted expert in ascending order: the tokens for which it was asked for lately, on a
    scale of logarithms (:func:`heat_of`). Blocks may be missing."""
    addresses: tuple[Annotated[str, Field(max_length=128)], ...] = Field(default=(), max_length=8)
    version: str = Field(max_length=32)
    public_name: str = Field(default="", max_length=64)
    """What the owner wants to be called in public; empty unless they chose one."""
    issued_at: float = Field(allow_inf_nan=False)
    """Unix time."""

    @model_validator(mode="after")
    def _check_bitmaps(self) -> Self:
        if not self.bitmaps or not all(map(any, self.bitmaps.values())):
            raise ValueError("a server of experts hosts at least one expert of every block that it names")
        hosted = {block: sum(byte.bit_count() for byte in bitmap) for block, bitmap in self.bitmaps.items()}
        if any(hosted.get(block) != len(heats) for block, heats in self.heats.items()):
            raise ValueError("heats are of other experts than those that are hosted")
        return self

    @property
    def experts(self) -> dict[int, frozenset[int]]:
        """What is hosted, by block."""
        return {block: experts_in(bitmap) for block, bitmap in self.bitmaps.items()}

    @property
    def experts_soon(self) -> dict[int, frozenset[int]]:
        """What is to be hosted, by block."""
        return {block: experts_in(bitmap) for block, bitmap in (self.coming or self.bitmaps).items()}

    @property
    def tokens_lately(self) -> dict[int, dict[int, float]]:
        """By block and expert: for how many tokens it was asked for, old ones counting less and less."""
        hosted = self.experts
        return {
            block: dict(zip(sorted(hosted[block]), map(tokens_of, heats), strict=True))
            for block, heats in self.heats.items()
        }

    def pack(self) -> bytes:
        """As msgpack; what is left out is the default."""
        packed: bytes = msgpack.packb(self.model_dump(exclude_defaults=True), use_bin_type=True)
        return packed

    @classmethod
    def unpack(cls, packed: bytes) -> ExpertAnnouncement:
        """Raises ValueError for anything that is not an announcement of experts."""
        return unpacked(cls, packed, "an announcement of experts", number_keys=True)


def heat_of(tokens: float) -> int:
    """As a byte: eight steps double it (or rather one more), so that figures up to 10⁹ come within 5%."""
    return min(round(_STEPS_PER_DOUBLING * math.log2(1.0 + max(0.0, tokens))), 255)


def tokens_of(heat: int) -> float:
    """The reverse."""
    return float(2.0 ** (heat / _STEPS_PER_DOUBLING) - 1.0)


def bitmaps_of(hosted: Mapping[int, Collection[int]]) -> dict[int, bytes]:
    """What is hosted, by block, as it is announced."""
    return {block: bitmap_of(experts) for block, experts in hosted.items()}


def bitmap_of(experts: Collection[int]) -> bytes:
    """With the bits of these experts set; no more bytes than are needed."""
    bits = sum(1 << expert for expert in set(experts))
    return bits.to_bytes((bits.bit_length() + 7) // 8, "little")


def experts_in(bitmap: bytes) -> frozenset[int]:
    """The experts whose bits are set."""
    bits = int.from_bytes(bitmap, "little")
    return frozenset(number for number in range(bits.bit_length()) if bits >> number & 1)


def experts_key(model: str) -> str:
    """The DHT key under which servers of a model's experts announce themselves, each under its peer id as subkey."""
    return f"swarm/1/experts/{model}"
