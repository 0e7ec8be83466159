"""Load and run the decoder layers of one span."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache, PretrainedConfig, PreTrainedModel

from swarm.models.block_files import BlockFile, BlockKey
from swarm.models.checkpoint import Checkpoint
from swarm.models.experts.splitting import RoutedTables, cut_experts, route_experts, select
from swarm.models.file_form import FileForm
from swarm.models.loading import load_part, make_skeleton
from swarm.models.offload import WINDOW_BLOCKS, BlockStream, blocks_on_disk, spread
from swarm.models.quantization import QUANTIZED_LINEARS, quantize_linears
from swarm.models.surgery import NumberedLayers, find_base, keep_only_layers


class SpanCache(DynamicCache):
    """The KV cache of some consecutive layers that go by their numbers in the whole model."""

    def __init__(self, config: PretrainedConfig, first_layer: int) -> None:
        super().__init__(config=config)
        self._first_layer = first_layer

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        result: tuple[torch.Tensor, torch.Tensor] = super().update(
            key_states, value_states, layer_idx - self._first_layer, *args, **kwargs
        )
        return result

    @property
    def length(self) -> int:
        """Positions held."""
        return int(self.get_seq_length())

    def roll_back(self, position: int) -> bool:
        """Forget the positions from `position` on; False if a layer (a sliding window) has dropped what it needs."""
        surplus = self.length - position
        if surplus <= 0:
            return True
        if position == 0:  # begin anew, perhaps with another number of sequences
            self.reset()
            return True
        windows = [getattr(layer, "sliding_window", None) for layer in self.layers]
        if any(window is not None and self.length >= window for window in windows):
            return False
        self.crop(-surplus)
        return True

    @property
    def size_bytes(self) -> int:
        """What the keys and values occupy now."""
        return sum(
            tensor.numel() * tensor.element_size()
            for layer in self.layers
            for tensor in (layer.keys, layer.values)
            if tensor is not None
        )


@dataclass(frozen=True)
class Span:
    """Blocks ``[start, end)`` of a model, ready to run. Made by :func:`load_span`."""

    start: int
    end: int
    base: PreTrainedModel
    layers: tuple[nn.Module, ...]
    _whole_config: PretrainedConfig
    offloaded: Mapping[int, BlockStream] = field(default_factory=dict, hash=False)
    """What brings the weights of blocks that are in memory only while they run (:mod:`swarm.models.offload`). Their
    layers ask for them when they are called; whoever runs such a block in another way does."""

    @classmethod
    def over(
        cls,
        base: PreTrainedModel,
        layers: Sequence[nn.Module],
        start: int,
        config: PretrainedConfig,
        offloaded: Mapping[int, BlockStream] = MappingProxyType({}),
    ) -> Span:
        """A span that runs just `layers`, which are `start` and following of the model that `config` describes.

        It shares every module with `base`.
        """
        end = start + len(layers)
        shell = copy.copy(base)
        shell._modules = {
            name: nn.ModuleList(layers) if isinstance(child, nn.ModuleList) else child
            for name, child in base._modules.items()
        }
        shell.config = _cut_config(config, start, end)
        here = {block: stream for block, stream in offloaded.items() if start <= block < end}
        return cls(start, end, shell, tuple(layers), config, here)

    @cached_property  # transformers looks at every parameter until it finds one that tells
    def dtype(self) -> torch.dtype:
        """The precision of the hidden states that go in and come out."""
        return self.base.dtype

    @cached_property
    def device(self) -> torch.device:
        return self.base.device

    @property
    def weight_bytes(self) -> int:
        """What the weights that stay in memory occupy."""
        return sum(weight.numel() * weight.element_size() for weight in self.weights())

    def weights(self) -> Iterator[torch.Tensor]:
        """Every weight that stays in memory, the scales of quantized ones included."""
        for layer in self.staying_layers():
            yield from layer.parameters()
            for module in layer.modules():
                if isinstance(module, QUANTIZED_LINEARS):
                    yield from module.buffers(recurse=False)

    def staying_layers(self) -> Iterator[nn.Module]:
        """The layers whose weights stay in memory."""
        numbered = enumerate(self.layers, start=self.start)
        yield from (layer for block, layer in numbered if block not in self.offloaded)

    @cached_property
    def configs(self) -> tuple[PretrainedConfig, ...]:
        """All that the base model's loop over layers, and the layers themselves, look at."""
        found = [module.config for layer in self.layers for module in layer.modules() if hasattr(module, "config")]
        return tuple({id(config): config for config in (self.base.config, *found)}.values())

    def part(self, start: int, end: int) -> Span:
        """The same weights, fewer blocks: ``[start, end)`` must lie within this span."""
        if not self.start <= start < end <= self.end:
            raise ValueError(f"[{start}, {end}) does not lie within [{self.start}, {self.end})")
        if (start, end) == (self.start, self.end):
            return self
        layers = self.layers[start - self.start : end - self.start]
        return Span.over(self.base, layers, start, self._whole_config, self.offloaded)

    def take_out(self, start: int, end: int, room_bytes: int) -> dict[int, nn.Module]:
        """The layers of those of blocks ``[start, end)`` that are here, for another span; this one is to be dropped.

        On a CPU the weights of a whole span may lie in one run of memory, which lives as long as any of them: they are
        copied, and no more are taken than copies fit into `room_bytes`.
        """
        taken: dict[int, nn.Module] = {}
        for block in range(max(start, self.start), min(end, self.end)):
            if block in self.offloaded:
                continue
            weights = [weight for weight in self.part(block, block + 1).weights() if weight.layout is torch.strided]
            copied = weights if self.device.type == "cpu" else []
            room_bytes -= sum(weight.numel() * weight.element_size() for weight in copied)
            if room_bytes < 0:
                break
            for weight in copied:
                weight.data = weight.data.clone()
            taken[block] = self.layers[block - self.start]
        return taken

    def new_cache(self) -> SpanCache:
        """An empty KV cache for one session on this span."""
        return SpanCache(self.base.config, self.start)

    @torch.inference_mode()
    def forward(
        self,
        hidden_states: torch.Tensor,
        cache: Cache,
        position_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run the span's layers over new positions and append their keys and values to `cache`.

        Args:
            hidden_states: ``[batch, positions, hidden]``, in the span's dtype and on its device.
            position_ids: ``[batch, positions]`` int64; default: those that follow the cached ones.
            attention_mask: ``[batch, cached + positions]`` int64, 0 where there is padding; default: no padding.

        Returns:
            ``[batch, positions, hidden]``: the hidden states before block ``end`` (before the final norm,
            when the span ends the model).
        """
        arguments: dict[str, Any] = {"inputs_embeds": hidden_states, "past_key_values": cache, "use_cache": True}
        if position_ids is not None:
            arguments["position_ids"] = position_ids
        if attention_mask is not None:
            arguments["attention_mask"] = attention_mask
        outlet: list[torch.Tensor] = []

        def enter(
            _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            if args:
                return (hidden_states, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": hidden_states}

        def leave(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            outlet.append(output[0] if isinstance(output, tuple) else output)

        inlet = self.layers[0].register_forward_pre_hook(enter, with_kwargs=True)
        exit_ = self.layers[-1].register_forward_hook(leave)
        try:
            self.base(**arguments)
        finally:
            inlet.remove()
            exit_.remove()
        return outlet[0]


def load_span(
    checkpoint: Checkpoint,
    start: int,
    end: int,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    quantization: str | None = None,
    offloaded_blocks: int = 0,
    window_blocks: int = WINDOW_BLOCKS,
    reuse: Mapping[int, nn.Module] = MappingProxyType({}),
    routed: RoutedTables = MappingProxyType({}),
    on_elements: Callable[[int], object] = lambda _: None,
) -> Span:
    """Read the weights of blocks ``[start, end)``, check them against known digests, and make them runnable.

    Args:
        quantization: of the linear layers (:mod:`swarm.models.quantization`); done block by block, so that no more
            than one block is in memory as it was.
        offloaded_blocks: so many are not kept in memory, but read from disk whenever they run
            (:mod:`swarm.models.offload`); at least one must stay.
        window_blocks: for them, there is memory for so many blocks.
        reuse: layers by their blocks, from :meth:`Span.take_out` of a span that was loaded in the same way: they are
            not read again. At least one block must be. Not together with `offloaded_blocks`.
        routed: blocks whose routed experts are not all kept here, and those of them that are; the others' weights are
            not read. Not together with `offloaded_blocks` or `quantization`.
        on_elements: called with the number of elements of every tensor that was read, for a progress bar.

    Raises:
        CorruptCheckpoint: a tensor is missing or its block's checksum is wrong.
        UnsupportedFamily: the model's layers cannot be found, or cannot be offloaded.
        DiskError: there is no room on disk for the blocks that are not to stay in memory.
    """
    if not 0 <= start < end <= checkpoint.num_blocks:
        raise ValueError(f"[{start}, {end}) is not a span of a model with {checkpoint.num_blocks} blocks")
    if not 0 <= offloaded_blocks < end - start:
        raise ValueError(f"{offloaded_blocks} of {end - start} blocks cannot be offloaded: one must stay")
    reuse = {block: layer for block, layer in reuse.items() if start <= block < end}
    if len(reuse) == end - start or (reuse and offloaded_blocks):
        raise ValueError("layers can be reused only beside others that are read, and if none is offloaded")
    if routed and (offloaded_blocks or quantization):
        raise ValueError("experts can be elsewhere only if blocks are neither offloaded nor quantized")
    config = copy.deepcopy(checkpoint.config)
    config.tie_word_embeddings = False  # there is neither an embedding nor a head here

    def load(
        first: int, last: int, where: torch.device | str, form: FileForm | None = None
    ) -> tuple[PreTrainedModel, list[nn.Module]]:
        base, layers = _load_layers(checkpoint, config, first, last, dtype, where, routed, on_elements)
        for layer in layers:
            if form is not None:
                form.give_to(layer)
            elif quantization is not None:
                quantize_linears(layer, quantization)
        return base, layers

    offloaded = spread(start, end, offloaded_blocks)
    layers: dict[int, nn.Module] = dict(reuse)
    stream: BlockStream | None = None
    if offloaded:  # first, while there is memory for a block as it was
        layers = _layers_without_weights(config, offloaded)
        form = FileForm.best_for(layers.values(), dtype, torch.device(device), quantization)

        def load_for_file(block: int) -> nn.Module:
            return load(block, block + 1, "cpu", form)[1][0]

        files = _files_of(checkpoint, sorted(offloaded), dtype, form, load_for_file, on_elements)
        stream = BlockStream(files, window_blocks, torch.device(device))
        for block, layer in layers.items():
            form.give_to(layer)
            stream.attach(block, layer)
    for piece in _pieces(start, end, offloaded | reuse.keys(), whole=quantization is None):
        base, some = load(*piece, device)
        layers.update(zip(range(*piece), some, strict=True))
    return Span.over(
        base,
        [layers[block] for block in range(start, end)],
        start,
        base.config,
        dict.fromkeys(offloaded, stream) if stream else {},
    )


def _pieces(start: int, end: int, others: Container[int], *, whole: bool) -> list[tuple[int, int]]:
    """The blocks that are none of the `others`, as spans, as long as can be if they may be loaded as a `whole`, or else
    single ones."""
    pieces: list[tuple[int, int]] = []
    for block in (block for block in range(start, end) if block not in others):
        if whole and pieces and pieces[-1][1] == block:
            pieces[-1] = (pieces[-1][0], block + 1)
        else:
            pieces.append((block, block + 1))
    return pieces


def _files_of(
    checkpoint: Checkpoint,
    blocks: Sequence[int],
    dtype: torch.dtype,
    form: FileForm,
    load: Callable[[int], nn.Module],
    on_elements: Callable[[int], object],
) -> dict[int, BlockFile]:
    keys = {
        block: BlockKey(checkpoint.block_digest(block), checkpoint.config_digest, str(dtype), form.name)
        for block in blocks
    }
    files = blocks_on_disk(
        keys,
        load,
        lambda block: on_elements(checkpoint.block_elements(block)),
    )
    return {block: files[block] for block in blocks}


def _layers_without_weights(config: PretrainedConfig, blocks: Collection[int]) -> dict[int, nn.Module]:
    """On the meta device, by block."""
    spanned = range(min(blocks), max(blocks) + 1)
    skeleton = make_skeleton(copy.deepcopy(config), lambda whole: keep_only_layers(whole, spanned))
    numbered = next(child for child in find_base(skeleton).children() if isinstance(child, NumberedLayers))
    return {block: numbered.get_submodule(str(block)) for block in sorted(blocks)}


def _load_layers(
    checkpoint: Checkpoint,
    config: PretrainedConfig,
    start: int,
    end: int,
    dtype: torch.dtype,
    device: torch.device | str,
    routed: RoutedTables,
    on_elements: Callable[[int], object],
) -> tuple[PreTrainedModel, list[nn.Module]]:
    for block in range(start, end):
        checkpoint.verify(block)
    blocks = range(start, end)
    names = [name for block in blocks for name in checkpoint.tensor_names(block)]
    split = {block: routed[block] for block in blocks if block in routed}

    def cut(model: PreTrainedModel) -> None:
        keep_only_layers(model, blocks)
        cut_experts(dict(zip(blocks, _layers_of(find_base(model)), strict=True)), split)

    model = load_part(
        checkpoint, config, names, cut, dtype, device, on_elements, select=lambda tensors: select(tensors, split)
    )
    base = find_base(model)
    layers = _layers_of(base)
    route_experts(dict(zip(blocks, layers, strict=True)), split)
    checkpoint.files.release()  # what was read of them would count as this process's memory
    return base, layers


def _layers_of(base: PreTrainedModel) -> list[nn.Module]:
    return list(next(child for child in base.children() if isinstance(child, NumberedLayers)).children())


def _cut_config(config: PretrainedConfig, start: int, end: int) -> PretrainedConfig:
    """`config` as the base model's loop over its layers must see it: as many layers as there are, and their types."""
    cut = copy.deepcopy(config)
    layer_types = getattr(config, "layer_types", None)
    cut.num_hidden_layers = end - start
    if layer_types is not None:
        cut.layer_types = list(layer_types[start:end])
    return cut
