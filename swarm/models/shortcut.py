"""A short way through shells that do nothing but embed a token, normalise what the layers make of it, and multiply it
with the head.

A family's own forward also prepares what its layers need: masks, rotary embeddings, a cache. In a shell the layers are
elsewhere and nobody looks at that, yet for a single token it takes as long as everything else in Python. Whether the
short way gives the same logits, to the last bit, is tried when a shell is loaded.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from swarm.models.surgery import InPlaceOfLayers, find_base

logger = logging.getLogger(__name__)

_ATTRIBUTE = "_shortcut"
_KNOWN = {
    "input_ids", "past_key_values", "attention_mask", "position_ids", "use_cache", "logits_to_keep", "return_dict",
}  # fmt: skip
_MORE = ("output_hidden_states", "output_attentions")
_TOKENS, _POSITIONS = (1, 2, 3), (0, 5, 17)


def with_shortcut(family: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """`family`, but that its models take the short way where :func:`find_shortcut` has found one."""
    whole_way = family.forward

    @functools.wraps(whole_way)
    def forward(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        shortcut = shortcut_of(self)
        if shortcut is None or args or not shortcut.serves(self, kwargs):
            return whole_way(self, *args, **kwargs)
        return shortcut.run(self, kwargs["input_ids"], kwargs.get("past_key_values"))

    return type(family.__name__, (family,), {"forward": forward, "__module__": family.__module__})


def find_shortcut(shell: PreTrainedModel, family: type[PreTrainedModel]) -> None:
    """Let `shell`, whose class was made of ``with_shortcut(family)``, take the short way if it leads to the same."""
    layers, norms = _parts_of(shell)
    if layers is None or len(norms) != 1 or shell.get_output_embeddings() is None:
        return
    stand_in = getattr(find_base(shell), layers)[0]
    kept, stand_in.replacement = stand_in.replacement, _Twice()
    try:
        ids = torch.tensor(_TOKENS, device=shell.device).unsqueeze(1)
        where = {"position_ids": torch.tensor(_POSITIONS, device=shell.device).unsqueeze(1)}
        if "position_ids" not in inspect.signature(family.forward).parameters:
            where.clear()
        with torch.no_grad():
            expected = family.forward(shell, input_ids=ids, use_cache=False, return_dict=True, **where)
            shortcut = Shortcut(layers, norms[0], type(expected))
            found = shortcut.run(shell, ids, None)
        if torch.equal(found.logits, expected.logits):
            shell.__dict__[_ATTRIBUTE] = shortcut
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
        logger.info("the shell of %s has no short way: %s", family.__name__, error)
    finally:
        stand_in.replacement = kept


def shortcut_of(shell: PreTrainedModel) -> Shortcut | None:
    """The short way through `shell`, if there is one."""
    found: Shortcut | None = shell.__dict__.get(_ATTRIBUTE)
    return found


@dataclass(frozen=True)
class Shortcut:
    """Where the modules on the short way are found, for users may replace them."""

    layers: str
    """The name, in the base model, of the list with what stands in place of all layers."""
    norm: str
    """The name of the final norm."""
    output_class: type[ModelOutput]

    def serves(self, shell: PreTrainedModel, options: Mapping[str, Any]) -> bool:
        """Whether a call with these arguments asks for nothing but the logits of one position of each sequence."""
        ids, config = options.get("input_ids"), shell.config
        if ids is None or ids.dim() != 2 or ids.shape[1] != 1 or torch.is_grad_enabled():
            return False
        if any(value is not None and name not in _KNOWN for name, value in options.items()):
            return False
        if options.get("return_dict") is False or not (options.get("return_dict") or config.return_dict):
            return False
        base = find_base(shell)
        is_watched = base._forward_hooks or base._forward_pre_hooks
        return not (is_watched or any(getattr(config, name, False) for name in _MORE))

    def embed(self, shell: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
        """What enters the first layer, ``[batch, n, hidden]`` for token ids ``[batch, n]``."""
        embedded: torch.Tensor = shell.get_input_embeddings()(ids)
        return embedded

    def normed(self, shell: PreTrainedModel, hidden_states: torch.Tensor) -> torch.Tensor:
        """What enters the head, ``[batch, n, hidden]``, of what left the last layer."""
        result: torch.Tensor = getattr(find_base(shell), self.norm)(hidden_states)
        return result

    @torch.no_grad()
    def likeliest_after(self, shell: PreTrainedModel, output: torch.Tensor) -> tuple[int, torch.Tensor]:
        """(the token that most likely follows, what enters the first layer for it, ``[1, 1, hidden]``)

        Args:
            output: ``[1, 1, hidden]`` as it left the last layer, of a shell whose head looks ahead
                (:class:`~swarm.models.batched_head.BatchedHead`).
        """
        token = shell.get_output_embeddings().likeliest(self.normed(shell, output)[0])
        return token, self.embed(shell, torch.tensor([[token]]))

    def run(self, shell: PreTrainedModel, ids: torch.Tensor, past_key_values: Any) -> ModelOutput:
        """What `shell` returns for token ids ``[batch, 1]``."""
        hidden_states = getattr(find_base(shell), self.layers)[0].replacement(self.embed(shell, ids))
        logits = shell.get_output_embeddings()(self.normed(shell, hidden_states))
        return self.output_class(logits=logits, past_key_values=past_key_values)


class _Twice(nn.Module):
    """Layers, for a trial."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return 2 * hidden_states


def _parts_of(shell: PreTrainedModel) -> tuple[str | None, list[str]]:
    """(what stands in place of the layers, everything else that holds weights but the embedding), as named there."""
    base, layers, others = find_base(shell), None, list[str]()
    for name, child in base.named_children():
        if isinstance(child, nn.ModuleList) and any(isinstance(one, InPlaceOfLayers) for one in child):
            layers = name
        elif child is not shell.get_input_embeddings() and any(True for _ in child.parameters()):
            others.append(name)
    return layers, others
