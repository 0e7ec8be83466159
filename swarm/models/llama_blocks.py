"""Blocks that are built as Llama's: RMS norms before attention and before a gated MLP, four linear layers in attention
and three in the MLP. So are those of Mistral, Qwen 2 and 3, SmolLM 3, …"""

from __future__ import annotations

from torch import nn

from swarm.models.fused_linear import fuse_in_place

_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_HEAD_NORMS = {"q_norm", "k_norm"}
_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}


def is_like_llama(layer: nn.Module) -> bool:
    """Whether a layer of transformers' is built of the same parts."""
    children = {name: child for name, child in layer.named_children()}
    if children.keys() != _LAYER:
        return False
    attention = {name for name, _ in children["self_attn"].named_children()}
    norms = [children["input_layernorm"], children["post_attention_layernorm"]]
    norms += [getattr(children["self_attn"], name) for name in attention & _HEAD_NORMS]
    return (
        attention in (_ATTENTION, _ATTENTION | _HEAD_NORMS)
        and {name for name, _ in children["mlp"].named_children()} == _MLP
        and all(hasattr(norm, "variance_epsilon") for norm in norms)
        and all(hasattr(children["self_attn"], name) for name in ("config", "head_dim", "scaling"))
    )


def fuse_projections_of(layer: nn.Module) -> None:
    """Make, in place, query, key and value of such a layer one, and gate and up one."""
    fuse_in_place(layer.self_attn, ["q_proj", "k_proj", "v_proj"])
    fuse_in_place(layer.mlp, ["gate_proj", "up_proj"])
