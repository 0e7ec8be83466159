"""Remember which of several ways to do the same is fastest on this machine, so that it is measured once."""

from __future__ import annotations

import functools
import hashlib
import json
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import torch

from swarm import __version__
from swarm.cache_directory import alone_in, cache_directory, write_atomically
from swarm.processor import processor_name

_ROUNDS = 5

Way = TypeVar("Way", bound=Hashable)


@dataclass(frozen=True)
class Situation:
    """All that a choice depends on."""

    scheme: str
    """What is chosen for: a quantization, a layout, …"""
    outputs: int
    inputs: int
    processor: str
    threads: int
    torch: str
    swarm: str
    options: tuple[str, ...]

    @classmethod
    def here(cls, scheme: str, shape: Sequence[int], device: torch.device, options: Sequence[str]) -> Situation:
        """On this machine, with this software, for weights ``[outputs, inputs]``."""
        outputs, inputs = shape
        versions = torch.__version__, __version__
        return cls(scheme, outputs, inputs, _processor(device), torch.get_num_threads(), *versions, tuple(options))


def choice(situation: Situation, measure: Callable[[], str]) -> str:
    """One of the options, as remembered, else as measured now."""
    file = _file(situation)
    if file not in _chosen:
        with alone_in(file.parent):
            name = _remembered(file, situation)
            if name is None:
                name = measure()
                write_atomically(file, json.dumps({"situation": asdict(situation), "choice": name}, indent=1))
        _chosen[file] = name
    return _chosen[file]


def least_s(ways: Mapping[Way, Callable[[], object]]) -> dict[Way, float]:
    """The seconds that each takes at best, in turns: whatever else this machine does falls on all."""
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(_ROUNDS):
        for way, run in ways.items():
            begun = time.perf_counter()
            run()
            best[way] = min(best[way], time.perf_counter() - begun)
    return best


_chosen: dict[Path, str] = {}
"""What this process has chosen: models have hundreds of layers, and a file may be impossible to write."""


def _remembered(file: Path, situation: Situation) -> str | None:
    """The option that `file` names for `situation`; None if there is no such file, or it is damaged or not ours."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(found, dict) or found.get("situation") != {**asdict(situation), "options": [*situation.options]}:
        return None
    name = found.get("choice")
    return name if name in situation.options else None


def _file(situation: Situation) -> Path:
    digest = hashlib.sha256(json.dumps(asdict(situation)).encode()).hexdigest()
    return cache_directory("choices") / f"{situation.scheme}-{digest[:24]}.json"


@functools.cache
def _processor(device: torch.device) -> str:
    """The name of a device and, of a CPU, what instructions torch uses on it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor_name()}, {torch.backends.cpu.get_cpu_capability()}"
