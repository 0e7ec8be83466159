"""Tiny random checkpoints, one for every family that Swarm supports, made from configurations alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

BLOCKS = 4
VOCABULARY = 128
WINDOW = 6
"""Positions of a sliding window, where a family has them: fewer than the tests run."""

_FULL, _SLIDING = "full_attention", "sliding_attention"
_DENSE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GPT2: dict[str, Any] = {
    "vocab_size": VOCABULARY, "n_embd": 64, "n_layer": BLOCKS, "n_head": 4, "n_positions": 64,
    "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_FALCON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": BLOCKS, "num_attention_heads": 4,
    "max_position_embeddings": 64, "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_GRANITE: dict[str, Any] = {
    **_DENSE, "embedding_multiplier": 3.0, "attention_multiplier": 0.3, "residual_multiplier": 0.7,
    "logits_scaling": 2.0,
}  # fmt: skip
_MLA: dict[str, Any] = {
    "num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}  # fmt: skip
_GROUPED_EXPERTS: dict[str, Any] = {
    "moe_intermediate_size": 32, "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2,
    "n_group": 2, "topk_group": 1, "routed_scaling_factor": 1.5, "first_k_dense_replace": 1, "num_mtp_layers": 0,
}  # fmt: skip
_YARN: dict[str, Any] = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip
_LOCAL_EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
_QWEN_EXPERTS: dict[str, Any] = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}

TINY_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    # dense
    "llama": ("llama", {**_DENSE, "tie_word_embeddings": False}),
    "llama-tied": ("llama", {**_DENSE, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama-yarn": ("llama", {**_DENSE, "rope_parameters": _YARN}),
    "mistral": ("mistral", {**_DENSE, "sliding_window": WINDOW, "head_dim": 24}),
    "mistral-full": ("mistral", {**_DENSE, "sliding_window": None}),
    "qwen2": ("qwen2", {**_DENSE, "tie_word_embeddings": True}),
    "qwen2-sliding": ("qwen2", {
        **_DENSE, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
    "qwen3": ("qwen3", {**_DENSE, "head_dim": 32, "tie_word_embeddings": False}),
    "gemma": ("gemma", {**_DENSE, "head_dim": 24}),
    "gemma2": ("gemma2", {**_DENSE, "head_dim": 24, "sliding_window": WINDOW, "query_pre_attn_scalar": 20}),
    "gemma3_text": ("gemma3_text", {
        **_DENSE, "head_dim": 24, "sliding_window": WINDOW, "query_pre_attn_scalar": 20,
        "layer_types": [_SLIDING, _SLIDING, _FULL, _SLIDING]}),
    "phi3": ("phi3", {**_DENSE, "sliding_window": WINDOW}),
    "phi3-longrope": ("phi3", {
        **_DENSE, "original_max_position_embeddings": 12, "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 10000.0, "factor": 64 / 12,
            "short_factor": [1.0 + 0.1 * i for i in range(8)],
            "long_factor": [2.0 + 0.3 * i for i in range(8)]}}),
    "olmo2": ("olmo2", _DENSE),
    "falcon": ("falcon", {**_FALCON, "multi_query": True, "parallel_attn": True}),
    "falcon-new-decoder": ("falcon", {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-alibi": ("falcon", {
        **_FALCON, "alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}),
    "bloom": ("bloom", {
        "vocab_size": VOCABULARY, "hidden_size": 64, "n_layer": BLOCKS, "n_head": 4, "initializer_range": 0.2}),
    "gpt_neox": ("gpt_neox", _DENSE),
    "gpt_neox-sequential": ("gpt_neox", {**_DENSE, "use_parallel_residual": False}),
    "gpt2": ("gpt2", _GPT2),
    "gpt2-inverse-layer-scale": ("gpt2", {**_GPT2, "scale_attn_by_inverse_layer_idx": True}),
    "starcoder2": ("starcoder2", {**_DENSE, "sliding_window": WINDOW}),
    "stablelm": ("stablelm", {**_DENSE, "use_qkv_bias": True}),
    "stablelm-parallel": ("stablelm", {**_DENSE, "use_parallel_residual": True, "qk_layernorm": True}),
    "granite": ("granite", _GRANITE),
    "cohere": ("cohere", {**_DENSE, "logit_scale": 0.25, "use_qk_norm": True}),
    "smollm3": ("smollm3", {**_DENSE, "no_rope_layers": [1, 0, 1, 0]}),
    # mixture of experts
    "mixtral": ("mixtral", {**_DENSE, **_LOCAL_EXPERTS, "sliding_window": WINDOW}),
    "qwen2_moe": ("qwen2_moe", {
        **_DENSE, **_QWEN_EXPERTS, "shared_expert_intermediate_size": 48, "mlp_only_layers": [1]}),
    "qwen3_moe": ("qwen3_moe", {**_DENSE, **_QWEN_EXPERTS, "head_dim": 32, "norm_topk_prob": True}),
    "olmoe": ("olmoe", {**_DENSE, "num_experts": 4, "num_experts_per_tok": 2, "clip_qkv": 2.0}),
    "gpt_oss": ("gpt_oss", {
        **_DENSE, **_LOCAL_EXPERTS, "head_dim": 16, "sliding_window": WINDOW, "rope_parameters": _YARN}),
    "deepseek_v3": ("deepseek_v3", {**_DENSE, **_MLA, **_GROUPED_EXPERTS}),
    "glm4_moe": ("glm4_moe", {**_DENSE, **_GROUPED_EXPERTS, "head_dim": 16, "use_qk_norm": True}),
    "granitemoe": ("granitemoe", {**_GRANITE, **_LOCAL_EXPERTS}),
    "phimoe": ("phimoe", {**_DENSE, **_LOCAL_EXPERTS, "attention_bias": True, "lm_head_bias": True}),
    "ernie4_5_moe": ("ernie4_5_moe", {
        **_DENSE, "moe_intermediate_size": 32, "moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1}),
    "hunyuan_v1_moe": ("hunyuan_v1_moe", {**_DENSE, "num_experts": 4, "moe_topk": 2, "head_dim": 16}),
    # refused
    "mamba": ("mamba", {
        "vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": BLOCKS, "state_size": 4}),
    "olmo": ("olmo", _DENSE),
}  # fmt: skip
"""Name: (``config.model_type``, fields of the configuration). What follows a dash names a variant of the family."""


def tiny_model(name: str, *, seed: int = 0) -> PreTrainedModel:
    """A float32 model with the configuration ``TINY_MODELS[name]`` and random weights, none of them trivial."""
    family, fields = TINY_MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **fields))
        persistent = model.state_dict()
        with torch.no_grad():
            for tensor_name, tensor in persistent.items():
                if (
                    tensor.ndim == 1 and tensor.is_floating_point()
                ) or "bias" in tensor_name:  # norms, biases, attention sinks
                    tensor.add_(0.1 * torch.randn_like(tensor))
    return model.float().eval()


def save_tiny_model(name: str, directory: Path, *, seed: int = 0, max_shard_size: str = "1GB") -> None:
    """Write :func:`tiny_model` to `directory` as ``config.json`` and safetensors."""
    tiny_model(name, seed=seed).save_pretrained(directory, max_shard_size=max_shard_size)
