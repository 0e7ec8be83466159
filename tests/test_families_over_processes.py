"""Four very different families, split over real server processes: sliding windows, ALiBi, sinks, latent attention."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import save_tiny_model
from transformers import AutoModelForCausalLM

from swarm.commands.local_swarm import LocalSwarm


@pytest.mark.parametrize("family", ["gemma3_text", "bloom", "gpt_oss", "deepseek_v3"])
def test_generation_through_two_processes_equals_local(
    family: str, swarm: LocalSwarm, connect: Callable[..., Any], tmp_path: Path
) -> None:
    save_tiny_model(family, tmp_path)
    swarm.start_servers(str(tmp_path), ["0:2", "2:4"], "--threads", "1")
    model = connect(str(tmp_path))
    local = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = torch.tensor([[5, 17, 9, 40, 3, 22, 8], [1, 1, 11, 60, 2, 7, 33]])
    mask = torch.tensor([[1] * 7, [0, 0, 1, 1, 1, 1, 1]])
    options = {"do_sample": False, "max_new_tokens": 16, "min_new_tokens": 16, "pad_token_id": 0}
    expected = local.generate(ids, attention_mask=mask, **options)
    assert model.generate(ids, attention_mask=mask, **options).tolist() == expected.tolist()
    with torch.no_grad():
        torch.testing.assert_close(
            model(ids, use_cache=False).logits, local(ids, use_cache=False).logits, atol=1e-4, rtol=0
        )
