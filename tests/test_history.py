"""What a session keeps behaves as plain tensors that are cut, extended and indexed."""

from __future__ import annotations

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from swarm.protocol.history import GrowingTensor, History

HIDDEN = 3


class GrowingAgainstTensor(RuleBasedStateMachine):
    """Does everything to a growing tensor and to one that is made anew each time."""

    @initialize(batch=st.integers(1, 3))
    def begin(self, batch: int) -> None:
        self.growing, self.model, self.counter = GrowingTensor(), torch.empty(batch, 0, HIDDEN), 0

    @rule(count=st.integers(0, 90))
    def append(self, count: int) -> None:
        size = self.model.shape[0] * count * HIDDEN
        new = torch.arange(self.counter, self.counter + size, dtype=torch.float32)
        new, self.counter = new.reshape(-1, count, HIDDEN) if count else self.model[:, :0], self.counter + size
        self.growing.append(new)
        self.model = torch.cat([self.model, new], dim=1)

    @rule(position=st.integers(0, 200))
    def truncate(self, position: int) -> None:
        self.growing.truncate(position)
        self.model = self.model[:, :position]

    @rule(data=st.data())
    def reorder(self, data: st.DataObject) -> None:
        rows = torch.tensor(data.draw(st.lists(st.integers(0, self.model.shape[0] - 1), min_size=1, max_size=5)))
        self.growing.reorder(rows)
        self.model = self.model[rows]

    @precondition(lambda self: self.model.shape[1] == 0)
    @rule(batch=st.integers(1, 4))
    def begin_anew_with_other_sequences(self, batch: int) -> None:
        self.model = torch.empty(batch, 0, HIDDEN)

    @precondition(lambda self: self.model.shape[1] > 0)
    @rule(data=st.data())
    def look_back(self, data: st.DataObject) -> None:
        begin = data.draw(st.integers(0, self.model.shape[1] - 1))
        end = data.draw(st.integers(begin + 1, self.model.shape[1]))
        assert torch.equal(self.growing.between(begin, end), self.model[:, begin:end])

    @invariant()
    def it_holds_what_the_tensor_holds(self) -> None:
        assert len(self.growing) == self.model.shape[1]
        if len(self.growing):
            assert torch.equal(self.growing.between(0, len(self.growing)), self.model)


GrowingAgainstTensor.TestCase.settings = settings(deadline=None, max_examples=80, stateful_step_count=20)
TestGrowingAgainstTensor = GrowingAgainstTensor.TestCase


def test_it_keeps_the_precision_in_which_states_arrive() -> None:
    growing = GrowingTensor()
    growing.append(torch.ones(1, 2, HIDDEN, dtype=torch.bfloat16))
    assert growing.between(0, 2).dtype == torch.bfloat16


def test_it_keeps_its_own_copy() -> None:
    growing, states = GrowingTensor(), torch.zeros(1, 2, HIDDEN)
    growing.append(states)
    states += 1
    assert torch.equal(growing.between(0, 2), torch.zeros(1, 2, HIDDEN))


def test_appending_position_by_position_copies_seldom() -> None:
    growing, buffers = GrowingTensor(), set()
    for _ in range(2000):
        growing.append(torch.zeros(1, 1, HIDDEN))
        buffers.add(growing.between(0, 1).data_ptr())
    assert len(buffers) <= 7


class HistoryAgainstTensors(RuleBasedStateMachine):
    """Does everything to a history and to three tensors, in which ids and mask are always written out."""

    @initialize(batch=st.integers(1, 3))
    def begin(self, batch: int) -> None:
        self.history, self.counter = History(), 0
        self.said_ids = self.said_mask = False
        self.begin_anew(batch)

    @precondition(lambda self: self.ids.shape[1] == 0)
    @rule(batch=st.integers(1, 3))
    def begin_anew(self, batch: int) -> None:
        self.states = torch.empty(batch, 0, HIDDEN)
        self.ids = torch.empty(batch, 0, dtype=torch.int64)
        self.mask = torch.empty(batch, 0, dtype=torch.uint8)

    @rule(count=st.integers(1, 70), with_ids=st.booleans(), with_mask=st.booleans(), seed=st.integers(0, 99))
    def append(self, count: int, with_ids: bool, with_mask: bool, seed: int) -> None:
        batch, position, _ = self.states.shape
        states = torch.arange(self.counter, self.counter + batch * count * HIDDEN, dtype=torch.float32)
        states, self.counter = states.reshape(batch, count, HIDDEN), self.counter + batch * count * HIDDEN
        generator = torch.Generator().manual_seed(seed)
        ids = torch.arange(position, position + count).expand(batch, count)
        mask = torch.ones(batch, count, dtype=torch.uint8)
        if with_ids:
            ids = torch.randint(0, 9, (batch, count), generator=generator)
        if with_mask:
            mask = torch.randint(0, 2, (batch, count), generator=generator, dtype=torch.uint8)
        self.history.append(states, ids if with_ids else None, mask if with_mask else None)
        self.said_ids, self.said_mask = self.said_ids or with_ids, self.said_mask or with_mask
        self.states = torch.cat([self.states, states], dim=1)
        self.ids, self.mask = torch.cat([self.ids, ids], dim=1), torch.cat([self.mask, mask], dim=1)

    @rule(position=st.integers(0, 150))
    def truncate(self, position: int) -> None:
        self.history.truncate(position)
        self.states, self.ids, self.mask = (one[:, :position] for one in (self.states, self.ids, self.mask))
        if self.states.shape[1] == 0:
            self.said_ids = self.said_mask = False

    @rule(data=st.data())
    def reorder(self, data: st.DataObject) -> None:
        rows = torch.tensor(data.draw(st.lists(st.integers(0, self.states.shape[0] - 1), min_size=1, max_size=4)))
        self.history.reorder(rows)
        self.states, self.ids, self.mask = self.states[rows], self.ids[rows], self.mask[rows]

    @precondition(lambda self: self.states.shape[1] > 0)
    @rule(data=st.data())
    def look_back(self, data: st.DataObject) -> None:
        begin = data.draw(st.integers(0, self.states.shape[1] - 1))
        end = data.draw(st.integers(begin + 1, self.states.shape[1]))
        kept = self.history.between(begin, end)
        assert torch.equal(kept["hidden_states"], self.states[:, begin:end])
        assert ("position_ids" in kept, "mask" in kept) == (self.said_ids, self.said_mask)
        if self.said_ids:
            assert torch.equal(kept["position_ids"], self.ids[:, begin:end])
        if self.said_mask:
            assert torch.equal(kept["mask"], self.mask[:, begin:end])

    @invariant()
    def it_is_as_large(self) -> None:
        batch, count, _ = self.states.shape
        assert (len(self.history), self.history.batch) == (count, batch if count else 0)


HistoryAgainstTensors.TestCase.settings = settings(deadline=None, max_examples=80, stateful_step_count=20)
TestHistoryAgainstTensors = HistoryAgainstTensors.TestCase


def test_ids_and_masks_that_appear_late_are_filled_up_with_those_that_count_on_and_ones() -> None:
    history = History()
    history.append(torch.zeros(2, 3, HIDDEN))
    assert set(history.between(0, 3)) == {"hidden_states"}
    ids, mask = torch.tensor([[7], [8]]), torch.tensor([[0], [1]], dtype=torch.uint8)
    history.append(torch.zeros(2, 1, HIDDEN), ids, mask)
    history.append(torch.zeros(2, 1, HIDDEN))
    kept = history.between(0, 5)
    assert kept["position_ids"].tolist() == [[0, 1, 2, 7, 4], [0, 1, 2, 8, 4]]
    assert kept["mask"].tolist() == [[1, 1, 1, 0, 1], [1, 1, 1, 1, 1]]
    assert (kept["position_ids"].dtype, kept["mask"].dtype) == (torch.int64, torch.uint8)


def test_what_is_to_be_sent_does_not_change_when_the_history_does() -> None:
    history = History()
    history.append(torch.zeros(1, 3, HIDDEN))
    to_send = history.between(0, 3)["hidden_states"]
    history.truncate(1)
    history.append(torch.ones(1, 2, HIDDEN))
    assert torch.equal(to_send, torch.zeros(1, 3, HIDDEN))
