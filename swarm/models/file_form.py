"""How the weights of a block lie in its file: as compiled code takes them, where it can run the block."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from swarm.models.llama_blocks import fuse_projections_of, is_like_llama
from swarm.models.native.panels import can_use_panels
from swarm.models.quantization import form_in_files, quantize_linears
from swarm.models.weight_layout import lay_in_panels


@dataclass(frozen=True)
class FileForm:
    """Given to a block with weights before they are written, and to one without (meta device), which is to have them.

    Attributes:
        quantization: of the linear layers.
        for_compiled_code: its projections are fused, and weights in float32 lie in panels.
    """

    quantization: str | None
    for_compiled_code: bool

    @classmethod
    def best_for(
        cls, blocks: Iterable[nn.Module], dtype: torch.dtype, device: torch.device, quantization: str | None
    ) -> FileForm:
        """For `blocks` as transformers makes them, which compute on `device` of this machine."""
        compiled = device.type == "cpu" and can_use_panels(dtype) and all(map(is_like_llama, blocks))
        return cls(quantization, compiled)

    @property
    def name(self) -> str | None:
        """What has another name is another file. None: as they are in the checkpoint."""
        parts = [form_in_files(self.quantization), "compiled" if self.for_compiled_code else None]
        return "-".join(filter(None, parts)) or None

    def give_to(self, block: nn.Module) -> None:
        """Change a block, in place."""
        if self.for_compiled_code:
            fuse_projections_of(block)
        if self.quantization is not None:
            quantize_linears(block, self.quantization, for_file=True)
        elif self.for_compiled_code:
            lay_in_panels(block)
