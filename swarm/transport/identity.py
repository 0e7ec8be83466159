"""A peer's identity: an Ed25519 key, and the peer id that is derived from it.

Key files and peer ids follow https://github.com/libp2p/specs/blob/master/peer-ids/peer-ids.md: the file is
a protobuf ``PrivateKey``; the id of an Ed25519 key is an *identity* multihash, so it contains the whole
public key, and a signature can be checked with nothing but the id.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from swarm.errors import SwarmError
from swarm.transport.lean_hivemind import PeerID, crypto_pb2

_ID_PREFIX = bytes((0x00, 0x24, 0x08, 0x01, 0x12, 0x20))
"""Multihash code "identity", 36 bytes; protobuf PublicKey: type Ed25519, 32 bytes of key."""
_MAX_ID_CHARACTERS = 64
"""Ours have 52. Decoding base58 takes time that grows with the square of the length, so a long one is not tried."""


class IdentityError(SwarmError):
    """The identity file cannot be used."""


@dataclass(frozen=True)
class Identity:
    """A private key, and the file that p2pd reads it from."""

    private_key: Ed25519PrivateKey
    path: Path

    @property
    def peer_id(self) -> str:
        """The peer id in base58 (``12D3KooW…``)."""
        return str(PeerID(_ID_PREFIX + self.private_key.public_key().public_bytes_raw()).to_base58())

    def sign(self, data: bytes) -> bytes:
        """64 bytes of Ed25519 signature (RFC 8032)."""
        return self.private_key.sign(data)

    @classmethod
    def load_or_create(cls, path: Path) -> Identity:
        """The identity in `path`, which is made (readable by its owner only) if it does not exist.

        Raises:
            IdentityError: the file is no Ed25519 key, or cannot be read or written.
        """
        try:
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                _write_key(path, Ed25519PrivateKey.generate())
            raw = path.read_bytes()
        except OSError as error:
            raise IdentityError(f"The identity file {path} cannot be used: {error}") from error
        return cls(_parse_key(path, raw), path)

    @classmethod
    def temporary(cls) -> Identity:
        """A fresh identity for one run, in a private temporary file.

        Raises:
            IdentityError: the file cannot be written.
        """
        try:
            directory = Path(tempfile.mkdtemp(prefix="swarm-identity-"))
        except OSError as error:
            raise IdentityError(f"There is no room for a temporary identity: {error}") from error
        try:
            return cls.load_or_create(directory / "identity.key")
        except IdentityError:
            shutil.rmtree(directory, ignore_errors=True)
            raise


def verify(peer_id: str, data: bytes, signature: bytes) -> bool:
    """Whether the owner of `peer_id` signed `data`. False for anything malformed."""
    if len(peer_id) > _MAX_ID_CHARACTERS:
        return False
    try:
        raw = PeerID.from_base58(peer_id).to_bytes()
        if len(raw) != len(_ID_PREFIX) + 32 or not raw.startswith(_ID_PREFIX):
            return False
        Ed25519PublicKey.from_public_bytes(raw[len(_ID_PREFIX) :]).verify(signature, data)
    except (InvalidSignature, ValueError):
        return False
    return True


def _write_key(path: Path, key: Ed25519PrivateKey) -> None:
    both_halves = key.private_bytes_raw() + key.public_key().public_bytes_raw()
    message = crypto_pb2.PrivateKey(key_type=crypto_pb2.KeyType.Ed25519, data=both_halves)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(message.SerializeToString())
    except OSError:
        path.unlink(missing_ok=True)  # half a key would be in the way when there is room again
        raise


def _parse_key(path: Path, raw: bytes) -> Ed25519PrivateKey:
    try:
        message = crypto_pb2.PrivateKey.FromString(raw)
        if message.key_type != crypto_pb2.KeyType.Ed25519 or len(message.data) != 64:
            raise ValueError("not an Ed25519 key")
        return Ed25519PrivateKey.from_private_bytes(message.data[:32])
    except Exception as error:  # protobuf raises errors of its own
        raise IdentityError(
            f"{path} is not an Ed25519 identity file ({error}). Move it away and a new identity will be made."
        ) from error
