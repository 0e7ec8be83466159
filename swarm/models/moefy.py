"""Turn a dense Llama-like checkpoint into a mixture of experts that computes the same function.

A gated feed-forward network is a sum over its intermediate neurons, so any split of them into N slices is a sum of N
smaller networks. Each slice becomes an expert. A router of zeros gives all N experts the same probability, 1/N, and
Mixtral normalises those it keeps; their down-projections are N times as large in return. With N a power of two neither
is ever rounded: what differs from the dense model is only the order in which the slices are summed.
"""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import MixtralConfig, PretrainedConfig

from swarm.errors import UnsupportedFamily
from swarm.models.checkpoint import Checkpoint
from swarm.models.loading import load_part
from swarm.models.new_checkpoint import COMPANIONS, new_checkpoint
from swarm.models.span import load_span
from swarm.models.surgery import drop_layers
from swarm.models.tensor_files import GgufFile

FAMILIES = ("llama", "mistral")
"""``config.model_type`` of the models whose blocks, apart from the feed-forward network, are Mixtral's."""

_SHARED_FIELDS = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache", "pad_token_id",
    "bos_token_id", "eos_token_id", "tie_word_embeddings", "rope_parameters",
)  # fmt: skip
_SHARD_BYTES = 128 * 1024**2
_TIE_BREAKING_LOGIT = 2.0**-16
"""Standard deviation of a random router's logits, if the hidden states that it sees have size 1 per element."""


def moefy(
    checkpoint: Checkpoint,
    output: Path,
    experts: int,
    *,
    top_k: int | None = None,
    seed: int | None = None,
    overwrite: bool = False,
    on_elements: Callable[[int], object] = lambda _: None,
) -> MixtralConfig:
    """Write `checkpoint` to the directory `output` as a Mixtral with `experts` experts in every block.

    At once in memory are 128 MiB of blocks (or one that is larger), and a copy of their down-projections. The precision
    is `checkpoint.default_dtype`.

    Args:
        experts: a power of two that divides the intermediate size.
        top_k: how many experts run for each token. Only all of them (the default) are the dense model's function.
        seed: give routers tiny random weights instead of zeros, so that with a smaller `top_k` different tokens get
            different experts. The experts' weights are then equal to about 1 part in 100,000.
        overwrite: replace a checkpoint that is in `output`.
        on_elements: called with the number of elements of every tensor that was read, for a progress bar.

    Returns:
        The configuration that was written.

    Raises:
        ValueError: `experts` or `top_k` do not fit the model, or `output` is in use.
        UnsupportedFamily: the checkpoint's blocks have something that Mixtral's lack.
        CorruptCheckpoint: a weight is missing, or a block's checksum is wrong.
        DiskError: there is no room for it; nothing is left of it.
    """
    config = mixtral_config(checkpoint.config, experts, top_k)
    dtype = checkpoint.default_dtype
    config.dtype = dtype
    if checkpoint.location.resolve() == output.resolve():
        raise ValueError(f"{output} is the model itself: choose another directory.")
    spans = _spans_of_shards(checkpoint, dtype)
    random = None if seed is None else torch.Generator().manual_seed(seed)
    with new_checkpoint(
        output, shards=1 + len(spans), weights_bytes=_size_bytes(checkpoint, experts, dtype), overwrite=overwrite
    ) as new:
        new.add_shard(_shell_tensors(checkpoint, dtype, on_elements))
        for start, end in spans:
            routers = [router_weights(experts, config.hidden_size, random).to(dtype) for _ in range(start, end)]
            new.add_shard(_block_tensors(checkpoint, start, routers, dtype, on_elements))
        new.add(config.save_pretrained)
        if isinstance(checkpoint.files, GgufFile):
            new.add(checkpoint.tokenizer().save_pretrained)
        else:
            new.add(lambda directory: _copy_companions(checkpoint.location, directory))
    return config


def mixtral_config(dense: PretrainedConfig, experts: int, top_k: int | None = None) -> MixtralConfig:
    """The configuration of a Mixtral that differs from the `dense` model only in its feed-forward networks.

    Raises:
        ValueError: `experts` is not a power of two, does not divide the intermediate size, or is less than `top_k`.
        UnsupportedFamily: no Mixtral computes what `dense` does.
    """
    if dense.model_type not in FAMILIES:
        raise UnsupportedFamily(
            f"{dense.model_type} models cannot be turned into experts: only those of the families "
            f"{' and '.join(FAMILIES)} can, whose blocks are Mixtral's in all but the feed-forward network."
        )
    if getattr(dense, "quantization_config", None) is not None:
        raise UnsupportedFamily("Models with quantized weights cannot be turned into experts: use the original one.")
    biased = [name for name in ("attention_bias", "mlp_bias") if getattr(dense, name, False)]
    if biased:
        raise UnsupportedFamily(f"This model has biases ({biased[0]}), which Mixtral's layers lack.")
    if experts < 2 or experts & (experts - 1):
        raise ValueError(
            f"--experts must be a power of two (2, 4, 8, …), and {experts} is not: with others, the experts' weights "
            "would be rounded, and the result would not equal the dense model's."
        )
    if dense.intermediate_size % experts:
        raise ValueError(
            f"--experts must divide the model's intermediate size, and {dense.intermediate_size} is not divisible by "
            f"{experts}. The largest that fits is {dense.intermediate_size & -dense.intermediate_size}."
        )
    if top_k is not None and not 1 <= top_k <= experts:
        raise ValueError(f"--top-k must be from 1 to the number of experts, {experts}, and not {top_k}.")
    return MixtralConfig(
        **{name: copy.deepcopy(getattr(dense, name)) for name in _SHARED_FIELDS},
        sliding_window=dense.sliding_window if dense.model_type == "mistral" else None,
        attention_dropout=dense.attention_dropout or 0.0,
        intermediate_size=dense.intermediate_size // experts,
        num_local_experts=experts,
        num_experts_per_tok=top_k or experts,
        architectures=["MixtralForCausalLM"],
    )


def router_weights(experts: int, hidden_size: int, random: torch.Generator | None) -> torch.Tensor:
    """A router's weights ``[experts, hidden]`` float32: zeros, or so small that they only break the ties."""
    if random is None:
        return torch.zeros(experts, hidden_size)
    return torch.randn(experts, hidden_size, generator=random) * (_TIE_BREAKING_LOGIT / math.sqrt(hidden_size))


def mixtral_block(dense: Mapping[str, torch.Tensor], router: torch.Tensor) -> dict[str, torch.Tensor]:
    """A block's tensors, by their names within the block, as Mixtral checkpoints have them.

    Expert E is the E-th slice of the intermediate neurons. What need not be copied shares the memory of `dense`.

    Args:
        dense: of a Llama block; ``mlp.gate_proj`` and ``mlp.up_proj`` are ``[intermediate, hidden]``,
            ``mlp.down_proj`` is ``[hidden, intermediate]``.
        router: ``[experts, hidden]``.

    Raises:
        ValueError: a down-projection is too large for its precision.
    """
    experts = len(router)
    down = dense["mlp.down_proj.weight"] * experts
    if not bool(torch.isfinite(down).all()):
        raise ValueError(f"A down-projection times {experts} is too large for {down.dtype}: choose fewer --experts.")
    slices = {
        "w1": dense["mlp.gate_proj.weight"].chunk(experts),
        "w2": [columns.contiguous() for columns in down.chunk(experts, dim=1)],
        "w3": dense["mlp.up_proj.weight"].chunk(experts),
    }
    return {
        **{name: tensor for name, tensor in dense.items() if not name.startswith("mlp.")},
        "block_sparse_moe.gate.weight": router,
        **{
            f"block_sparse_moe.experts.{expert}.{name}.weight": tensor
            for name, tensors in slices.items()
            for expert, tensor in enumerate(tensors)
        },
    }


def _shell_tensors(
    checkpoint: Checkpoint, dtype: torch.dtype, on_elements: Callable[[int], object]
) -> dict[str, torch.Tensor]:
    """Embedding, final norm and head. A head that is the embedding is not among them."""
    checkpoint.verify(None)
    shell = load_part(
        checkpoint,
        copy.deepcopy(checkpoint.config),
        checkpoint.tensor_names(None),
        lambda model: drop_layers(model, nn.Identity()),
        dtype,
        "cpu",
        on_elements,
    )
    return {name: parameter.detach() for name, parameter in shell.named_parameters()}  # each once, however often used


def _block_tensors(
    checkpoint: Checkpoint,
    start: int,
    routers: Sequence[torch.Tensor],
    dtype: torch.dtype,
    on_elements: Callable[[int], object],
) -> dict[str, torch.Tensor]:
    """As many blocks, from `start` on, as there are routers."""
    span = load_span(checkpoint, start, start + len(routers), dtype=dtype, on_elements=on_elements)
    blocks = [mixtral_block(layer.state_dict(), router) for layer, router in zip(span.layers, routers, strict=True)]
    return {
        f"model.layers.{number}.{name}": tensor
        for number, tensors in enumerate(blocks, start=start)
        for name, tensor in tensors.items()
    }


def _spans_of_shards(checkpoint: Checkpoint, dtype: torch.dtype) -> list[tuple[int, int]]:
    """Which blocks go into a shard together."""
    blocks = checkpoint.num_blocks
    largest = max(checkpoint.block_elements(block) for block in range(blocks)) * dtype.itemsize
    together = max(1, _SHARD_BYTES // largest)
    return [(start, min(start + together, blocks)) for start in range(0, blocks, together)]


def _size_bytes(checkpoint: Checkpoint, experts: int, dtype: torch.dtype) -> int:
    dense = sum(entry.elements for entry in checkpoint.files.entries.values())
    routers = checkpoint.num_blocks * experts * checkpoint.hidden_size
    return (dense + routers) * dtype.itemsize


def _copy_companions(source: Path, target: Path) -> None:
    for path in {path for pattern in COMPANIONS for path in source.glob(pattern)}:
        if path.is_file():
            shutil.copyfile(path, target / path.name)
