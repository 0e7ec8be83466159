"""Who uses which page of a fixed pool of KV cache, and what pages are remembered after use. Pure: numbers and names.

A page holds the keys and values of :data:`PAGE` consecutive positions of one sequence. Sequences that begin alike share
pages (beams, forks, a system prompt that many use); whoever writes to a shared page takes a copy first. A page that was
filled once is remembered under the name of its content, and can be shared with whoever brings the same content, until
its room is needed: the one not used for longest goes first (paged attention: Kwon et al. 2023, arXiv:2309.06180).

Who asks for pages must have been promised them: as long as no more are promised than there are, :meth:`Pages.take`
never fails, because nobody needs more distinct pages than were promised to him.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from swarm.page_names import PAGE

T = TypeVar("T")


def pages_for(positions: int) -> int:
    """How many pages that many positions of one sequence take."""
    return -(-positions // PAGE)


@dataclass(frozen=True)
class Claim:
    """Neighbouring pages ``[start, start + count)`` that others keep off while they have another choice."""

    start: int
    count: int


@dataclass
class _Remembered(Generic[T]):
    page: int
    value: T


class Pages(Generic[T]):
    """The pages ``0 … count - 1``. `T` is what is kept beside a remembered page."""

    def __init__(self, count: int) -> None:
        self._users = [0] * count
        self._claimed = [False] * count
        self._names: list[bytes | None] = [None] * count
        self._remembered: dict[bytes, _Remembered[T]] = {}
        self._blank: OrderedDict[int, None] = OrderedDict.fromkeys(range(count))  # nobody's, nothing remembered
        self._idle: OrderedDict[int, None] = OrderedDict()  # nobody's, but remembered; longest unused first

    def __len__(self) -> int:
        return len(self._users)

    @property
    def used(self) -> int:
        """Pages that somebody uses."""
        return len(self) - len(self._blank) - len(self._idle)

    @property
    def remembered(self) -> int:
        """Pages whose content can be shared with newcomers."""
        return len(self._remembered)

    def users(self, page: int) -> int:
        """How many use `page`."""
        return self._users[page]

    def claim(self, count: int) -> Claim | None:
        """Keep `count` neighbouring pages for one sequence, whose keys and values can then be read without a copy.

        Prefers pages of which nothing is remembered, then those that were not used for longest. None: there are not
        so many neighbours, and pages will be taken one by one.
        """
        start = self._neighbours(count)
        if start is None:
            return None
        self._claimed[start : start + count] = [True] * count
        return Claim(start, count)

    def unclaim(self, claim: Claim) -> None:
        """Let others have what was kept for one sequence."""
        self._claimed[claim.start : claim.start + claim.count] = [False] * claim.count

    def take(self, preferred: int | None = None) -> int:
        """A page to write on: `preferred` if nobody uses it, else any; may forget what was remembered of it."""
        page = preferred if preferred is not None and not self._users[preferred] else self._any()
        self._forget(page)
        del self._blank[page]
        self._users[page] = 1
        return page

    def share(self, page: int) -> None:
        """One more uses `page`."""
        if not self._users[page]:
            del (self._idle if self._names[page] is not None else self._blank)[page]
        self._users[page] += 1

    def give_back(self, page: int) -> None:
        """One less uses `page`."""
        self._users[page] -= 1
        if not self._users[page]:
            (self._idle if self._names[page] is not None else self._blank)[page] = None

    def is_writable(self, page: int) -> bool:
        """Whether its only user may change it: nobody else reads it. What was remembered of it is then forgotten."""
        if self._users[page] == 1:
            self._forget(page)
            return True
        return False

    def remember(self, page: int, name: bytes, value: T) -> None:
        """`page` is full and holds the content that `name` stands for. Known content is not remembered twice."""
        if name not in self._remembered and self._names[page] is None:
            self._names[page] = name
            self._remembered[name] = _Remembered(page, value)

    def find(self, name: bytes) -> tuple[int, T] | None:
        """The page that holds the content `name`, and what is kept beside it."""
        found = self._remembered.get(name)
        return (found.page, found.value) if found is not None else None

    def _forget(self, page: int) -> None:
        name, self._names[page] = self._names[page], None
        if name is not None:
            del self._remembered[name]
            if not self._users[page]:
                del self._idle[page]
                self._blank[page] = None

    def _any(self) -> int:
        for pages in (self._blank, self._idle):
            for page in pages:
                if not self._claimed[page]:
                    return page
        for pages in (self._blank, self._idle):
            for page in pages:
                return page
        raise AssertionError("more pages are in use than were promised")

    def _neighbours(self, count: int) -> int | None:
        """Where `count` pages stand side by side that nobody uses or claims, with the least recent memories."""
        age = {page: order for order, page in enumerate(self._idle, start=1)}
        best: tuple[int, int] | None = None  # (how recent the most recent memory is, where)
        for start, recent in _windows((self._cost(page, age) for page in range(len(self))), count):
            if recent is not None and (best is None or recent < best[0]):
                best = (recent, start)
                if recent == 0:
                    break
        return best[1] if best is not None else None

    def _cost(self, page: int, age: dict[int, int]) -> int | None:
        if self._users[page] or self._claimed[page]:
            return None
        return age.get(page, 0)


def _windows(costs: Iterator[int | None], width: int) -> Iterator[tuple[int, int | None]]:
    """For every `width` neighbours: (first, the largest of their costs), or None where one of them has none."""
    falling: deque[tuple[int, int]] = deque()  # candidates for the largest: (position, cost), costs falling
    last_gap = -1
    for position, cost in enumerate(costs):
        start = position - width + 1
        if cost is None:
            last_gap = position
            falling.clear()
        else:
            while falling and falling[-1][1] <= cost:
                falling.pop()
            falling.append((position, cost))
        while falling and falling[0][0] < start:
            falling.popleft()
        if start >= 0:
            yield start, falling[0][1] if last_gap < start else None
