"""The steps of several sessions that run together."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from swarm.models.paged_cache import PagedCache

Steps = Sequence[tuple[torch.Tensor, PagedCache, torch.Tensor | None]]
"""Of every session the hidden states ``[rows, 1, hidden]``, its cache, and ``position_ids`` ``[rows, 1]`` (default: the
position that follows)."""


def begin_together(steps: Steps) -> torch.Tensor:
    """Make room for a position of each; returns their ``position_ids``, ``[rows, 1]``."""
    all_ids = []
    for states, cache, ids in steps:
        rows = states.shape[0]
        all_ids.append(ids if ids is not None else torch.full((rows, 1), cache.length, device=states.device))
        cache.begin(rows, 1)
    return torch.cat(all_ids) if len(all_ids) > 1 else all_ids[0]
