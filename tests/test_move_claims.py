"""Claims to move: small, signed, short-lived; nothing forged is stored or seen."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import msgpack
import pytest

from swarm.dht import LEASE_S, Directory, MoveClaims
from swarm.dht.announcement import CLOCK_SLACK_S, directory_key
from swarm.dht.move_claim import MAX_CLAIM_BYTES, MoveClaim, moves_key
from swarm.dht.validation import AnnouncementValidator
from swarm.placement import Move, Urgency
from swarm.transport.identity import Identity
from swarm.transport.lean_hivemind import DHTID, DHTRecord
from swarm.transport.node import Node

MODEL, OTHER_MODEL = "ab" * 32, "cd" * 32
LOOPBACK = ["/ip4/127.0.0.1/tcp/0"]


def move(peer_id: str) -> Move:
    return Move(
        peer_id, (0, 4), (4, 8), Urgency.FIRST_SERVER, gain=1.5, steps_per_s=20.0, new_steps_per_s=40.0, is_focus=True
    )


def fields(identity: Identity, **changes: object) -> dict[str, object]:
    claim = MoveClaim.of(move(identity.peer_id), MODEL, 12, time.time())
    return {**claim.model_dump(mode="json"), **changes}


def record(
    identity: Identity,
    value: dict[str, object],
    *,
    subkey: str | None = None,
    key: str = moves_key(MODEL),
    lease_s: float = LEASE_S,
) -> DHTRecord:
    """`value` under `subkey` (default: the owner's peer id), signed by `identity`."""
    plain = DHTRecord(
        DHTID.generate(source=key).to_bytes(),
        msgpack.packb(subkey or identity.peer_id),
        msgpack.packb(msgpack.packb(value)),
        time.time() + lease_s,
    )
    return DHTRecord(plain.key, plain.subkey, AnnouncementValidator(identity).sign_value(plain), plain.expiration_time)


@pytest.fixture
def owner(tmp_path: Path) -> Identity:
    return Identity.load_or_create(tmp_path / "owner.key")


@pytest.fixture
def validator(tmp_path: Path) -> AnnouncementValidator:
    return AnnouncementValidator(Identity.load_or_create(tmp_path / "reader.key"))


def test_an_honest_claim_is_accepted(owner: Identity, validator: AnnouncementValidator) -> None:
    assert validator.validate(record(owner, fields(owner)))


FORGERIES: dict[str, Callable[[Identity], DHTRecord]] = {
    "of somebody else": lambda owner: record(owner, fields(owner, peer_id="12D3KooWSomebodyE1se")),
    "in another's place": lambda owner: record(owner, fields(owner), subkey="12D3KooWSomebodyE1se"),
    "among announcements": lambda owner: record(owner, fields(owner), key=directory_key(MODEL)),
    "of another model": lambda owner: record(owner, fields(owner, model=OTHER_MODEL)),
    "for long": lambda owner: record(owner, fields(owner), lease_s=LEASE_S + CLOCK_SLACK_S + 5),
    "too large": lambda owner: record(owner, fields(owner, padding="x" * MAX_CLAIM_BYTES)),
    "beyond the model": lambda owner: record(owner, fields(owner, new=[10, 14])),
    "of no block": lambda owner: record(owner, fields(owner, new=[4, 4])),
    "of another urgency": lambda owner: record(owner, fields(owner, urgency=9)),
    "endless gain": lambda owner: record(owner, fields(owner, gain=float("inf"))),
    "not a number": lambda owner: record(owner, fields(owner, steps_per_s=float("nan"))),
    "without a span": lambda owner: record(owner, {k: v for k, v in fields(owner).items() if k != "old"}),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_forged_claim_is_refused(forgery: str, owner: Identity, validator: AnnouncementValidator) -> None:
    assert not validator.validate(FORGERIES[forgery](owner))


def test_a_claim_that_was_altered_is_refused(owner: Identity, validator: AnnouncementValidator) -> None:
    honest = record(owner, fields(owner))
    altered = honest.value.replace(b"gain", b"gaim")
    assert altered != honest.value
    assert not validator.validate(DHTRecord(honest.key, honest.subkey, altered, honest.expiration_time))


def test_a_claim_is_small(owner: Identity) -> None:
    claim = MoveClaim.of(move(owner.peer_id), MODEL, 12, time.time())
    assert len(claim.pack()) < MAX_CLAIM_BYTES / 2
    assert MoveClaim.unpack(claim.pack()) == claim


@pytest.fixture
async def directories() -> AsyncIterator[list[tuple[Node, Directory]]]:
    """Two peers of one DHT."""
    async with AsyncExitStack() as stack:
        joined: list[tuple[Node, Directory]] = []
        for _ in range(2):
            node = await Node.start(listen=LOOPBACK)
            stack.push_async_callback(node.stop)
            peers = await joined[0][0].addresses() if joined else []
            directory = await Directory.join(node, peers)
            stack.push_async_callback(directory.leave)
            joined.append((node, directory))
        yield joined


async def test_others_see_the_latest_claim_of_each_server(directories: list[tuple[Node, Directory]]) -> None:
    (mover, of_mover), (reader, of_reader) = directories
    claims = MoveClaims(of_mover, mover.peer_id, MODEL, 12)
    assert await claims.publish(move(mover.peer_id))
    later = Move(mover.peer_id, (0, 4), (8, 12), Urgency.SPEED, gain=2.0, steps_per_s=20.0, new_steps_per_s=20.0)
    assert await claims.publish(later)
    assert await MoveClaims(of_reader, reader.peer_id, MODEL, 12).alive() == [later]
    assert await MoveClaims(of_reader, reader.peer_id, MODEL, 13).alive() == []
    assert await MoveClaims(of_reader, reader.peer_id, OTHER_MODEL, 12).alive() == []
