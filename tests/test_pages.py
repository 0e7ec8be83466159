"""Pages are never lent twice to be written on, never lost, and never run out for those to whom they were promised."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from swarm.models.pages import Claim, Pages, pages_for
from swarm.page_names import PAGE


@given(st.integers(0, 10 * PAGE))
def test_pages_for_positions(positions: int) -> None:
    assert (pages_for(positions) - 1) * PAGE < positions <= pages_for(positions) * PAGE


def test_claims_are_neighbours_and_others_keep_off_while_they_can() -> None:
    pages: Pages[None] = Pages(8)
    assert pages.claim(5) == Claim(0, 5)
    assert pages.claim(4) is None
    assert [pages.take() for _ in range(3)] == [5, 6, 7]
    assert pages.take() == 0, "nothing else is left"
    assert pages.take(preferred=0) != 0, "it has a user"
    pages.unclaim(Claim(0, 5))
    for page in (5, 6, 7):
        pages.give_back(page)
    assert pages.claim(6) == Claim(2, 6)


def test_the_page_that_was_not_used_for_longest_is_forgotten_first() -> None:
    pages: Pages[str] = Pages(3)
    for name in (b"a", b"b", b"c"):
        page = pages.take()
        pages.remember(page, name, name.decode())
        pages.give_back(page)
    found = pages.find(b"a")
    assert found == (0, "a")
    pages.share(0)
    pages.give_back(0)  # used just now
    assert pages.take() == 1
    assert [pages.find(name) is not None for name in (b"a", b"b", b"c")] == [True, False, True]


def test_a_claim_takes_the_oldest_memories() -> None:
    pages: Pages[None] = Pages(6)
    taken = [pages.take() for _ in range(6)]
    for page in (3, 2, 4, 0, 1, 5):  # in the order in which they fall idle
        pages.remember(page, bytes([page]), None)
        pages.give_back(page)
    assert taken == list(range(6))
    assert pages.claim(2) == Claim(2, 2)


def test_what_is_written_on_is_forgotten_and_what_others_read_is_not_written_on() -> None:
    pages: Pages[None] = Pages(2)
    page = pages.take()
    pages.remember(page, b"x", None)
    pages.share(page)
    assert not pages.is_writable(page) and pages.find(b"x") is not None
    pages.give_back(page)
    assert pages.is_writable(page) and pages.find(b"x") is None


def test_the_same_content_is_remembered_once() -> None:
    pages: Pages[str] = Pages(2)
    first, second = pages.take(), pages.take()
    pages.remember(first, b"x", "first")
    pages.remember(second, b"x", "second")
    assert pages.find(b"x") == (first, "first")
    pages.give_back(second)
    assert pages.take() == second


class AnyUse(RuleBasedStateMachine):
    """Sequences take, share, remember and give back pages in any order, within what they were promised."""

    @initialize(count=st.integers(1, 12))
    def begin(self, count: int) -> None:
        self.count = count
        self.pages: Pages[int] = Pages(count)
        self.sequences: list[tuple[int, Claim | None, list[int]]] = []  # promised, claim, pages
        self.names = 0

    def free(self) -> int:
        return self.count - sum(promised for promised, _, _ in self.sequences)

    @rule(wanted=st.integers(1, 6))
    def come(self, wanted: int) -> None:
        if wanted <= self.free():
            claim = self.pages.claim(wanted)
            assert claim is None or claim.count == wanted
            self.sequences.append((wanted, claim, []))

    @rule(which=st.integers(0, 9))
    def write(self, which: int) -> None:
        if not self.sequences:
            return
        promised, claim, held = self.sequences[which % len(self.sequences)]
        if len(held) < promised:
            page = self.pages.take(claim.start + len(held) if claim is not None else None)
            assert all(page not in others for _, _, others in self.sequences), "somebody reads it"
            held.append(page)

    @rule(which=st.integers(0, 9))
    def remember(self, which: int) -> None:
        if self.sequences and (held := self.sequences[which % len(self.sequences)][2]):
            self.names += 1
            self.pages.remember(held[-1], str(self.names).encode(), self.names)

    @rule(which=st.integers(0, 9), name=st.integers(1, 40))
    def reuse(self, which: int, name: int) -> None:
        found = self.pages.find(str(name).encode())
        if self.sequences and found is not None:
            promised, _, held = self.sequences[which % len(self.sequences)]
            assert found[1] == name
            if len(held) < promised:
                self.pages.share(found[0])
                held.append(found[0])

    @rule(which=st.integers(0, 9))
    def overwrite(self, which: int) -> None:
        if self.sequences and (held := self.sequences[which % len(self.sequences)][2]):
            page = held[-1]
            readers = sum(pages.count(page) for _, _, pages in self.sequences)
            assert self.pages.is_writable(page) == (readers == 1)
            if readers > 1:
                held[-1] = self.pages.take()
                self.pages.give_back(page)

    @rule(which=st.integers(0, 9))
    def leave(self, which: int) -> None:
        if self.sequences:
            _, claim, held = self.sequences.pop(which % len(self.sequences))
            for page in held:
                self.pages.give_back(page)
            if claim is not None:
                self.pages.unclaim(claim)

    @invariant()
    def every_page_has_the_users_that_it_has(self) -> None:
        if not hasattr(self, "pages"):
            return
        used = [page for _, _, held in self.sequences for page in held]
        assert all(self.pages.users(page) == used.count(page) for page in range(self.count))
        assert self.pages.used == len(set(used))


def test_any_use() -> None:
    AnyUse.TestCase.settings = settings(deadline=None, max_examples=100, stateful_step_count=40)
    AnyUse.TestCase("runTest").runTest()


def test_more_than_was_promised_is_our_own_mistake() -> None:
    pages: Pages[None] = Pages(1)
    pages.take()
    with pytest.raises(AssertionError, match="than were promised"):
        pages.take()
