"""KV caches on the pages of one pool: what a server's sessions hold, of every family that caches keys and values.

transformers' own paged cache (``generation/continuous_batching``, 5.23) was looked at first. It names prefixes by token
ids, which servers of a swarm never see; it needs attention functions of its own, so families with their own attention
are left out; and its requests cannot be rolled back, reordered or padded, which sessions are. So pages are ours, and
everything else stays transformers': layers get keys and values as from any cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from swarm.errors import UnsupportedFamily
from swarm.models.pages import Claim, Pages, pages_for
from swarm.models.span import Span
from swarm.page_names import PAGE, Content, name_made, name_of, part_of


@dataclass(frozen=True)
class LayerShape:
    """What one layer caches of a position."""

    keys: tuple[int, int]
    """(heads, size)"""
    values: tuple[int, int]
    window: int | None
    """It looks no further back than this; None: to the beginning."""

    @classmethod
    def of_all(cls, span: Span, hidden_size: int) -> list[LayerShape]:
        """Of every layer of `span`: seen by running it.

        Raises:
            UnsupportedFamily: it caches something else than keys and values.
        """
        cache = span.new_cache()
        span.forward(torch.zeros(1, 1, hidden_size, dtype=span.dtype, device=span.device), cache)
        shapes = []
        for layer in cache.layers:
            if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) or layer.keys is None:
                raise UnsupportedFamily(f"{type(layer).__name__} of this model's cache cannot be kept on pages")
            heads, size = layer.keys.shape[1], layer.keys.shape[3]
            of_values = layer.values.shape[1], layer.values.shape[3]
            shapes.append(cls((heads, size), of_values, getattr(layer, "sliding_window", None)))
        return shapes


class PagePool:
    """Room for the keys and values of a number of pages, in all layers of a span. Belongs to the compute thread."""

    def __init__(
        self, shapes: Sequence[LayerShape], pages: int, first_layer: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        slots = pages * PAGE
        sizes = [heads * slots * size for shape in shapes for heads, size in (shape.keys, shape.values)]
        room = torch.empty(sum(sizes), dtype=dtype, device=device)  # on a CPU it takes no memory until it is written
        parts = iter(room.split(sizes))
        self.shapes, self.first_layer, self.device = tuple(shapes), first_layer, device
        self.pages: Pages[_Made] = Pages(pages)
        self.keys: list[torch.Tensor] = []
        """Of every layer, ``[heads, slots, size]``; a page is :data:`PAGE` slots."""
        self.values: list[torch.Tensor] = []
        for shape in shapes:
            self.keys.append(next(parts).view(shape.keys[0], slots, shape.keys[1]))
            self.values.append(next(parts).view(shape.values[0], slots, shape.values[1]))

    @classmethod
    def for_span(cls, span: Span, hidden_size: int, pages: int) -> PagePool:
        """For all layers of `span`.

        Raises:
            UnsupportedFamily: it caches something else than keys and values.
        """
        shapes = LayerShape.of_all(span, hidden_size)
        return cls(shapes, pages, span.start, dtype=span.dtype, device=span.device)

    def new_cache(self, start: int, end: int, positions: int) -> PagedCache:
        """An empty cache for blocks ``[start, end)``; neighbouring pages for sequences of up to `positions`."""
        return PagedCache(self, range(start - self.first_layer, end - self.first_layer), positions)

    def write(self, number: int, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Put ``[sequences, heads, positions, size]`` of layer `number` at ``slots[sequences × positions]``."""
        for kept, new in ((self.keys[number], keys), (self.values[number], values)):
            kept.index_copy_(1, slots, new.transpose(0, 1).reshape(kept.shape[0], -1, kept.shape[2]))

    def copy_page(self, source: int, target: int) -> None:
        """What stands on one page, to another."""
        here, there = (slice(page * PAGE, (page + 1) * PAGE) for page in (source, target))
        for tensor in (*self.keys, *self.values):
            tensor[:, there] = tensor[:, here]


@dataclass(frozen=True)
class _Made:
    """What the span made of a remembered page."""

    output: torch.Tensor
    """``[PAGE, hidden]``, on the CPU."""
    name: bytes
    """Of that, for the next server, …"""
    before: bytes
    """… which was `name` of the page before it."""


@dataclass
class _Sequence:
    """One sequence of a cache: its pages, and what is known of their contents."""

    claim: Claim | None
    pages: list[int] = field(default_factory=list)
    names: list[bytes] = field(default_factory=list)
    """Of full pages: each stands for its content and for all before it."""
    made: list[bytes] = field(default_factory=list)
    """Of what the span made of them, likewise."""
    came: list[Content] = field(default_factory=list)
    """What came in of the positions after those."""
    went: list[torch.Tensor] = field(default_factory=list)
    """And what went out, ``[n, hidden]``."""
    runs: list[tuple[int, int]] = field(default_factory=list)
    """``[begin, end)`` of the slots of its positions in the pool, in order, neighbours as one."""

    @property
    def last_name(self) -> bytes:
        return self.names[-1] if self.names else b""

    @property
    def known(self) -> int:
        """So many positions from the beginning are known; of those after them nobody noted what came in."""
        return len(self.names) * PAGE + sum(map(len, self.came))

    def copy(self, claim: Claim | None) -> _Sequence:
        return _Sequence(
            claim, [*self.pages], [*self.names], [*self.made], [*self.came], [*self.went], [*self.runs]
        )  # fmt: skip

    def stretch_runs(self, begin: int, end: int) -> None:
        """Add the positions ``[begin, end)``."""
        while begin < end:
            until = min(end, (begin // PAGE + 1) * PAGE)
            slot = self.pages[begin // PAGE] * PAGE + begin % PAGE
            if self.runs and self.runs[-1][1] == slot:
                self.runs[-1] = self.runs[-1][0], slot + until - begin
            else:
                self.runs.append((slot, slot + until - begin))
            begin = until

    def rewrite_runs(self, end: int) -> None:
        """Anew, for the positions before `end`."""
        self.runs.clear()
        self.stretch_runs(0, end)

    def forget_after(self, position: int) -> None:
        """Keep what is known of the positions before `position`."""
        surplus = position - len(self.names) * PAGE
        if surplus <= 0:
            del self.names[position // PAGE :], self.made[position // PAGE :]
            self.came, self.went = [], []
        elif self.came:
            self.came, self.went = part_of(self.came, 0, surplus), [torch.cat(self.went)[:surplus]]


class PagedCache(Cache):  # type: ignore[misc]
    """The KV cache of one session: some sequences of equal length.

    Before the layers run over new positions, :meth:`begin` makes room for them.
    """

    def __init__(self, pool: PagePool, layers: range, positions: int) -> None:
        self._positions = positions
        self._salt = f"{layers.start}:{layers.stop} ".encode()
        self._first_layer = pool.first_layer + layers.start
        self._sequences: list[_Sequence] = []
        self._gathered: dict[int, torch.Tensor] = {}
        self.pool = pool
        self.begun = 0
        """Where the positions for which room was made last begin."""
        self.length = 0
        """Positions held, those included."""
        self.slots: list[int] = []
        """Where they are written, sequence by sequence."""
        self._places: torch.Tensor | None = None
        super().__init__(layers=[_PagedLayer(self, number) for number in layers])

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write new keys and values ``[sequences, heads, positions, size]``; returns all that the layer looks at."""
        return self.at(layer_idx).update(key_states, value_states)

    @property
    def rows(self) -> int:
        """Sequences held."""
        return len(self._sequences)

    def at(self, layer_idx: int) -> _PagedLayer:
        """The layer that has this number in the whole model."""
        layer: _PagedLayer = self.layers[layer_idx - self._first_layer]
        return layer

    def begin(self, rows: int, count: int) -> None:
        """Make room for `count` further positions of `rows` sequences (as many as are held, if any are)."""
        self._admit(rows)
        self.begun, self.length = self.length, self.length + count
        for sequence in self._sequences:
            self._make_room(sequence)
            sequence.stretch_runs(self.begun, self.length)
        self._gathered.clear()
        positions = range(self.begun, self.length)
        self.slots = [
            sequence.pages[position // PAGE] * PAGE + position % PAGE
            for sequence in self._sequences
            for position in positions
        ]
        self._places = None

    @property
    def places(self) -> torch.Tensor:
        """:attr:`slots`, where the pool is, ``[sequences × positions]``."""
        if self._places is None:
            self._places = torch.tensor(self.slots, device=self.pool.device)
        return self._places

    def runs(self, row: int, positions: int) -> list[tuple[int, int]]:
        """Where the last `positions` of a sequence stand in the pool: ``[begin, end)`` of every run of neighbours."""
        runs = self._sequences[row].runs
        if positions >= self.length:
            return runs
        kept: list[tuple[int, int]] = []
        for begin, end in reversed(runs):
            kept.append((max(begin, end - positions), end))
            positions -= end - begin
            if positions <= 0:
                break
        return kept[::-1]

    def read(self, tensor: torch.Tensor, positions: int) -> torch.Tensor:
        """The last `positions` of what stands in `tensor` of the pool, ``[sequences, heads, positions, size]``.

        A view, if it is of one sequence that stands on neighbouring pages.
        """
        if len(self._sequences) == 1 and len(runs := self.runs(0, positions)) == 1:
            return tensor[:, slice(*runs[0])].unsqueeze(0)
        if positions not in self._gathered:
            every = [torch.arange(*run) for row in range(len(self._sequences)) for run in self.runs(row, positions)]
            self._gathered[positions] = torch.cat(every).to(self.pool.device)
        chosen = tensor.index_select(1, self._gathered[positions])
        return chosen.view(-1, len(self._sequences), positions, tensor.shape[2]).transpose(0, 1)

    def roll_back(self, position: int) -> None:
        """Forget the positions from `position` on."""
        if position >= self.length:
            return
        if position == 0:  # begin anew, perhaps with another number of sequences
            self.release()
            return
        kept = pages_for(position)
        for sequence in self._sequences:
            for page in sequence.pages[kept:]:
                self.pool.pages.give_back(page)
            del sequence.pages[kept:]
            sequence.forget_after(position)
            sequence.rewrite_runs(position)
        self.length = position

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Sequence i goes on as what sequence ``beam_idx[i]`` was; there may be more or fewer than before."""
        if not self._sequences:
            return
        old = self._sequences
        claims = [sequence.claim for sequence in old][: len(beam_idx)]
        claims += [self._claim() for _ in range(len(claims), len(beam_idx))]
        self._sequences = [old[source].copy(claim) for source, claim in zip(beam_idx.tolist(), claims, strict=True)]
        for sequence in self._sequences:
            for page in sequence.pages:
                self.pool.pages.share(page)
        for row, sequence in enumerate(old):
            self._drop(sequence, keep_claim=row < len(claims))

    def release(self) -> None:
        """Give all pages back; the cache is empty afterwards."""
        for sequence in self._sequences:
            self._drop(sequence)
        self._sequences = []
        self.begun = self.length = 0
        self._gathered.clear()

    def reuse(self, hidden_states: torch.Tensor, position_ids: torch.Tensor | None) -> torch.Tensor | None:
        """Take over pages that hold what these positions would write, as far as there are any.

        Args:
            hidden_states: what came in, ``[sequences, positions, hidden]``, on the CPU.
            position_ids: ``[sequences, positions]``, if they are not those that follow.

        Returns:
            What the span makes of the first n of them, ``[sequences, n, hidden]``; None if it is not known.
        """
        rows, count, _ = hidden_states.shape
        self._admit(rows)
        if count < PAGE or not all(sequence.known == self.length for sequence in self._sequences):
            return None
        contents = self._contents(hidden_states, position_ids, self.length)
        outputs: list[list[torch.Tensor]] = [[] for _ in range(rows)]
        done = 0
        while (end := done + PAGE - self.length % PAGE) <= count:
            names = [
                name_of(sequence.last_name, [*sequence.came, content.part(done, end)])
                for sequence, content in zip(self._sequences, contents, strict=True)
            ]
            found = [hit for name in names if (hit := self._find(name)) is not None]
            if len(found) < rows:
                break
            for sequence, name, (page, made), output in zip(self._sequences, names, found, outputs, strict=True):
                output.append(made.output[done - end :])
                self._take_over(sequence, name, page, made)
                sequence.rewrite_runs(len(sequence.pages) * PAGE)
            self.length += end - done
            done = end
        return torch.stack([torch.cat(made) for made in outputs]) if outputs[0] else None

    @property
    def names(self) -> list[bytes]:
        """Of the full pages of its only sequence; may be asked for on any thread."""
        sequences = self._sequences
        return [*sequences[0].names] if len(sequences) == 1 else []

    def known(self, names: Sequence[bytes]) -> list[bytes]:
        """Pages that are remembered, from the first on, without a gap; may be called from any thread.

        Args:
            names: of one sequence (:mod:`swarm.page_names`).

        Returns:
            What the same positions are called where they leave the span, as many as are known.
        """
        found: list[bytes] = []
        for name in names:
            hit = self._find(name)
            if hit is None or hit[1].before != (found[-1] if found else b""):
                break  # (or it was made of a page that is forgotten, and might differ from it in a last bit)
            found.append(hit[1].name)
        return found

    def adopt(self, names: Sequence[bytes]) -> list[torch.Tensor] | None:
        """Begin anew, with the pages of these names.

        Returns:
            What the span makes of each, ``[PAGE, hidden]``; None, and an empty cache, if one is forgotten.
        """
        hits = [hit for name in names if (hit := self._find(name)) is not None]
        if self.names != names or self.length != len(names) * PAGE:  # it is not there already
            self.release()
            if len(hits) < len(names):
                return None
            self._admit(1)
            for name, hit in zip(names, hits, strict=True):
                self._take_over(self._sequences[0], name, *hit)
            self.length = len(names) * PAGE
            self._sequences[0].rewrite_runs(self.length)
        return [made.output for _, made in hits]

    def remember(
        self, hidden_states: torch.Tensor, position_ids: torch.Tensor | None, outputs: torch.Tensor, start: int
    ) -> None:
        """Let others reuse what was computed.

        Args:
            hidden_states, position_ids: what came in from position `start` on, as for :meth:`reuse`.
            outputs: what the span made of them, on the CPU.
        """
        contents = self._contents(hidden_states, position_ids, start)
        for sequence, content, output in zip(self._sequences, contents, outputs, strict=True):
            known = sequence.known
            if known != start:
                continue
            sequence.came.append(content)
            sequence.went.append(output)
            if known % PAGE + len(content) < PAGE:
                continue
            went = torch.cat(sequence.went)
            full = len(went) // PAGE * PAGE
            for begin in range(0, full, PAGE):
                came, output = part_of(sequence.came, begin, begin + PAGE), went[begin : begin + PAGE].clone()
                name, page = name_of(sequence.last_name, came), sequence.pages[len(sequence.names)]
                before = sequence.made[-1] if sequence.made else b""
                made = _Made(output, name_made(before, came, output), before)
                self.pool.pages.remember(page, self._salt + name, made)
                sequence.names.append(name)
                sequence.made.append(made.name)
            rest = [content.copy() for content in part_of(sequence.came, full, len(went))]
            sequence.came, sequence.went = rest, [went[full:].clone()] if rest else []

    def _admit(self, rows: int) -> None:
        if not self._sequences:
            self._sequences = [_Sequence(self._claim()) for _ in range(rows)]

    def _claim(self) -> Claim | None:
        return self.pool.pages.claim(pages_for(self._positions))

    def _make_room(self, sequence: _Sequence) -> None:
        """Pages up to :attr:`length`; the one that is written on first becomes the sequence's own."""
        pages = self.pool.pages

        def take(index: int) -> int:
            claim = sequence.claim
            return pages.take(claim.start + index if claim is not None and index < claim.count else None)

        first = self.begun // PAGE
        if first < len(sequence.pages) and not pages.is_writable(shared := sequence.pages[first]):
            sequence.pages[first] = take(first)
            self.pool.copy_page(shared, sequence.pages[first])
            pages.give_back(shared)
            sequence.rewrite_runs(self.begun)
        for index in range(len(sequence.pages), pages_for(self.length)):
            sequence.pages.append(take(index))

    def _find(self, name: bytes) -> tuple[int, _Made] | None:
        """The page of that name that these layers have written, and what they made of it."""
        return self.pool.pages.find(self._salt + name)

    def _take_over(self, sequence: _Sequence, name: bytes, page: int, made: _Made) -> None:
        """Let the next page of `sequence`, or the one that it has begun to fill, be one that is known."""
        if self.length % PAGE:
            self.pool.pages.give_back(sequence.pages.pop())
            sequence.came, sequence.went = [], []
        self.pool.pages.share(page)
        sequence.pages.append(page)
        sequence.names.append(name)
        sequence.made.append(made.name)

    def _drop(self, sequence: _Sequence, *, keep_claim: bool = False) -> None:
        for page in sequence.pages:
            self.pool.pages.give_back(page)
        if sequence.claim is not None and not keep_claim:
            self.pool.pages.unclaim(sequence.claim)

    def _contents(self, states: torch.Tensor, position_ids: torch.Tensor | None, start: int) -> list[Content]:
        """Of every sequence."""
        rows, count, _ = states.shape
        following = range(start, start + count)
        return [
            Content(position_ids[row] if position_ids is not None else following, states[row]) for row in range(rows)
        ]


class _PagedLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer of a :class:`PagedCache`."""

    def __init__(self, cache: PagedCache, number: int) -> None:
        super().__init__()
        self._cache, self.number = cache, number
        self.window = cache.pool.shapes[number].window
        self.is_sliding = self.window is not None
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write new ones; returns all that the layer looks at."""
        self._cache.pool.write(self.number, self._cache.places, key_states, value_states)
        return self.read()

    def read(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values ``[sequences, heads, positions, size]`` that the positions begun last look at."""
        cache, number = self._cache, self.number
        positions = self.get_mask_sizes(cache.length - cache.begun)[0]
        return cache.read(cache.pool.keys[number], positions), cache.read(cache.pool.values[number], positions)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(positions that the next `query_length` look at, their own included; where these begin)"""
        before = self.get_seq_length()
        seen = before if self.window is None else min(before, self.window - 1)
        return seen + query_length, before - seen

    def get_seq_length(self) -> int:
        """Positions before those begun last."""
        return self._cache.begun

    def get_max_length(self) -> int:
        """No maximum."""
        return -1
