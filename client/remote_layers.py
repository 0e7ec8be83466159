"""What stands in a local model where its decoder layers and its KV cache were."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicLayer

from swarm.client.inference_session import InferenceSession


class RemoteCache(Cache):  # type: ignore[misc]
    """A transformers cache whose keys and values are on servers; it knows only how long they are.

    ``generate()`` passes it from step to step, reorders it for beams and crops it for drafts; pass it as
    ``past_key_values`` to go on with a conversation.
    """

    def __init__(self, session: InferenceSession) -> None:
        self.session = session
        super().__init__(layers=[_RemoteCacheLayer(session)])


class _RemoteCacheLayer(DynamicLayer):  # type: ignore[misc]
    """Answers questions about the cache's length, and passes on what changes it."""

    def __init__(self, session: InferenceSession) -> None:
        super().__init__()
        self._session = session
        self.is_initialized = True

    def get_seq_length(self) -> int:
        return self._session.position

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("keys and values live on the servers; nothing local may write them")

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._session.reorder(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._session.reorder(torch.arange(self._session.batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._session.reorder(torch.arange(self._session.batch)[indices.to("cpu")])

    def crop(self, tokens_to_remove: int) -> None:
        position = self._session.position
        self._session.position = position + tokens_to_remove if tokens_to_remove < 0 else min(position, tokens_to_remove)

    def reset(self) -> None:
        self._session.position = 0


class RemoteLayers(nn.Module):
    """Called as one decoder layer; runs all of them, on servers.

    The step's own inputs are set by :meth:`DistributedMixin.forward <swarm.client.model.DistributedMixin>` just
    before, because a layer is given only what transformers made of them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.run: Callable[[torch.Tensor], torch.Tensor] | None = None

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.run is None:
            raise RuntimeError("call the model, not its inner modules: the session is set up there")
        return self.run(hidden_states)
