"""Which model families are known to be exact when cut into spans."""

from __future__ import annotations

from transformers import PretrainedConfig

from swarm.errors import UnsupportedFamily

EXACT_FAMILIES = frozenset(
    {
        # dense
        "bloom", "cohere", "falcon", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "granite", "llama",
        "mistral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3", "stablelm", "starcoder2",
        # mixture of experts
        "deepseek_v3", "ernie4_5_moe", "glm4_moe", "gpt_oss", "granitemoe", "hunyuan_v1_moe", "mixtral", "olmoe",
        "phimoe", "qwen2_moe", "qwen3_moe",
    }
)  # fmt: skip
"""``config.model_type`` of every family for which ``tests/test_families.py`` shows that the logits of
two spans, step by step with KV caches, equal those of the whole model."""

_RECURRENT_HINTS = ("mamba", "rwkv", "recurrent", "jamba", "zamba", "bamba", "xlstm", "lfm2")


def check_family(config: PretrainedConfig, *, allow_untested: bool = False) -> None:
    """Refuse a configuration whose family is not in :data:`EXACT_FAMILIES`.

    Raises:
        UnsupportedFamily: with a sentence that says why, and what would help.
    """
    family = config.model_type
    if family in EXACT_FAMILIES:
        return
    if any(hint in family for hint in _RECURRENT_HINTS):
        raise UnsupportedFamily(
            f"{family} models are not supported: they keep a recurrent state instead of (or beside) a KV cache, "
            "and Swarm can neither roll such a state back nor replay it exactly."
        )
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedFamily(
            f"{family} models are not supported: they are encoder-decoders, and Swarm serves decoder-only models."
        )
    if not allow_untested:
        raise UnsupportedFamily(
            f"{family} models are not supported: no test has shown yet that this family stays exact when it is cut "
            f"into spans. Supported: {', '.join(sorted(EXACT_FAMILIES))}. To try all the same, pass "
            "allow_untested=True (Python) or --allow-untested-family (command line)."
        )
