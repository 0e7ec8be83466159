"""How much KV cache one position takes, before anything is loaded."""

from __future__ import annotations

import torch
from transformers import PretrainedConfig


def kv_bytes_per_position(config: PretrainedConfig, dtype: torch.dtype) -> int:
    """Bytes of keys and values per sequence position and block, for attention as transformers caches it.

    Multi-head latent attention (DeepSeek) is cached expanded, so its keys and values count with all heads.
    """
    heads = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    if getattr(config, "qk_nope_head_dim", None):
        return int(heads * (config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim) * dtype.itemsize)
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        key_value_heads = 1
    else:
        key_value_heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_kv_heads", None) or heads
    return int(2 * key_value_heads * head_size * dtype.itemsize)
