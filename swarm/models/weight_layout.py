"""Lay weights in RAM as a decode step, which reads every one of them, reads them fastest on this machine.

Two things matter: huge pages, and for some shapes the order of the elements (15 blocks of SmolLM2, fp32, one thread:
27 ms a step became 22; its head: 10 ms became 6). BLAS libraries multiply a matrix by one vector faster when the
matrix is stored column by column for some shapes, and slower for others, so each shape is timed here both ways. The
values stay what they were.
"""

from __future__ import annotations

import logging
import mmap
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

if TYPE_CHECKING:
    from swarm.models.span import Span

logger = logging.getLogger(__name__)

_HUGE_PAGE_BYTES = 2 * 1024**2
_ALIGNMENT_BYTES = 64
_SAMPLE_BYTES = 64 * 1024**2
"""Shapes are timed over this much, which no cache holds."""
_ROUNDS = 5
_WORTHWHILE = 0.9
"""Transpose a shape when that takes at most this share of the time."""
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}
_HALF_TOLERANCE = 5e-2


def lay_out_span(span: Span, hidden_size: int) -> None:
    """Move the weights of `span` to where, and into the order in which, they are read fastest.

    Does nothing for weights on a device. The span's output is compared before and after: sums in another order may
    differ in the last bits, and anything more makes this warn and put the elements back in their order.
    """
    if span.device.type == "cpu":
        probe = _probe(hidden_size, span.dtype)
        _lay_out(list(span.linears()), list(span.weights()), lambda: span.forward(probe, span.new_cache()))


def shapes_faster_transposed(block: nn.Module, count: int) -> set[torch.Size]:
    """The shapes of linear layers that `count` blocks like this one, on the CPU, are best read transposed in.

    For blocks that are not in memory together: they are timed over copies of this one's weights. Shapes whose results
    would change by more than the last bits are not among them.
    """
    linears = [module for module in block.modules() if isinstance(module, nn.Linear)]
    if count * sum(_room(linear.weight) for linear in linears) < _SAMPLE_BYTES:
        return set()
    of_each = {linear.weight.shape: linear.weight.data for linear in linears}
    return {
        shape
        for shape, weight in of_each.items()
        if _stays_the_same_transposed(weight)
        and _is_faster_transposed([weight.clone() for _ in range(-(-_SAMPLE_BYTES // _room(weight)))])
    }


def huge_page_memory(size_bytes: int) -> torch.Tensor:
    """Memory ``[size_bytes]`` uint8 that begins on a huge page, and consists of them where the kernel has them."""
    arena = _arena(size_bytes + _HUGE_PAGE_BYTES)
    offset = -arena.data_ptr() % _HUGE_PAGE_BYTES
    return arena[offset : offset + size_bytes]


def lay_out_head(head: nn.Module | None) -> None:
    """Likewise for the layer that makes logits, if it is a linear one."""
    if isinstance(head, nn.Linear) and head.weight.device.type == "cpu":
        probe = _probe(head.in_features, head.weight.dtype)
        _lay_out([head], [head.weight], lambda: head(probe))


@torch.inference_mode()
def _lay_out(linears: Sequence[nn.Linear], weights: Sequence[nn.Parameter], run: Callable[[], torch.Tensor]) -> None:
    before = run()
    _lay_in_huge_pages(weights, _shapes_faster_transposed(linears))
    error = _difference(run(), before)
    if not error <= _TOLERANCE.get(before.dtype, _HALF_TOLERANCE):
        logger.warning("transposed weights change the result by %.1e on this machine: not used", error)
        for linear in linears:
            linear.weight.data = linear.weight.data.contiguous()


def _probe(hidden_size: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(1, 1, hidden_size, generator=torch.Generator().manual_seed(0)).to(dtype)


def _shapes_faster_transposed(linears: Sequence[nn.Linear]) -> set[torch.Size]:
    by_shape: dict[torch.Size, list[torch.Tensor]] = defaultdict(list)
    for linear in linears:
        by_shape[linear.weight.shape].append(linear.weight.data)
    if sum(_room(linear.weight) for linear in linears) < _SAMPLE_BYTES:
        return set()  # caches hold all of it: nothing to gain
    return {shape for shape, weights in by_shape.items() if _is_faster_transposed(weights)}


def _is_faster_transposed(weights: Sequence[torch.Tensor]) -> bool:
    one = weights[0]
    rows = _SAMPLE_BYTES // (one.shape[1] * one.element_size())  # of a very large one, a part will do
    plain = [weight[:rows] for weight in weights[: -(-_SAMPLE_BYTES // _room(one))]]
    transposed = [weight.t().contiguous().t() for weight in plain]
    vector = torch.ones(1, 1, one.shape[1], dtype=one.dtype)
    ratios = [_time(transposed, vector) / _time(plain, vector) for _ in range(_ROUNDS)]
    return statistics.median(ratios) <= _WORTHWHILE


def _stays_the_same_transposed(weight: torch.Tensor) -> bool:
    probe = _probe(weight.shape[1], weight.dtype)
    plain = functional.linear(probe, weight)
    transposed = functional.linear(probe, weight.t().contiguous().t())
    return _difference(transposed, plain) <= _TOLERANCE.get(weight.dtype, _HALF_TOLERANCE)


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).float().norm() / expected.float().norm())


def _time(weights: Sequence[torch.Tensor], vector: torch.Tensor) -> float:
    begun = time.perf_counter()
    for weight in weights:
        functional.linear(vector, weight)
    return time.perf_counter() - begun


def _lay_in_huge_pages(weights: Sequence[nn.Parameter], transpose: set[torch.Size]) -> None:
    """Move `weights` into one run of memory, in huge pages where the kernel has them (madvise(2))."""
    arena = huge_page_memory(sum(_room(weight) for weight in weights))
    offset = 0
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
