"""What this machine has: a device to compute on, and memory."""

from __future__ import annotations

import os

import psutil
import torch

from swarm.processor import processor_name

SHARE_OF_FREE = 0.8
"""By default a server takes this share of the memory that is free; the rest is its owner's."""


def choose_device(wanted: str) -> torch.device:
    """``auto`` is the first CUDA device, or else the CPU.

    Raises:
        ValueError: there is no such device.
    """
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"There is no device {wanted!r} on this machine: {str(error).splitlines()[0]}") from None
    return device


def allowed_memory(device: torch.device, wanted_bytes: int | None) -> tuple[int, str]:
    """(bytes that the server may use on `device`, how that came about)."""
    if wanted_bytes is not None:
        return wanted_bytes, "--memory"
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return int(free * SHARE_OF_FREE), f"{SHARE_OF_FREE:.0%} of the {free / 1024**3:.1f} GiB that are free"


def device_name(device: torch.device) -> str:
    """What the maker calls the device that computes, e.g. ``"AMD EPYC 9V74 80-Core Processor"``."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return processor_name()


def usable_cores() -> int:
    """How many of the machine's processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
