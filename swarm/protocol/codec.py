"""How hidden states travel: as they are, in 16 bits, or in 8 bits with a scale for every 64 numbers.

``int8`` is blockwise absmax quantization (Dettmers et al. 2022, arXiv:2110.02861, with linear levels): a number comes
back within 1/254 of the largest magnitude in its block; a block with a NaN or an infinity comes back as NaNs, so that
what has gone wrong stays visibly wrong. ``float16`` and ``bfloat16`` keep 11 and 8 significant bits.
Whatever is narrower than the numbers that are sent loses something, so none is used unless asked for.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from swarm.errors import ProtocolError

CODECS = ("float32", "float16", "bfloat16", "int8")
"""What may be asked for; nothing means: in the precision that the server computes in."""

_BLOCK = 64
_LEVELS = 127


def encode_hidden_states(hidden_states: torch.Tensor, codec: str | None) -> dict[str, torch.Tensor]:
    """`hidden_states` ``[batch, n, hidden]`` as the tensors of a message."""
    if codec is None:
        return {"hidden_states": hidden_states}
    if codec != "int8":
        return {"hidden_states": hidden_states.to(getattr(torch, codec))}
    blocks = _in_blocks(hidden_states.float())
    scales = (blocks.abs().amax(dim=-1) / _LEVELS).clamp(min=torch.finfo(torch.float32).tiny)
    scales = scales.where(scales.isfinite(), torch.nan)
    levels = (blocks / scales.unsqueeze(-1)).nan_to_num(0.0).round().to(torch.int8)
    return {"hidden_states": levels.flatten(2)[..., : hidden_states.shape[2]], "scales": scales}


def decode_hidden_states(tensors: dict[str, torch.Tensor], hidden_size: int) -> torch.Tensor:
    """What :func:`encode_hidden_states` made: ``[batch, n, hidden]``, floating-point.

    Raises:
        ProtocolError: missing, of another shape, or not numbers.
    """
    hidden_states = tensors.get("hidden_states")
    if hidden_states is None or hidden_states.dim() != 3 or hidden_states.shape[2] != hidden_size:
        raise ProtocolError(f"a message must carry hidden_states [batch, positions, {hidden_size}]")
    scales = tensors.get("scales")
    if hidden_states.is_floating_point() and scales is None:
        return hidden_states
    batch, count, _ = hidden_states.shape
    expected = (batch, count, -(-hidden_size // _BLOCK))
    if hidden_states.dtype != torch.int8 or scales is None or scales.dtype != torch.float32:
        raise ProtocolError("a message's hidden_states are neither floating-point numbers nor int8 with float32 scales")
    if tuple(scales.shape) != expected:
        raise ProtocolError(f"a message's scales must be {list(expected)}, not {list(scales.shape)}")
    return (_in_blocks(hidden_states.float()) * scales.unsqueeze(-1)).flatten(2)[..., :hidden_size]


def _in_blocks(hidden_states: torch.Tensor) -> torch.Tensor:
    """``[batch, n, hidden]`` → ``[batch, n, blocks, 64]``, padded with zeros."""
    padded = functional.pad(hidden_states, (0, -hidden_states.shape[2] % _BLOCK))
    return padded.reshape(*padded.shape[:2], padded.shape[2] // _BLOCK, _BLOCK)
