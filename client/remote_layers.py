"""What stands in a local model where its decoder layers and its KV cache were."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicLayer

from swarm.client.inference_session import InferenceSession


class RemoteCache(Cache):  # type: ignore[misc]
    """A transformers cache whose keys and values are on servers; it knows only how long they are.

    ``generate()`` passes it from step to step, reorders it for beams and crops it for drafts; pass it as
    ``past_key_values`` to go on with a conversation.

    Attributes:
        token_ids: what is in the cache, ``[batch, length]``, if the caller keeps count (:meth:`keep_common_prefix`).
    """

    def __init__(self, session: InferenceSession) -> None:
        self.session = session
        self.token_ids: torch.Tensor | None = None
        super().__init__(layers=[_RemoteCacheLayer(session)])

    def keep_common_prefix(self, input_ids: torch.Tensor) -> None:
        """Forget what differs from `input_ids` (set :attr:`token_ids` to what was generated first).

        A chat template may rewrite earlier turns; what it left alone need not be computed again. At least the last
        of `input_ids` is left to compute.
        """
        position = min(self.session.position, input_ids.shape[1] - 1)
        if self.token_ids is not None:
            position = min(position, self.token_ids.shape[1])
            same = (self.token_ids[:, :position] == input_ids[:, :position]).all(dim=0)
            position = position if bool(same.all()) else int(same.int().argmin())
        self.session.position = position


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
        self._session.position = (
            position + tokens_to_remove if tokens_to_remove < 0 else min(position, tokens_to_remove)
        )

    def reset(self) -> None:
        self._session.position = 0


class RemoteLayers(nn.Module):
    """Called as one decoder layer; runs all of them, on servers.

    A layer is given only what transformers made of a step's inputs, so what runs the step is set just before
    (:meth:`running`), for this thread alone: others may be using the model at the same time.
    """

    def __init__(self) -> None:
        super().__init__()
        # Not a context variable: the session's own tasks would inherit it, and keep the session alive for ever.
        self._of_thread = threading.local()

    @contextmanager
    def running(self, run: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
        """Within this context, hidden states go through `run`."""
        self._of_thread.run = run
        try:
            yield
        finally:
            self._of_thread.run = None

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        run: Callable[[torch.Tensor], torch.Tensor] | None = getattr(self._of_thread, "run", None)
        if run is None:
            raise RuntimeError("call the model, not its inner modules: the session is set up there")
        return run(hidden_states)
