"""What is compiled of C, as Python calls it (ctypes). The structures are those of ``native.h``."""

from __future__ import annotations

import ctypes
import functools
import logging
from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_void_p
from enum import Enum

import torch

from swarm.models.choices import Situation, choice, least_s
from swarm.models.native.building import compiled_library

logger = logging.getLogger(__name__)

PANEL = 32
"""Outputs of a linear layer that lie side by side in memory."""
FLOATS, BYTES, NIBBLES = range(3)
"""Kinds of weights."""
_SAMPLE_OUTPUTS, _SAMPLE_INPUTS = 8192, 1536
"""Fetching is timed over 48 MiB."""
_ROUNDS = 8
_WORTHWHILE = 0.9
"""Go through the caches where that takes at most this share of the time: what runs next finds less in them."""


class Fetching(Enum):
    """How weights that are read once come to where they are multiplied.

    ms for 48 MiB and one row: 10.2 past the outer caches and 3.9 through them on a Xeon (Sapphire Rapids). On an EPYC
    (Zen 5), past them, it spares the Python around a step, whose code and data they keep, more than the step itself.
    """

    PAST_CACHES = "past the outer caches"
    THROUGH_CACHES = "through all caches"


class Linear(Structure):
    """A linear layer, by the addresses of its tensors."""

    _fields_ = (
        ("kind", c_int32), ("outputs", c_int32), ("inputs", c_int32),
        ("weight", c_void_p), ("scale", c_void_p), ("bias", c_void_p),
    )  # fmt: skip


class Norm(Structure):
    """A root mean square norm."""

    _fields_ = (("weight", c_void_p), ("eps", c_float))


class Block(Structure):
    """A decoder block."""

    _fields_ = (
        ("query_key_value", Linear), ("attention_out", Linear), ("gate_up", Linear), ("down", Linear),
        ("before_attention", Norm), ("before_mlp", Norm), ("of_query", Norm), ("of_key", Norm),
        ("heads", c_int32), ("key_heads", c_int32), ("size", c_int32), ("rotates", c_int32),
        ("scaling", c_float), ("window", c_int32), ("keys", c_void_p), ("values", c_void_p), ("slots", c_int64),
    )  # fmt: skip


class Sequence(Structure):
    """Rows of a step that are neighbouring positions of one sequence."""

    _fields_ = (
        ("first_row", c_int64), ("rows", c_int64), ("before", c_int64), ("runs", c_void_p), ("run_count", c_int64),
    )  # fmt: skip


class Step(Structure):
    """Positions to run."""

    _fields_ = (
        ("rows", c_int64), ("hidden", c_int64), ("states", c_void_p), ("cos", c_void_p), ("sin", c_void_p),
        ("positions", c_void_p), ("slots", c_void_p), ("sequences", POINTER(Sequence)), ("sequence_count", c_int64),
    )  # fmt: skip


class Library:
    """The functions; they let other Python threads run meanwhile."""

    def __init__(self, path: str) -> None:
        library = ctypes.CDLL(path)
        self._linear, self._blocks = library.swarm_linear, library.swarm_blocks
        self._linear.argtypes = (POINTER(Linear), c_void_p, c_int64, c_void_p, c_int32)
        self._blocks.argtypes = (POINTER(Block), c_int64, POINTER(Step), c_int32)
        self._fetch_past_caches = library.swarm_fetch_past_caches
        self._fetch_past_caches.argtypes, self._fetch_past_caches.restype = (c_int32,), None

    def linear(self, linear: Linear, rows: int, count: int, product: int, threads: int) -> None:
        """``swarm_linear``, with the addresses of float32 ``[count, inputs]`` and ``[count, outputs]``.

        Raises:
            MemoryError
        """
        if self._linear(linear, rows, count, product, threads):
            raise MemoryError(f"no memory to multiply {count} rows")

    def blocks(self, blocks: ctypes.Array[Block], step: Step, threads: int) -> None:
        """``swarm_blocks``.

        Raises:
            MemoryError
        """
        if self._blocks(blocks, len(blocks), step, threads):
            raise MemoryError(f"no memory to run {step.rows} positions")

    def fetch(self, fetching: Fetching) -> None:
        """From now on, fetch weights that are read once in this way."""
        self._fetch_past_caches(fetching is Fetching.PAST_CACHES)


@functools.cache
def library() -> Library | None:
    """The one for this machine; None: there is none, and the reason was logged."""
    path = compiled_library()
    try:
        found = Library(str(path)) if path is not None else None
    except (OSError, AttributeError) as error:
        logger.warning("what was compiled for this machine cannot be used, it will be slower: %s", error)
        return None
    if found is not None:
        found.fetch(_fastest_fetching(found))
    return found


def _fastest_fetching(library: Library) -> Fetching:
    """Past the caches, unless one row and weights that no cache holds are multiplied faster otherwise; timed once."""
    rows, threads = torch.ones(1, _SAMPLE_INPUTS), torch.get_num_threads()
    situation = Situation.here(
        "fetching", (_SAMPLE_OUTPUTS, _SAMPLE_INPUTS), rows.device, [one.value for one in Fetching]
    )

    def measure() -> str:
        weight, product = torch.ones(_SAMPLE_OUTPUTS, _SAMPLE_INPUTS), torch.empty(1, _SAMPLE_OUTPUTS)
        linear = Linear(FLOATS, _SAMPLE_OUTPUTS, _SAMPLE_INPUTS, weight.data_ptr())

        def multiply(fetching: Fetching) -> None:
            library.fetch(fetching)
            library.linear(linear, rows.data_ptr(), 1, product.data_ptr(), threads)

        best_s = least_s({fetching: functools.partial(multiply, fetching) for fetching in Fetching})
        is_worthwhile = best_s[Fetching.THROUGH_CACHES] <= _WORTHWHILE * best_s[Fetching.PAST_CACHES]
        return (Fetching.THROUGH_CACHES if is_worthwhile else Fetching.PAST_CACHES).value

    return Fetching(choice(situation, measure))
