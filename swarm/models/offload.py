"""Run blocks that do not fit in memory: while one computes, the next one is read from disk.

Blocks run in the same order again and again, so what was used last is needed last, and a cache of what was used lately
would never hold what comes next. So as many blocks as fit stay in memory for good, spread among the others, and those
pass through a small window: a thread brings them in the order of the last pass, just before they run, and drops them
once they have run. A batch of sessions runs a block as a whole, so its weights are read once for all of them.

On the CPU, a block's file is mapped, and its tensors stay at their addresses: whoever computes with them at any time
gets the right numbers, and the window only decides what is in memory. Maps won over preadv(2) into buffers of huge
pages: files that are in the page cache are not copied (22 blocks of SmolLM2 took 22 ms instead of 32), and no page is
in memory twice.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from swarm.errors import DiskError, UnsupportedFamily
from swarm.models.block_files import BlockFile, BlockKey, open_block, prepare_directory, write_block
from swarm.models.weight_layout import shapes_faster_transposed

WINDOW_BLOCKS = 2
"""One is computed with while the next is read."""


def spread(start: int, end: int, count: int) -> frozenset[int]:
    """`count` of the blocks ``[start, end)``, as evenly as can be, so that those that stay give the disk time."""
    length = end - start
    return frozenset(
        start + index for index in range(length) if (index + 1) * count // length > index * count // length
    )


def blocks_on_disk(
    keys: Mapping[int, BlockKey], load: Callable[[int], nn.Module], on_reused: Callable[[int], object] = lambda _: None
) -> dict[int, BlockFile]:
    """The files of some blocks; those that there are not yet (or not intact) are made.

    Args:
        keys: by block.
        load: gives a block with its weights as they are to be served, on the CPU.
        on_reused: called with each block whose file was there.

    Raises:
        DiskError: there is no room for all of them, or no permission; of what was written, nothing is left.
    """
    files = {block: file for block, key in keys.items() if (file := open_block(key)) is not None}
    for block in files:
        on_reused(block)
    missing = [block for block in keys if block not in files]
    transposed = _shapes_transposed_in(files.values()) if files else None
    written = []
    try:
        for block in missing:
            layer = load(block)
            if not written:
                sizes = [tensor.numel() * tensor.element_size() for tensor in _tensors_of(layer).values()]
                prepare_directory(len(missing) * sum(sizes))
            if transposed is None:
                transposed = shapes_faster_transposed(layer, len(keys))
            written.append(write_block(keys[block], _tensors_of(layer), transposed))
            del layer
            file = open_block(keys[block])
            if file is None:
                raise DiskError(f"{keys[block].path} is not what was written there a moment ago: check the disk.")
            files[block] = file
    except DiskError:
        for path in written:
            path.unlink(missing_ok=True)
        raise
    return files


class BlockStream:
    """Blocks that take turns in memory. Used by one thread at a time.

    :meth:`attach` makes a layer fetch its own weights; whoever runs a block in another way calls :meth:`fetch` before
    and :meth:`let_go` after.
    """

    def __init__(self, files: Mapping[int, BlockFile], window: int, device: torch.device) -> None:
        """
        Args:
            files: by block, in the order in which they will run.
            window: so many blocks may be in memory at the same time.
        """
        kind = _CudaWindow if device.type == "cuda" else _MappedWindow
        self._window: _Window = kind(files, window, device)
        self._free = list(range(window))
        self._coming: deque[_Coming] = deque()
        self._current: _Coming | None = None
        blocks = list(files)
        self._following = dict(zip(blocks, [*blocks[1:], blocks[0]], strict=True))
        self._last = blocks[-1]
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="offload")  # ends when this object is gone

    def attach(self, block: int, layer: nn.Module) -> None:
        """Let `layer`, which is on the meta device, have the weights of `block` whenever it runs.

        Raises:
            UnsupportedFamily: it holds tensors that were not read from the checkpoint.
        """
        held = dict(layer.named_parameters()) | dict(layer.named_buffers())
        views = self._window.views(block)
        if strange := held.keys() ^ views.keys():
            raise UnsupportedFamily(
                f"Blocks of this model cannot be offloaded, because {', '.join(sorted(strange)[:3])} would have to be "
                "computed, not read. Leave --offload out."
            )
        self._window.bind(block, {name: _replace(layer, name, view) for name, view in views.items()})
        layer.register_forward_pre_hook(lambda *_: self.fetch(block))
        layer.register_forward_hook(lambda *_: self.let_go())

    def fetch(self, block: int) -> None:
        """Wait until the weights of `block` are here, to stay until :meth:`let_go`.

        Raises:
            DiskError: they cannot be read. The next attempt tries again.
        """
        self.let_go()  # what a step that failed half-way did not
        if not self._coming or self._coming[0].block != block:
            self._turn_to(block)
        self._following[self._last] = block
        self._last = block
        self._current = coming = self._coming.popleft()
        coming.reading.result()
        self._window.begin(block, coming.place)

    def let_go(self) -> None:
        """The block that was fetched last has run: another may take its place."""
        if self._current is None:
            return
        self._window.end(self._current.place)
        self._free.append(self._current.place)
        self._current = None
        self._read_ahead(self._following[self._coming[-1].block if self._coming else self._last])

    def _turn_to(self, block: int) -> None:
        """Something else runs than did the last time (a part of the span, or the beginning again)."""
        for coming in self._coming:
            coming.reading.cancel()  # one that has begun ends before its place is filled again: there is one thread
            self._free.append(coming.place)
        self._coming.clear()
        self._read_ahead(block)

    def _read_ahead(self, block: int) -> None:
        while self._free:
            place = self._free.pop()
            self._coming.append(_Coming(block, place, self._reader.submit(self._window.fill, place, block)))
            block = self._following[block]


@dataclass(frozen=True)
class _Coming:
    block: int
    place: int
    reading: Future[None]


class _Window(Protocol):
    """Places in memory, each of which holds one block at a time."""

    def views(self, block: int) -> dict[str, torch.Tensor]:
        """The tensors of a block, in some place."""

    def bind(self, block: int, tensors: dict[str, torch.Tensor]) -> None:
        """Tell which tensors of a layer are to be the block's."""

    def fill(self, place: int, block: int) -> None:
        """(reading thread) Read a block in the place of another."""

    def begin(self, block: int, place: int) -> None:
        """Computation with the block begins."""

    def end(self, place: int) -> None:
        """Computation has been submitted; the place may be filled once it is done."""


class _MappedWindow:
    """Maps of the files. A place is just a number: which block's pages are in memory on its account."""

    def __init__(self, files: Mapping[int, BlockFile], window: int, device: torch.device) -> None:
        self._files = dict(files)
        self._held: list[int | None] = [None] * window

    def views(self, block: int) -> dict[str, torch.Tensor]:
        return self._files[block].views_in(self._files[block].memory)

    def bind(self, block: int, tensors: dict[str, torch.Tensor]) -> None:
        pass

    def fill(self, place: int, block: int) -> None:
        held, self._held[place] = self._held[place], block
        if held is not None and held not in self._held:
            self._files[held].drop()
        self._files[block].bring()

    def begin(self, block: int, place: int) -> None:
        pass

    def end(self, place: int) -> None:
        pass


class _CudaWindow:
    """Buffers on a CUDA device, where a layer's tensors are when it runs, and pinned memory on the way there.

    Reading, copying and computing overlap: copies have a stream of their own, and wait for computations, and
    computations for copies, on the device. (No test runs this: none of our machines has such a device.)
    """

    def __init__(self, files: Mapping[int, BlockFile], window: int, device: torch.device) -> None:
        room = max(file.memory.numel() for file in files.values())
        self._files, self._device = dict(files), device
        self._buffers = [torch.empty(room, dtype=torch.uint8, device=device) for _ in range(window)]
        self._pinned = [torch.empty(room, dtype=torch.uint8, pin_memory=True) for _ in range(window)]
        self._stream = torch.cuda.Stream(device)
        self._copied = [torch.cuda.Event() for _ in range(window)]
        self._computed = [torch.cuda.Event() for _ in range(window)]
        self._bindings: dict[int, list[tuple[torch.Tensor, list[torch.Tensor]]]] = {}

    def views(self, block: int) -> dict[str, torch.Tensor]:
        return self._files[block].views_in(self._buffers[0])

    def bind(self, block: int, tensors: dict[str, torch.Tensor]) -> None:
        views = [self._files[block].views_in(buffer) for buffer in self._buffers]
        self._bindings[block] = [(tensor, [of_place[name] for of_place in views]) for name, tensor in tensors.items()]

    def fill(self, place: int, block: int) -> None:
        file, size = self._files[block], self._files[block].memory.numel()
        self._copied[place].synchronize()  # what was in the pinned memory is on the device
        file.bring()
        self._pinned[place][:size].copy_(file.memory)
        file.drop()
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._computed[place])
            self._buffers[place][:size].copy_(self._pinned[place][:size], non_blocking=True)
            self._copied[place].record(self._stream)

    def begin(self, block: int, place: int) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._copied[place])
        for tensor, of_places in self._bindings[block]:
            tensor.data = of_places[place]

    def end(self, place: int) -> None:
        self._computed[place].record(torch.cuda.current_stream(self._device))


def _tensors_of(layer: nn.Module) -> dict[str, torch.Tensor]:
    """What a checkpoint has of it, each tensor once, although modules may be parts of several others."""
    once = dict(layer.named_parameters()) | dict(layer.named_buffers())
    return {name: tensor for name, tensor in layer.state_dict().items() if name in once}


def _replace(layer: nn.Module, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Put `tensor` where `layer` has its parameter or buffer `name`; return what is there then."""
    path, _, leaf = name.rpartition(".")
    module = layer.get_submodule(path)
    if leaf in module._buffers:
        module._buffers[leaf] = held = tensor.view_as(tensor)
        return held
    held = nn.Parameter(tensor, requires_grad=False)
    module._parameters[leaf] = held
    return held


def _shapes_transposed_in(files: Iterable[BlockFile]) -> set[torch.Size]:
    return {torch.Size(tensor.shape) for file in files for tensor in file.tensors if tensor.transposed}
