"""Records as bytes, and a stranger's bytes as records."""

from __future__ import annotations

from typing import TypeVar

import msgpack
from pydantic import BaseModel, ValidationError

_Record = TypeVar("_Record", bound=BaseModel)


def unpacked(kind: type[_Record], packed: bytes, called: str, *, number_keys: bool = False) -> _Record:
    """A record of `kind`.

    Args:
        called: what it should be, for people.
        number_keys: maps may have numbers as keys.

    Raises:
        ValueError: it is nothing of the sort.
    """
    try:
        return kind.model_validate(msgpack.unpackb(packed, raw=False, strict_map_key=not number_keys))
    except (ValidationError, msgpack.UnpackException, UnicodeDecodeError) as error:
        raise ValueError(f"not {called}: {error}") from error
