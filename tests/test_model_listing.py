"""Which models a swarm has: servers list them; what is forged is refused, what is withdrawn is gone."""

from __future__ import annotations

import time
from pathlib import Path

import msgpack
import pytest

from swarm.dht import LEASE_S, Directory, ModelListing
from swarm.dht.announcement import directory_key
from swarm.dht.model_listing import LISTING_LEASE_S, MAX_LISTING_BYTES, MODELS_KEY, expert_runs
from swarm.dht.validation import AnnouncementValidator
from swarm.transport.identity import Identity
from swarm.transport.lean_hivemind import DHTID, DHTRecord
from swarm.transport.node import Node
from tests.synthetic_swarm import span

MODEL = "ab" * 32
KEY = DHTID.generate(source=MODELS_KEY).to_bytes()


def listing(peer_id: str, **changes: object) -> ModelListing:
    fields = {"peer_id": peer_id, "model": MODEL, "model_name": "sea", "num_blocks": 30, "issued_at": time.time()}
    return ModelListing.model_validate({**fields, **changes})


def record(
    identity: Identity, said: bytes, lease_s: float = LISTING_LEASE_S, subkey: str | None = None, key: bytes = KEY
) -> DHTRecord:
    """Signed by `identity`, whatever it says."""
    expires_at = time.time() + lease_s
    packed_subkey = msgpack.packb(subkey or identity.peer_id)
    unsigned = DHTRecord(key, packed_subkey, msgpack.packb(said), expires_at)
    return DHTRecord(key, packed_subkey, AnnouncementValidator(identity).sign_value(unsigned), expires_at)


@pytest.fixture
def me(tmp_path: Path) -> Identity:
    return Identity.load_or_create(tmp_path / "me.key")


@pytest.fixture
def other(tmp_path: Path) -> Identity:
    return Identity.load_or_create(tmp_path / "other.key")


@pytest.mark.parametrize(
    "forgery",
    ["none", "another's name", "other peer inside", "a model's key", "too long a lease",
     "an announcement with a listing's lease", "none: an announcement",
     "huge", "bad schema", "no msgpack", "experts of no block"],
)  # fmt: skip
def test_a_forged_listing_is_refused(forgery: str, me: Identity, other: Identity) -> None:
    said, honest = listing(me.peer_id), listing(other.peer_id)
    announced = span(0, "sea", 30, 0, 30, peer_id=me.peer_id).model_copy(update={"model": MODEL}).pack()
    servers_key = DHTID.generate(source=directory_key(MODEL)).to_bytes()
    records = {
        "none": record(me, said.pack()),
        "another's name": record(me, honest.pack(), subkey=other.peer_id),
        "other peer inside": record(me, honest.pack()),
        "a model's key": record(me, said.pack(), LEASE_S, key=servers_key),
        "too long a lease": record(me, said.pack(), LISTING_LEASE_S + 60),
        "an announcement with a listing's lease": record(me, announced, LISTING_LEASE_S, key=servers_key),
        "none: an announcement": record(me, announced, LEASE_S, key=servers_key),
        "huge": record(me, msgpack.packb({**said.model_dump(), "more": "x" * MAX_LISTING_BYTES})),
        "bad schema": record(me, msgpack.packb({**said.model_dump(), "model": "DROP TABLE"})),
        "no msgpack": record(me, b"\xc1" * 100),
        "experts of no block": record(me, msgpack.packb({**said.model_dump(), "experts": [[0, 31, 8]]})),
    }
    assert AnnouncementValidator(other).validate(records[forgery]) == forgery.startswith("none")


def test_experts_are_told_in_runs() -> None:
    assert expert_runs({1: 8, 2: 8, 3: 16, 5: 16}) == ((1, 3, 8), (3, 4, 16), (5, 6, 16))
    told = listing("12D3KooW1", experts=expert_runs(dict.fromkeys(range(30), 128)))
    assert ModelListing.unpack(told.pack()) == told
    assert len(told.pack()) < 256


async def test_who_knows_of_no_model_finds_those_that_are_listed_and_not_those_that_are_withdrawn() -> None:
    loopback = ["/ip4/127.0.0.1/tcp/0"]
    first, second = await Node.start(listen=loopback), await Node.start(listen=loopback)
    try:
        keeper = await Directory.join(first, [])
        server = await Directory.join(second, await first.addresses())
        mine = listing(second.peer_id)
        assert await server.list_model(mine)
        assert [one.model_name for one in await keeper.models()] == ["sea"]
        assert await server.list_model(mine.model_copy(update={"withdrawn": True}))
        assert await keeper.models() == []
        await server.leave()
        await keeper.leave()
    finally:
        await second.stop()
        await first.stop()
