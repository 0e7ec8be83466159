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


def begin_together(steps: Steps) -> torch.Tensor:
    """Make room for the positions of each; returns the ``position_ids`` of all, in a row, ``[positions, 1]``."""
    all_ids = []
    for states, cache, ids in steps:
        rows, count, _ = states.shape
        following = torch.arange(cache.length, cache.length + count, device=states.device).expand(rows, count)
        all_ids.append((ids if ids is not None else following).reshape(-1, 1))
        cache.begin(rows, count)
    return torch.cat(all_ids) if len(all_ids) > 1 else all_ids[0]
