"""Lay weights in RAM as a decode step, which reads every one of them, reads them fastest on this machine.

Three things matter: in which order the elements of a matrix lie, in which blocks, and huge pages. A matrix can stay as
it was loaded, or be transposed (BLAS libraries multiply some shapes by a vector faster that way), or be packed into the
blocks in which oneDNN multiplies (:mod:`swarm.models.packed_linear`), or lie in the panels of what is compiled for this
machine (:mod:`swarm.models.native.panels`). Each shape is timed here in all ways, with one row and with several. The
values stay what they were.
"""

from __future__ import annotations

import functools
import logging
import mmap
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from enum import Enum
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from swarm.models.choices import Situation, choice, least_s
from swarm.models.native.panels import PanelLinear, can_use_panels
from swarm.models.packed_linear import LinearWithCopy, PackedLinear, can_pack, multiply, pack

if TYPE_CHECKING:
    from swarm.models.span import Span

logger = logging.getLogger(__name__)

_HUGE_PAGE_BYTES = 2 * 1024**2
_ALIGNMENT_BYTES = 64
_SAMPLE_BYTES = 48 * 1024**2
"""Shapes are timed over this much, which no cache holds."""
_ROWS = (1, 4)
"""One user, and several."""
_WORTHWHILE = 0.9
"""Change a shape when that takes at most this share of the time."""
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}
_HALF_TOLERANCE = 5e-2
_WORTH_OF_PANELS = 0.7
"""Their time counts so much of what it is: with all weights in panels a decode step is one call, which saves more."""
_MAX_SECOND_COPY_BYTES = 512 * 1024**2


class Layout(Enum):
    """How a matrix lies in memory."""

    AS_LOADED = "as loaded"
    TRANSPOSED = "transposed"
    PACKED = "packed"
    PANELS = "in panels"


Layouts = dict[torch.Size, Layout]


def lay_out_span(span: Span, hidden_size: int, choose: Callable[[Sequence[nn.Module]], Layouts] | None = None) -> None:
    """Move the weights of `span` to where, and into the order in which, they are read fastest.

    Does nothing for weights on a device, or in an order of oneDNN's own. The span's output is compared before and
    after: sums in another order may differ in the last bits, and anything more makes this warn and put the elements
    back in their order.

    Args:
        choose: says how the matrices of some layers are to lie, by their shapes; default: timed here. What this
            machine can't pack stays as it was loaded.
    """
    if span.device.type == "cpu":
        probe = _probe(hidden_size, span.dtype)
        places = [place for layer in span.staying_layers() for place in _places(layer)]
        layouts = (choose or fastest_layouts)([getattr(parent, name) for parent, name in places])
        before = _run(span, probe)
        for parent, name in places:
            layout = layouts.get(_matrix(getattr(parent, name)).shape, Layout.AS_LOADED)
            setattr(parent, name, _in_blocks(getattr(parent, name), layout))
        transposed = {shape for shape, layout in layouts.items() if layout is Layout.TRANSPOSED}
        _lay_in_huge_pages([weight for weight in span.weights() if weight.layout is torch.strided], transposed)
        if not _is_close(_run(span, probe), before):
            _put_back(places)


def lay_out_head(head: nn.Linear) -> nn.Linear:
    """Likewise for the layer that makes logits; returns what is to stand in its place.

    Its own weights, which it may share with the embedding, stay where they are. If they are not too many, there is a
    second, packed copy.
    """
    if head.weight.device.type != "cpu":
        return head
    probe = _probe(head.in_features, head.weight.dtype)
    with torch.inference_mode():
        before = head(probe)
    layout = fastest_layouts([head]).get(head.weight.shape, Layout.AS_LOADED)
    if _room(head.weight) <= _MAX_SECOND_COPY_BYTES and (copy := _in_blocks(head, layout)) is not head:
        in_blocks = LinearWithCopy(head, copy)
        with torch.inference_mode():
            return in_blocks if _is_close(in_blocks(probe), before) else head
    _lay_in_huge_pages([head.weight], {head.weight.shape} if layout is Layout.TRANSPOSED else ())
    with torch.inference_mode():
        if not _is_close(head(probe), before):
            head.weight.data = head.weight.data.contiguous()
    return head


def shapes_faster_transposed(block: nn.Module, count: int) -> set[torch.Size]:
    """The shapes of linear layers that `count` blocks like this one, on the CPU, are best read transposed in.

    For blocks that are not in memory together: they are timed over copies of this one's weights. Shapes whose results
    would change by more than the last bits are not among them.
    """
    linears = [module for module in block.modules() if isinstance(module, nn.Linear)]
    if count * sum(_room(linear.weight) for linear in linears) < _SAMPLE_BYTES:
        return set()
    return {
        shape
        for shape, weight in {linear.weight.shape: linear.weight.data for linear in linears}.items()
        if _stays_the_same_transposed(weight) and _is_faster_transposed(weight)
    }


def lay_in_panels(layer: nn.Module) -> None:
    """Let all linear layers of `layer` have their weights in panels, whether they have any yet or not (meta device)."""
    for parent, name in _places(layer):
        linear = getattr(parent, name)
        setattr(parent, name, PanelLinear(_matrix(linear), linear.bias))


def huge_page_memory(size_bytes: int) -> torch.Tensor:
    """Memory ``[size_bytes]`` uint8 that begins on a huge page, and consists of them where the kernel has them."""
    arena = _arena(size_bytes + _HUGE_PAGE_BYTES)
    offset = -arena.data_ptr() % _HUGE_PAGE_BYTES
    return arena[offset : offset + size_bytes]


def fastest_layouts(linears: Sequence[nn.Module]) -> Layouts:
    """The fastest layout of every shape among `linears`; panels for all, if they are the fastest for most weights."""
    by_shape: dict[torch.Size, list[torch.Tensor]] = defaultdict(list)
    for linear in linears:
        by_shape[_matrix(linear).shape].append(_matrix(linear))
    if sum(_room(weight) for weights in by_shape.values() for weight in weights) < _SAMPLE_BYTES:
        return {}  # caches hold all of it: nothing to gain
    layouts = {shape: _remembered_fastest(weights) for shape, weights in by_shape.items()}
    sizes = {shape: sum(map(_room, weights)) for shape, weights in by_shape.items()}
    in_panels = sum(sizes[shape] for shape, layout in layouts.items() if layout is Layout.PANELS)
    return dict.fromkeys(layouts, Layout.PANELS) if 2 * in_panels > sum(sizes.values()) else layouts


def _remembered_fastest(weights: Sequence[torch.Tensor], others: Collection[Layout] = tuple(Layout)) -> Layout:
    """As :func:`_fastest`, timed once on this machine for every shape."""
    one = weights[0]
    possible = [layout for layout in Layout if layout is not Layout.PANELS or can_use_panels(one.dtype)]
    options = [layout.value for layout in possible if layout is Layout.AS_LOADED or layout in others]
    situation = Situation.here(f"layout-{str(one.dtype).removeprefix('torch.')}", one.shape, one.device, options)
    return Layout(choice(situation, lambda: _fastest(weights, others).value))


@torch.inference_mode()
def _fastest(weights: Sequence[torch.Tensor], others: Collection[Layout] = tuple(Layout)) -> Layout:
    """The fastest of `others` for these, all of one shape, unless they are better left as they are."""
    one = weights[0]
    rows = _SAMPLE_BYTES // (one.shape[1] * one.element_size())  # of a very large one, a part will do
    plain = [weight[:rows] for weight in weights[: -(-_SAMPLE_BYTES // _room(one))]]
    best, best_share = Layout.AS_LOADED, _WORTHWHILE
    for layout in others:
        if layout is Layout.TRANSPOSED:
            share = _share(plain, [weight.t().contiguous().t() for weight in plain], functional.linear)
        elif layout is Layout.PACKED and can_pack(one.dtype):
            share = _share(plain, [pack(weight.contiguous()) for weight in plain], multiply)
        elif layout is Layout.PANELS and can_use_panels(one.dtype):
            in_panels = [PanelLinear(weight, None) for weight in plain]
            share = _WORTH_OF_PANELS * _share(plain, in_panels, lambda rows, linear: linear(rows))
        else:
            continue
        if share < best_share:
            best, best_share = layout, share
    return best


_Multiply = Callable[[torch.Tensor, Any], torch.Tensor]


def _share(plain: Sequence[torch.Tensor], other: Sequence[object], multiply_other: _Multiply) -> float:
    """How long multiplications take with `other`, over how long they take with `plain`; of each the best of several."""
    vectors = [torch.ones(count, plain[0].shape[1], dtype=plain[0].dtype) for count in _ROWS]
    plain_s = {(False, len(rows)): functools.partial(_multiply_all, plain, rows, functional.linear) for rows in vectors}
    other_s = {(True, len(rows)): functools.partial(_multiply_all, other, rows, multiply_other) for rows in vectors}
    best = least_s({**plain_s, **other_s})
    return sum(best[way] for way in other_s) / sum(best[way] for way in plain_s)


def _multiply_all(weights: Sequence[object], rows: torch.Tensor, multiply_one: _Multiply) -> None:
    for weight in weights:
        multiply_one(rows, weight)


def _is_faster_transposed(weight: torch.Tensor) -> bool:
    copies = [weight.clone() for _ in range(-(-_SAMPLE_BYTES // _room(weight)))]
    return _remembered_fastest(copies, (Layout.TRANSPOSED,)) is Layout.TRANSPOSED


def _stays_the_same_transposed(weight: torch.Tensor) -> bool:
    probe = _probe(weight.shape[1], weight.dtype)
    plain = functional.linear(probe, weight)
    return _is_close(functional.linear(probe, weight.t().contiguous().t()), plain)


def _places(layer: nn.Module) -> list[tuple[nn.Module, str]]:
    """Where the linear layers of `layer` are: (parent, name). Those that do more than multiply (routers) are none."""
    return [
        (parent, name)
        for parent in layer.modules()
        for name, child in parent.named_children()
        if type(child).forward in (nn.Linear.forward, Conv1D.forward)
    ]


def _matrix(linear: nn.Module) -> torch.Tensor:
    """``[outputs, inputs]``"""
    weight: torch.Tensor = linear.weight.data
    return weight.t() if isinstance(linear, Conv1D) else weight


@torch.inference_mode()
def _run(span: Span, probe: torch.Tensor) -> torch.Tensor:
    return span.forward(probe, span.new_cache())


def _probe(hidden_size: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(1, 1, hidden_size, generator=torch.Generator().manual_seed(0)).to(dtype)


def _is_close(after: torch.Tensor, before: torch.Tensor) -> bool:
    error = float((after - before).float().norm() / before.float().norm())
    close = error <= _TOLERANCE.get(before.dtype, _HALF_TOLERANCE)
    if not close:
        logger.warning("another layout of the weights changes the result by %.1e on this machine: not used", error)
    return close


def _in_blocks(linear: nn.Module, layout: Layout) -> nn.Module:
    """A layer that does what `linear` does, with weights packed or in panels; itself, where that cannot be."""
    dtype = linear.weight.dtype
    if layout is Layout.PACKED and can_pack(dtype):
        return PackedLinear(linear)
    if layout is Layout.PANELS and can_use_panels(dtype):
        return PanelLinear(_matrix(linear), linear.bias)
    return linear


def _put_back(places: Sequence[tuple[nn.Module, str]]) -> None:
    for parent, name in places:
        linear = getattr(parent, name)
        if isinstance(linear, PackedLinear | PanelLinear):
            setattr(parent, name, linear.plain())
        else:
            linear.weight.data = linear.weight.data.contiguous()


def _lay_in_huge_pages(weights: Sequence[torch.Tensor], transpose: Collection[torch.Size]) -> None:
    """Move `weights` into one run of memory, in huge pages where the kernel has them (madvise(2))."""
    arena, offset = huge_page_memory(sum(_room(weight) for weight in weights)), 0
    for weight in weights:
        place = arena[offset : offset + weight.numel() * weight.element_size()].view(weight.dtype)
        if weight.shape in transpose:
            weight.data = place.view(weight.shape[::-1]).copy_(weight.data.t()).t()
        else:
            weight.data = place.view(weight.shape).copy_(weight.data)
        offset += _room(weight)


def _arena(size_bytes: int) -> torch.Tensor:
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size_bytes, dtype=torch.uint8)
    memory = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared memory gets none
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:
        logger.debug("this kernel has no transparent huge pages")
    return torch.frombuffer(memory, dtype=torch.uint8)


def _room(weight: torch.Tensor) -> int:
    size = weight.numel() * weight.element_size()
    return -(-size // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
