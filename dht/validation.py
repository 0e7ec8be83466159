"""Sign announcements, listings and claims, and let no record into the DHT, nor out of it, that is neither.

hivemind calls :class:`AnnouncementValidator` on every node when a record is to be stored, and on the reader
when one comes back. A record is valid if it is small, signed by the key from which the peer id in its subkey
is derived, stored under the key of the model it speaks of (or that of all models), expires within that key's lease, and
fits the schema that belongs to the key.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

import msgpack

from swarm.dht.announcement import CLOCK_SLACK_S, LEASE_S, MAX_RECORD_BYTES, Announcement, directory_key
from swarm.dht.expert_announcement import ExpertAnnouncement, experts_key
from swarm.dht.model_listing import LISTING_LEASE_S, MODELS_KEY, ModelListing
from swarm.dht.move_claim import MoveClaim, moves_key
from swarm.transport.identity import Identity, verify
from swarm.transport.lean_hivemind import DHTID, DHTRecord, RecordValidatorBase

_DOMAIN = b"swarm announcement 1"
_EXPIRED_GRACE_S = 10.0
"""A record that runs out on its way must not make hivemind throw away the others in the same reply;
:class:`swarm.dht.directory.Directory` drops it afterwards."""
_REMEMBERED_VERDICTS = 4096
_MAX_NAME_BYTES = 128
"""Of keys (20 bytes) and subkeys (a peer id: 53). What is longer is not even remembered as invalid."""


class AnnouncementValidator(RecordValidatorBase):  # type: ignore[misc]
    """Signs what this peer stores; judges what others store and return."""

    def __init__(self, identity: Identity) -> None:
        self._identity = identity
        self._verdicts: OrderedDict[tuple[bytes, bytes, bytes, float], bool] = OrderedDict()

    def sign_value(self, record: DHTRecord) -> bytes:
        signature = self._identity.sign(_signed_bytes(record, record.value))
        signed: bytes = msgpack.packb([record.value, signature])
        return signed

    def strip_value(self, record: DHTRecord) -> bytes:
        return _split(record.value)[0]

    def validate(self, record: DHTRecord) -> bool:
        now = time.time()
        lease_s = LISTING_LEASE_S if record.key == _LISTINGS else LEASE_S
        if not now - _EXPIRED_GRACE_S <= record.expiration_time <= now + lease_s + CLOCK_SLACK_S:
            return False
        if len(record.value) > MAX_RECORD_BYTES or max(len(record.key), len(record.subkey)) > _MAX_NAME_BYTES:
            return False
        fingerprint = (record.key, record.subkey, record.value, record.expiration_time)
        if fingerprint not in self._verdicts:
            self._verdicts[fingerprint] = _is_authentic(record)
            if len(self._verdicts) > _REMEMBERED_VERDICTS:
                self._verdicts.popitem(last=False)
        return self._verdicts[fingerprint]


def _is_authentic(record: DHTRecord) -> bool:
    """Everything about a record that does not change with time."""
    try:
        peer_id = msgpack.unpackb(record.subkey)
        value, signature = _split(record.value)
        if not isinstance(peer_id, str) or not verify(peer_id, _signed_bytes(record, value), signature):
            return False
        packed = msgpack.unpackb(value)
    except (ValueError, TypeError, msgpack.UnpackException):
        return False
    return any(_speaks_of(kind, key, packed, peer_id, record.key) for kind, key in _KINDS)


_LISTINGS: bytes = DHTID.generate(source=MODELS_KEY).to_bytes()

_Kind = type[Announcement | ExpertAnnouncement | MoveClaim | ModelListing]
_KINDS: tuple[tuple[_Kind, Callable[[str], str]], ...] = (
    (Announcement, directory_key),
    (ExpertAnnouncement, experts_key),
    (MoveClaim, moves_key),
    (ModelListing, lambda _: MODELS_KEY),
)
"""Every type of record, and the key under which those of a model are."""


def _speaks_of(kind: _Kind, key_of: Callable[[str], str], packed: bytes, peer_id: str, key: bytes) -> bool:
    """Whether `packed` is of this kind, and in its owner's place."""
    try:
        said = kind.unpack(packed)
    except (ValueError, TypeError):
        return False
    right_key: bytes = DHTID.generate(source=key_of(said.model)).to_bytes()
    return said.peer_id == peer_id and key == right_key


def _signed_bytes(record: DHTRecord, value: bytes) -> bytes:
    signed: bytes = msgpack.packb([_DOMAIN, record.key, record.subkey, value, record.expiration_time])
    return signed


def _split(signed_value: bytes) -> tuple[bytes, bytes]:
    """(value, signature). Raises ValueError for anything else."""
    parts = msgpack.unpackb(signed_value)
    if not (isinstance(parts, list) and len(parts) == 2 and all(isinstance(part, bytes) for part in parts)):
        raise ValueError("not a signed record")
    return parts[0], parts[1]
