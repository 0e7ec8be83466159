"""An attacker with a real node in the same DHT: nothing it forges is ever seen by a client."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import msgpack
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from swarm.dht import LEASE_S, Announcement, Directory, State
from swarm.dht.announcement import MAX_RECORD_BYTES, directory_key
from swarm.dht.validation import AnnouncementValidator
from swarm.transport.identity import Identity, verify
from swarm.transport.lean_hivemind import DHTID, DHTNode, DHTRecord, PeerID, crypto_pb2
from swarm.transport.node import Node

LOOPBACK = ["/ip4/127.0.0.1/tcp/0"]
MODEL, OTHER_MODEL = "ab" * 32, "cd" * 32
KEY = DHTID.generate(source=directory_key(MODEL))


@dataclass
class Scene:
    """A bootstrap peer, an honest server, a client, and an attacker whose DHT node checks nothing."""

    bootstrap: Node
    server: Node
    server_directory: Directory
    client: Directory
    attacker: Node
    attacker_dht: DHTNode

    async def seen(self) -> dict[str, Announcement]:
        return {one.peer_id: one for one in await self.client.servers(MODEL)}

    async def push(self, subkey: object, value: bytes, expires_at: float) -> None:
        """Have the attacker ask every honest node to store a record, and offer it itself to whoever asks."""
        self.attacker_dht.protocol.storage.store_subkey(KEY, subkey, value, expires_at)
        for node in (self.bootstrap, self.server):
            await self.attacker_dht.protocol.call_store(node.p2p.peer_id, [KEY], [value], [expires_at], [subkey])


@pytest.fixture
async def scene() -> AsyncIterator[Scene]:
    async with AsyncExitStack() as stack:

        async def node(client_only: bool = False) -> Node:
            started = await Node.start(listen=() if client_only else LOOPBACK, client_only=client_only)
            stack.push_async_callback(started.stop)
            return started

        bootstrap = await node()
        stack.push_async_callback((await Directory.join(bootstrap, [])).leave)
        peers = await bootstrap.addresses()
        server = await node()
        directory = await Directory.join(server, peers)
        stack.push_async_callback(directory.leave)
        attacker = await node()
        await attacker.bootstrap(peers)
        attacker_dht = await DHTNode.create(p2p=attacker.p2p, initial_peers=peers)
        stack.push_async_callback(attacker_dht.shutdown)
        client_node = await node(client_only=True)
        client = await Directory.join(client_node, peers, client_only=True)
        stack.push_async_callback(client.leave)
        yield Scene(bootstrap, server, directory, client, attacker, attacker_dht)


def announcement(peer_id: str, **changes: object) -> Announcement:
    fields = {
        "peer_id": peer_id, "model": MODEL, "state": State.ONLINE, "num_blocks": 4, "start": 0, "end": 4,
        "dtype": "float32", "throughput": 1.0, "free_kv_tokens": 7, "version": "0", "issued_at": time.time(),
    }  # fmt: skip
    return Announcement.model_validate({**fields, **changes})


def signed(
    identity: Identity | ForeignOwner, subkey: str, value: bytes, expires_at: float, key: bytes | None = None
) -> bytes:
    """`value` as the directory would store it, signed by `identity` (whoever that is)."""
    record = DHTRecord(key or KEY.to_bytes(), msgpack.packb(subkey), msgpack.packb(value), expires_at)
    return AnnouncementValidator(identity).sign_value(record)  # type: ignore[arg-type]


def signed_value(identity: Identity, expires_at: float) -> bytes:
    """An honest announcement."""
    return signed(identity, identity.peer_id, announcement(identity.peer_id).pack(), expires_at)


@dataclass
class ForeignOwner:
    """A peer whose key is of a type that libp2p knows and Swarm does not take."""

    peer_id: str
    sign: Callable[[bytes], bytes]

    def signed(self, expires_at: float) -> bytes:
        """A record that is right in everything but the type of its owner's key."""
        return signed(self, self.peer_id, announcement(self.peer_id).pack(), expires_at)


def foreign_owner(type_: str) -> ForeignOwner:
    """An identity by https://github.com/libp2p/specs/blob/master/peer-ids/peer-ids.md."""
    if type_ == "RSA":
        rsa_key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        public = public_key_message(
            0, rsa_key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        )
        peer_id = PeerID(b"\x12\x20" + hashlib.sha256(public).digest())
        return ForeignOwner(peer_id.to_base58(), lambda data: rsa_key.sign(data, padding.PKCS1v15(), hashes.SHA256()))
    if type_ == "Ed25519, as a hash":
        ed25519_key = Ed25519PrivateKey.generate()
        public = public_key_message(1, ed25519_key.public_key().public_bytes_raw())
        return ForeignOwner(PeerID(b"\x12\x20" + hashlib.sha256(public).digest()).to_base58(), ed25519_key.sign)
    number, curve = {"secp256k1": (2, ec.SECP256K1()), "ECDSA": (3, ec.SECP256R1())}[type_]
    ec_key = ec.generate_private_key(curve)
    encoding = (
        (Encoding.X962, PublicFormat.CompressedPoint)
        if number == 2
        else (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    )
    public = public_key_message(number, ec_key.public_key().public_bytes(*encoding))
    multihash = bytes((0, len(public))) + public if number == 2 else b"\x12\x20" + hashlib.sha256(public).digest()
    return ForeignOwner(PeerID(multihash).to_base58(), lambda data: ec_key.sign(data, ec.ECDSA(hashes.SHA256())))


def public_key_message(type_: int, data: bytes) -> bytes:
    return crypto_pb2.PublicKey(key_type=type_, data=data).SerializeToString()


def record(subkey: str, value: bytes, expires_at: float, key: bytes = KEY.to_bytes()) -> DHTRecord:
    return DHTRecord(key, msgpack.packb(subkey), value, expires_at)


@pytest.fixture
def validator(tmp_path: Path) -> AnnouncementValidator:
    return AnnouncementValidator(Identity.load_or_create(tmp_path / "identity.key"))


@pytest.mark.parametrize("type_", ["RSA", "secp256k1", "ECDSA", "Ed25519, as a hash"])
def test_only_ids_that_contain_an_ed25519_key_may_sign(type_: str, validator: AnnouncementValidator) -> None:
    owner, expires_at = foreign_owner(type_), time.time() + LEASE_S
    assert not verify(owner.peer_id, b"hello", owner.sign(b"hello"))
    assert not validator.validate(record(owner.peer_id, owner.signed(expires_at), expires_at))


@pytest.mark.parametrize("size", [0, 1, 63, 65, 256])
def test_a_signature_of_another_length_is_refused(size: int, tmp_path: Path, validator: AnnouncementValidator) -> None:
    identity, expires_at = Identity.load_or_create(tmp_path / "identity.key"), time.time() + LEASE_S
    value = msgpack.packb(announcement(identity.peer_id).pack())
    assert validator.validate(record(identity.peer_id, signed_value(identity, expires_at), expires_at))
    assert not validator.validate(record(identity.peer_id, msgpack.packb([value, bytes(size)]), expires_at))


@pytest.mark.parametrize("peer_id", ["", "1" * 52, "12D3KooW", "0OIl", "Ärger", "z" * 52, "12D3KooW" + "z" * 44])
def test_ids_that_are_none_are_refused(peer_id: str, tmp_path: Path, validator: AnnouncementValidator) -> None:
    identity, expires_at = Identity.load_or_create(tmp_path / "identity.key"), time.time() + LEASE_S
    assert not verify(peer_id, b"hello", identity.sign(b"hello"))
    value = signed(identity, peer_id, announcement(peer_id).pack(), expires_at)
    assert not validator.validate(record(peer_id, value, expires_at))


def test_an_id_of_a_megabyte_is_refused_without_decoding_it(tmp_path: Path, validator: AnnouncementValidator) -> None:
    """Decoding base58 takes time that grows with the square of its length: this one would take minutes."""
    identity, expires_at = Identity.load_or_create(tmp_path / "identity.key"), time.time() + LEASE_S
    endless = "z" * 1_000_000
    begun = time.monotonic()
    assert not verify(endless, b"hello", identity.sign(b"hello"))
    assert not validator.validate(record(endless, signed_value(identity, expires_at), expires_at))
    assert time.monotonic() - begun < 5


def test_nothing_of_a_record_over_the_limits_is_remembered(tmp_path: Path, validator: AnnouncementValidator) -> None:
    identity, expires_at = Identity.load_or_create(tmp_path / "identity.key"), time.time() + LEASE_S
    value, large = signed_value(identity, expires_at), bytes(MAX_RECORD_BYTES + 1)
    assert not validator.validate(record(identity.peer_id, large, expires_at))
    assert not validator.validate(record("z" * 1000, value, expires_at))
    assert not validator.validate(record(identity.peer_id, value, expires_at, key=large))
    assert not validator._verdicts
    assert validator.validate(record(identity.peer_id, value, expires_at))


@pytest.mark.parametrize("loaded", [(1, 4), (0, 1), (-1, 4), (0, 5)])
def test_who_hosts_what_it_has_not_loaded_or_loads_what_there_is_not_is_refused(loaded: tuple[int, int]) -> None:
    assert announcement("me", end=2, loaded=(0, 4)).in_memory == (0, 4)
    with pytest.raises(ValueError, match="load"):
        announcement("me", end=2, loaded=loaded)


@pytest.mark.parametrize(("blocks", "rtts", "limit_bytes"), [(16, 0, 1024), (16, 8, 1024 + 640), (80, 8, 2048 + 640)])
def test_an_announcement_is_as_small_as_is_said(blocks: int, rtts: int, limit_bytes: int, tmp_path: Path) -> None:
    identity, expires_at = Identity.load_or_create(tmp_path / "identity.key"), time.time() + LEASE_S
    typical = announcement(
        identity.peer_id,
        model_name="meta-llama/Llama-3.1-70B-Instruct",
        num_blocks=80,
        end=blocks,
        block_digests=tuple(f"{block:016x}" for block in range(blocks)),
        dtype="bfloat16",
        throughput=12.345678,
        decode_steps_per_s={1: 12.345678, 4: 34.567891, 16: 78.912345},
        prefill_tokens_per_s=567.891234,
        rtts_s={f"{identity.peer_id[:-1]}{number}": 0.0123 for number in range(1, rtts + 1)},
        upload_bytes_per_s=1234567.8 if rtts else None,
        download_bytes_per_s=12345678.9 if rtts else None,
        free_kv_tokens=65_536,
        sessions=12,
        addresses=tuple(
            f"/ip4/203.0.113.5/{transport}/p2p/{identity.peer_id}" for transport in ("tcp/31337", "udp/31337/quic-v1")
        ),
        version="0.1.0",
        public_name="a volunteer",
    )
    assert len(signed(identity, identity.peer_id, typical.pack(), expires_at)) < limit_bytes


HONEST_FIGURES = {
    "decode_steps_per_s": {"1": 28.4, "4": 52.2, "16": 91.4},
    "prefill_tokens_per_s": 588.0,
    "rtts_s": {f"12D3KooW{number}": 0.02 * number for number in range(1, 9)},
    "upload_bytes_per_s": 1.25e6,
    "download_bytes_per_s": 1.25e7,
}
FORGED_FIGURES = {
    "not a number": {"prefill_tokens_per_s": float("nan")},
    "endless": {"upload_bytes_per_s": float("inf")},
    "faster than light": {"download_bytes_per_s": 1e300},
    "negative": {"upload_bytes_per_s": -1.0},
    "negative time": {"rtts_s": {"12D3KooW1": -0.001}},
    "endless time": {"rtts_s": {"12D3KooW1": float("inf")}},
    "no time": {"rtts_s": {"12D3KooW1": None}},
    "no peer": {"rtts_s": {"": 0.1}},
    "a peer that rings": {"rtts_s": {"\x1b]0;owned\x07": 0.1}},
    "a long name": {"rtts_s": {"z" * 65: 0.1}},
    "nine peers": {"rtts_s": {f"12D3KooW{number}": 0.1 for number in range(1, 10)}},
    "a list": {"rtts_s": [0.1, 0.2]},
    "nobody's steps": {"decode_steps_per_s": {"0": 1.0}},
    "a crowd": {"decode_steps_per_s": {str(2**60): 1.0}},
    "no number": {"decode_steps_per_s": {"four": 1.0}},
    "nine batches": {"decode_steps_per_s": {str(number): 1.0 for number in range(1, 10)}},
    "no rate": {"decode_steps_per_s": {"1": "fast"}},
    "steps that are not a number": {"decode_steps_per_s": {"1": float("nan")}},
}


def record_with(identity: Identity, figures: dict[str, object]) -> DHTRecord:
    """A record that its owner signed, whatever it says."""
    fields = announcement(identity.peer_id).model_dump(mode="json", exclude=set(HONEST_FIGURES))
    expires_at = time.time() + LEASE_S
    value = signed(identity, identity.peer_id, msgpack.packb({**fields, **figures}), expires_at)
    return record(identity.peer_id, value, expires_at)


@pytest.mark.parametrize("figures", [HONEST_FIGURES, {}], ids=["honest figures", "of a server that tells none"])
def test_a_record_with_figures_or_without_is_accepted(
    figures: dict[str, object], tmp_path: Path, validator: AnnouncementValidator
) -> None:
    assert validator.validate(record_with(Identity.load_or_create(tmp_path / "other.key"), figures))


@pytest.mark.parametrize("figures", FORGED_FIGURES.values(), ids=FORGED_FIGURES.keys())
def test_a_record_with_impossible_figures_is_refused(
    figures: dict[str, object], tmp_path: Path, validator: AnnouncementValidator
) -> None:
    identity = Identity.load_or_create(tmp_path / "other.key")
    assert not validator.validate(record_with(identity, {**HONEST_FIGURES, **figures}))


def test_figures_come_out_as_they_went_in() -> None:
    told = announcement("12D3KooW1", **HONEST_FIGURES)
    assert Announcement.unpack(told.pack()) == told
    assert list(told.decode_steps_per_s) == [1, 4, 16]


async def test_an_honest_record_made_the_same_way_is_seen(scene: Scene) -> None:
    """The control: the forgeries below fail for what is forged in them, not for how they are sent."""
    expires_at = time.time() + LEASE_S
    identity = scene.attacker.identity
    value = announcement(identity.peer_id).pack()
    await scene.push(identity.peer_id, signed(identity, identity.peer_id, value, expires_at), expires_at)
    assert set(await scene.seen()) == {identity.peer_id}


@pytest.mark.parametrize(
    "forgery",
    ["another's name", "unsigned", "other peer inside", "too long a lease", "huge", "not msgpack", "bad schema",
     "other model's key", "not a string as subkey", "RSA key"],
)  # fmt: skip
async def test_a_forged_record_is_never_seen_and_hides_nobody(forgery: str, scene: Scene) -> None:
    honest = scene.server.peer_id
    await scene.server_directory.announce(announcement(honest))
    identity, me = scene.attacker.identity, scene.attacker.peer_id
    expires_at = time.time() + LEASE_S + 1
    subkey: object = me
    lie = announcement(honest, free_kv_tokens=666).pack()
    match forgery:
        case "another's name":
            subkey, value = honest, signed(identity, honest, lie, expires_at)
        case "unsigned":
            subkey, value = honest, msgpack.packb(lie)
        case "other peer inside":
            value = signed(identity, me, lie, expires_at)
        case "too long a lease":
            expires_at = time.time() + 3600
            value = signed(identity, me, announcement(me).pack(), expires_at)
        case "huge":
            value = signed(identity, me, b"x" * (MAX_RECORD_BYTES + 1), expires_at)
        case "not msgpack":
            value = b"\xc1" * 100
        case "bad schema":
            value = signed(identity, me, msgpack.packb({"peer_id": me, "start": "DROP TABLE"}), expires_at)
        case "other model's key":
            value = signed(identity, me, announcement(me, model=OTHER_MODEL).pack(), expires_at)
        case "RSA key":
            owner = foreign_owner("RSA")
            subkey, value = owner.peer_id, owner.signed(expires_at)
        case _:
            subkey, value = 7, signed(identity, me, announcement(me).pack(), expires_at)
    await scene.push(subkey, value, expires_at)
    seen = await scene.seen()
    assert {peer_id: one.free_kv_tokens for peer_id, one in seen.items()} == {honest: 7}


async def test_a_plain_value_does_not_replace_the_directory(scene: Scene) -> None:
    await scene.server_directory.announce(announcement(scene.server.peer_id))
    expires_at = time.time() + LEASE_S + 1
    value = msgpack.packb("nobody is here")
    scene.attacker_dht.protocol.storage.store(KEY, value, expires_at)
    for node in (scene.bootstrap, scene.server):
        stored = await scene.attacker_dht.protocol.call_store(node.p2p.peer_id, [KEY], [value], [expires_at])
        assert stored == [False]
    assert set(await scene.seen()) == {scene.server.peer_id}


async def test_an_old_record_replayed_after_a_newer_one_or_after_the_farewell_is_not_seen(scene: Scene) -> None:
    server = scene.server
    expires_at = time.time() + LEASE_S
    old_value = announcement(server.peer_id, free_kv_tokens=1).pack()
    old = signed(server.identity, server.peer_id, old_value, expires_at)
    await scene.server_directory.announce(announcement(server.peer_id, free_kv_tokens=2))
    await scene.push(server.peer_id, old, expires_at)
    assert (await scene.seen())[server.peer_id].free_kv_tokens == 2
    await scene.server_directory.withdraw(announcement(server.peer_id))
    await scene.push(server.peer_id, old, expires_at)
    assert await scene.seen() == {}


async def test_an_expired_record_is_not_seen(scene: Scene) -> None:
    server, expires_at = scene.server, time.time() - 1
    value = signed(server.identity, server.peer_id, announcement(server.peer_id).pack(), expires_at)
    scene.attacker_dht.protocol.storage.frozen = True  # the attacker keeps what honest nodes forget
    await scene.push(server.peer_id, value, expires_at)
    assert await scene.seen() == {}


async def test_a_server_that_falls_silent_is_forgotten_within_15_seconds(scene: Scene) -> None:
    begun = time.monotonic()
    await scene.server_directory.announce(announcement(scene.server.peer_id))
    assert set(await scene.seen()) == {scene.server.peer_id}
    while await scene.seen():  # noqa: ASYNC110 - silence is not an event
        await asyncio.sleep(0.25)
    assert time.monotonic() - begun < 15


async def test_two_models_do_not_mix_and_a_farewell_is_seen_at_once(scene: Scene) -> None:
    mine = announcement(scene.server.peer_id)
    await scene.server_directory.announce(mine)
    await scene.server_directory.announce(announcement(scene.server.peer_id, model=OTHER_MODEL, num_blocks=9))
    assert (await scene.seen())[scene.server.peer_id].num_blocks == 4
    await scene.server_directory.withdraw(mine)
    assert await scene.seen() == {}
    assert len(await scene.client.servers(OTHER_MODEL)) == 1
