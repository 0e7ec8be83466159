"""The log of activations behaves as one plain tensor that is cut, extended and indexed."""

from __future__ import annotations

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from swarm.client.activations import ActivationLog

HIDDEN = 3


class LogAgainstTensor(RuleBasedStateMachine):
    """Does everything to a log and to a tensor."""

    @initialize(batch=st.integers(1, 3))
    def begin(self, batch: int) -> None:
        self.log, self.model, self.counter = ActivationLog(), torch.empty(batch, 0, HIDDEN), 0

    @rule(count=st.integers(0, 90))
    def append(self, count: int) -> None:
        size = self.model.shape[0] * count * HIDDEN
        new = torch.arange(self.counter, self.counter + size, dtype=torch.float32)
        new, self.counter = new.reshape(-1, count, HIDDEN) if count else self.model[:, :0], self.counter + size
        self.log.append(new)
        self.model = torch.cat([self.model, new], dim=1)

    @rule(position=st.integers(0, 200))
    def truncate(self, position: int) -> None:
        self.log.truncate(position)
        self.model = self.model[:, :position]

    @rule(data=st.data())
    def reorder(self, data: st.DataObject) -> None:
        rows = torch.tensor(data.draw(st.lists(st.integers(0, self.model.shape[0] - 1), min_size=1, max_size=5)))
        self.log.reorder(rows)
        self.model = self.model[rows]

    @precondition(lambda self: self.model.shape[1] == 0)
    @rule(batch=st.integers(1, 4))
    def begin_anew_with_other_sequences(self, batch: int) -> None:
        self.model = torch.empty(batch, 0, HIDDEN)

    @precondition(lambda self: self.model.shape[1] > 0)
    @rule(data=st.data())
    def look_back(self, data: st.DataObject) -> None:
        position = data.draw(st.integers(0, self.model.shape[1]))
        assert torch.equal(self.log.since(position), self.model[:, position:])

    @invariant()
    def the_log_holds_what_the_tensor_holds(self) -> None:
        assert len(self.log) == self.model.shape[1]
        if len(self.log):
            assert torch.equal(self.log.since(0), self.model)


LogAgainstTensor.TestCase.settings = settings(deadline=None, max_examples=80, stateful_step_count=20)
TestLogAgainstTensor = LogAgainstTensor.TestCase


def test_the_log_keeps_the_precision_in_which_states_arrive() -> None:
    log = ActivationLog()
    log.append(torch.ones(1, 2, HIDDEN, dtype=torch.bfloat16))
    assert log.since(0).dtype == torch.bfloat16


def test_the_log_keeps_its_own_copy() -> None:
    log, states = ActivationLog(), torch.zeros(1, 2, HIDDEN)
    log.append(states)
    states += 1
    assert torch.equal(log.since(0), torch.zeros(1, 2, HIDDEN))


def test_appending_position_by_position_copies_seldom() -> None:
    log, buffers = ActivationLog(), set()
    for _ in range(2000):
        log.append(torch.zeros(1, 1, HIDDEN))
        buffers.add(log.since(0).data_ptr())
    assert len(buffers) <= 7
