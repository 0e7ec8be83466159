"""An attacker with a real node in the same DHT: nothing it forges is ever seen by a client."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass

import msgpack
import pytest

from swarm.dht import LEASE_S, Announcement, Directory, State
from swarm.dht.announcement import MAX_RECORD_BYTES, directory_key
from swarm.dht.validation import AnnouncementValidator
from swarm.transport.identity import Identity
from swarm.transport.lean_hivemind import DHTID, DHTNode, DHTRecord
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


def signed(identity: Identity, subkey: str, value: bytes, expires_at: float, key: bytes | None = None) -> bytes:
    """`value` as the directory would store it, signed by `identity` (whoever that is)."""
    record = DHTRecord(key or KEY.to_bytes(), msgpack.packb(subkey), msgpack.packb(value), expires_at)
    return AnnouncementValidator(identity).sign_value(record)


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
     "other model's key", "not a string as subkey"],
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
