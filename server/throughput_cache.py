"""Remember how fast this machine computed a span, so that the next start need not measure it."""

from __future__ import annotations

import contextlib
import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from swarm.cache_directory import alone_in, cache_directory, write_atomically
from swarm.server.throughput import BATCHES, ComputeSpeed

MAX_AGE_S = 7 * 24 * 3600.0
DISTURBED_MAX_AGE_S = 3600.0
"""Of what was measured while something else ran."""
_FORMAT = 1
"""Raise it when what is measured changes, and older figures must not be used."""


@dataclass(frozen=True)
class MeasuredOn:
    """All that decides the speed: figures hold for exactly this."""

    device: str
    """The maker's name of the CPU or GPU."""
    threads: int
    cores: int
    """That this process may use."""
    model: str
    """The digest that names it."""
    start: int
    end: int
    precision: str
    software: tuple[str, ...]
    """Versions of what computes."""


_Figure = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Entry(BaseModel):
    """A file of the cache: anybody could have written it."""

    model_config = ConfigDict(frozen=True)

    measured_on: dict[str, object]
    measured_at: float = Field(allow_inf_nan=False)
    prefill_tokens_per_s: _Figure
    decode_steps_per_s: dict[int, _Figure]
    is_undisturbed: bool


def remembered_speed(measured_on: MeasuredOn, now: float) -> ComputeSpeed | None:
    """What was measured on just this lately; None: nothing, or nothing that can be used.

    Args:
        now: Unix time.
    """
    with contextlib.suppress(OSError, UnicodeDecodeError, ValidationError):
        entry = _Entry.model_validate_json(_file(measured_on).read_text())
        is_of_this = entry.measured_on == _fields(measured_on) and set(entry.decode_steps_per_s) == set(BATCHES)
        if is_of_this and 0 <= now - entry.measured_at <= (MAX_AGE_S if entry.is_undisturbed else DISTURBED_MAX_AGE_S):
            return ComputeSpeed(entry.prefill_tokens_per_s, entry.decode_steps_per_s, entry.is_undisturbed)
    return None


def remember_speed(measured_on: MeasuredOn, speed: ComputeSpeed, now: float) -> None:
    """Keep `speed` for the next start."""
    entry = _Entry(
        measured_on=_fields(measured_on),
        measured_at=now,
        prefill_tokens_per_s=speed.prefill_tokens_per_s,
        decode_steps_per_s=dict(speed.decode_steps_per_s),
        is_undisturbed=speed.is_undisturbed,
    )
    write_atomically(_file(measured_on), entry.model_dump_json(indent=1))


def measuring() -> contextlib.AbstractContextManager[None]:
    """While a server measures, others that start on this machine wait; so each has it for itself."""
    return alone_in(cache_directory("throughput"))


def _fields(measured_on: MeasuredOn) -> dict[str, object]:
    return {"format": _FORMAT, **asdict(measured_on), "software": list(measured_on.software)}


def _file(measured_on: MeasuredOn) -> Path:
    name = hashlib.sha256(json.dumps(_fields(measured_on)).encode()).hexdigest()[:32]
    return cache_directory("throughput") / f"{name}.json"
