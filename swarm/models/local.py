"""Load the whole model on this machine, by transformers alone: what a swarm's output is compared with."""

from __future__ import annotations

import copy

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
