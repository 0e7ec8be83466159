"""The steps of several sessions that run together."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from swarm.models.paged_cache import PagedCache

Step = tuple[torch.Tensor, PagedCache, torch.Tensor | None]
"""Of a session the hidden states ``[rows, n, hidden]``, its cache, and ``position_ids`` ``[rows, n]`` (default: the
positions that follow)."""
Steps = Sequence[Step]
"""Of every session one; n may be another for each."""


def begin_together(steps: Steps) -> list[int]:
    """Make room for the positions of each; returns the position ids of all, in a row."""
    all_ids: list[int] = []
    for states, cache, ids in steps:
        rows, count, _ = states.shape
        all_ids += ids.flatten().tolist() if ids is not None else rows * [*range(cache.length, cache.length + count)]
        cache.begin(rows, count)
    return all_ids


def position_ids_of(steps: Steps) -> torch.Tensor:
    """Likewise, as ``position_ids`` ``[positions, 1]`` where the hidden states are."""
    return torch.tensor(begin_together(steps), device=steps[0][0].device).unsqueeze(1)
