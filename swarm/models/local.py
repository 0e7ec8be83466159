"""Load the whole model on this machine, by transformers alone: what a swarm's output is compared with."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator

import gguf
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from swarm.models.checkpoint import Checkpoint
from swarm.models.loading import quiet_transformers
from swarm.models.tensor_files import GgufFile


def load_whole_model(checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model as a user without Swarm would load it, on the CPU."""
    precision = dtype or checkpoint.default_dtype
    with quiet_transformers():
        if isinstance(checkpoint.files, GgufFile):
            # The configuration is transformers' own, too: given, it need not be read from the file once more (8 s).
            with _tables_of_names_made_once():
                model = AutoModelForCausalLM.from_pretrained(
                    checkpoint.location.parent,
                    gguf_file=checkpoint.location.name,
                    dtype=precision,
                    config=copy.deepcopy(checkpoint.config),
                )
        else:
            model = AutoModelForCausalLM.from_pretrained(checkpoint.location, dtype=precision)
    whole: PreTrainedModel = model.eval()
    return whole


@contextlib.contextmanager
def _tables_of_names_made_once() -> Iterator[None]:
    """transformers has the same table of tensors' names made for each of a model's modules, which takes 5 s."""
    made = gguf.get_tensor_name_map
    gguf.get_tensor_name_map = functools.cache(made)
    try:
        yield
    finally:
        gguf.get_tensor_name_map = made
