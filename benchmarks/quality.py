"""What quantized weights cost in quality: the perplexity of SmolLM2-135M on a real text.

The text is Python's own documentation of the language (``pydoc_data.topics``), in windows of 512 tokens, each begun
anew. The layers are quantized as servers do it (``swarm-server --quantize``), the head as clients do it, the embedding
is not. The model runs in one process: that servers change nothing is what the tests show.
"""

from __future__ import annotations

import copy
import math
import pydoc_data.topics
import time
from typing import Any

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from benchmarks.report import Report
from swarm.models import open_checkpoint
from swarm.models.local import load_whole_model
from swarm.models.packed_linear import LinearWithCopy
from swarm.models.quantization import SCHEMES, bytes_per_weight, quantize_linears, quantized_head

_WINDOW = 512


def main() -> None:
    """Run the benchmark."""
    report = Report.from_command_line(__doc__ or "")
    windows = 4 if report.quick else 32
    checkpoint = open_checkpoint("smollm2")
    text = "\n\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    ids = checkpoint.tokenizer()(text, return_tensors="pt").input_ids[0, : windows * _WINDOW].view(windows, _WINDOW)
    exact = load_whole_model(checkpoint)
    figures: dict[str, Any] = {"tokens": ids.numel()}
    for scheme in (None, *SCHEMES):
        model = exact
        if scheme is not None:
            model = copy.deepcopy(exact)
            quantize_linears(model.base_model.layers, scheme)
            model.lm_head = LinearWithCopy(model.lm_head, quantized_head(model.lm_head))
        begun = time.perf_counter()
        name = scheme or "fp32"
        figures[f"perplexity_{name}"] = _perplexity(model, ids)
        figures[f"perplexity_{name}_over_fp32"] = figures[f"perplexity_{name}"] / figures["perplexity_fp32"]
        figures[f"bits_per_weight_{name}"] = 8 * bytes_per_weight(scheme, torch.float32)
        report.progress(f"{name}: {figures[f'perplexity_{name}']:.3f} ({time.perf_counter() - begun:.0f} s)")
    report.finish(figures)


@torch.inference_mode()
def _perplexity(model: PreTrainedModel, windows: torch.Tensor) -> float:
    losses = []
    for window in windows:
        logits = model(window.unsqueeze(0), use_cache=False).logits[0, :-1]
        losses.append(float(functional.cross_entropy(logits, window[1:])))
    return math.exp(sum(losses) / len(losses))


if __name__ == "__main__":
    main()
