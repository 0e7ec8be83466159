"""A server's end of a session: every step is run once, sent on to the right place, or refused with the reason why."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.errors import REMOTE_ERRORS, ProtocolError, RemoteError, ServerFault
from swarm.protocol.codec import CODECS, decode_hidden_states, encode_hidden_states
from swarm.protocol.messages import (
    MAX_BATCH,
    MAX_HOPS,
    MAX_POSITIONS,
    MAX_STEP_POSITIONS,
    Attach,
    Close,
    Hello,
    HopTime,
    Link,
    Linked,
    LinkLost,
    Message,
    Open,
    Opened,
    Output,
    Pong,
    Promote,
    Refusal,
    Replay,
    Replayed,
    Step,
    TakeOver,
)
from swarm.protocol.served_session import (
    Action,
    Compute,
    Dial,
    End,
    HangUp,
    ServedSession,
    Spent,
    ToClient,
    ToSuccessor,
    Work,
)

HIDDEN = 4
TOKEN, OTHER = "0" * 32, "1" * 32
OPEN = Open(session=TOKEN, model="ab" * 32, start=2, end=4, batch=2, max_length=100)
TO_PEER = Link(link=1, peer_id="12D3KooWsuccessor", session=OTHER)
BEFORE = HopTime(start=0, end=2, queue_s=0.0, compute_s=1.0)


def states(batch: int, count: int) -> torch.Tensor:
    return torch.rand(batch, count, HIDDEN)


def run(work: Work) -> torch.Tensor:
    """What our servers compute."""
    return work.hidden_states.float() * 2 + work.position


@dataclass
class Hosted:
    """A session whose work is done on demand; what it says is kept."""

    fields: dict[str, Any] = field(default_factory=dict)
    working: list[Work] = field(default_factory=list)
    runs: int = 0
    said: list[Action] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.session = ServedSession(OPEN.model_copy(update=self.fields), HIDDEN)

    def do(self, actions: list[Action]) -> list[Action]:
        for action in actions:
            (self.working if isinstance(action, Compute) else self.said).append(
                action.work if isinstance(action, Compute) else action  # type: ignore[arg-type]
            )
        return actions

    def tell(self, message: Message, **tensors: torch.Tensor) -> list[Action]:
        """The client says something."""
        return self.do(self.session.from_client(message, tensors))

    def forward(self, message: Message, **tensors: torch.Tensor) -> list[Action]:
        """The predecessor says something."""
        return self.do(self.session.from_predecessor(message, tensors))

    def send(self, sequence: int, position: int, sent: torch.Tensor, **fields: Any) -> list[Action]:
        """The client sends a step. Tensors besides `sent` are given as fields."""
        tensors = {name: value for name, value in fields.items() if isinstance(value, torch.Tensor)}
        others = {name: value for name, value in fields.items() if name not in tensors}
        step = Step(sequence=sequence, position=position, tensors=[], **others)
        return self.tell(step, hidden_states=sent, **tensors)

    def compute(self) -> list[Action]:
        """The device finishes what it was given."""
        assert len(self.working) == 1, "one thing at a time"
        self.runs += 1
        return self.do(self.session.computed(run(self.working.pop()), Spent(0.25, 0.5)))

    def compute_all(self) -> list[Action]:
        actions = []
        while self.working:
            actions += self.compute()
        return actions

    def step(self, sequence: int, position: int, sent: torch.Tensor, **fields: Any) -> torch.Tensor:
        """Send a step, run it, and return what the client gets."""
        self.send(sequence, position, sent, **fields)
        (answer,) = outputs(self.compute_all())
        assert answer.message.sequence == sequence  # type: ignore[union-attr]
        assert answer.tensors is not None
        return answer.tensors["hidden_states"]

    def replay(self, sequence: int, *parts: torch.Tensor, last: bool = True, **tensors: torch.Tensor) -> list[Action]:
        """A predecessor tells the session's state, and all of it is run."""
        actions, position = [], 0
        for index, part in enumerate(parts):
            ends = last and index == len(parts) - 1
            message = Replay(sequence=sequence, position=position, last=ends, tensors=[])
            actions += self.forward(message, hidden_states=part, **tensors)
            position += part.shape[1]
        return actions + self.compute_all()

    def link(self, number: int = 1, *, fresh: bool = False, standby: bool = False) -> list[Action]:
        """A link to a peer is asked for and stands."""
        self.tell(TO_PEER.model_copy(update={"link": number, "standby": standby}))
        return self.do(self.session.link_opened(number, fresh))


def outputs(actions: list[Action]) -> list[ToClient]:
    return [one for one in actions if isinstance(one, ToClient) and isinstance(one.message, Output)]


def onward(actions: list[Action]) -> list[ToSuccessor]:
    return [one for one in actions if isinstance(one, ToSuccessor)]


def to_client(actions: list[Action]) -> list[Message]:
    return [one.message for one in actions if isinstance(one, ToClient)]


# Steps


def test_a_step_is_answered_with_its_result_and_where_the_time_went() -> None:
    hosted, sent = Hosted(), states(2, 3)
    hosted.send(7, 0, sent, hops=[BEFORE])
    (answer,) = outputs(hosted.compute())
    assert answer.tensors is not None and torch.equal(answer.tensors["hidden_states"], sent * 2)
    here = HopTime(start=2, end=4, queue_s=0.25, compute_s=0.5)
    assert answer.message == Output(sequence=7, hops=[BEFORE, here], tensors=[])


@pytest.mark.parametrize(("wanted", "come"), [(None, 3), (0, 0), (1, 1), (3, 3), (9, 3)])
def test_of_the_last_blocks_only_what_is_wanted_comes_back(wanted: int | None, come: int) -> None:
    hosted, sent = Hosted({"is_last": True}), states(2, 3)
    assert torch.equal(hosted.step(1, 0, sent, wanted=wanted), (sent * 2)[:, 3 - come :])
    (again,) = outputs(hosted.send(1, 0, sent, wanted=wanted))
    assert again.tensors is not None and again.tensors["hidden_states"].shape == (2, come, HIDDEN)
    assert torch.equal(hosted.step(2, 3, sent[:, :1]), (sent * 2)[:, :1] + 3), "the next wants everything again"


def test_what_others_go_on_with_is_sent_whole() -> None:
    hosted, sent = Hosted(), states(2, 3)
    assert torch.equal(hosted.step(1, 0, sent, wanted=1), sent * 2), "the client relays it"
    hosted.link()
    hosted.send(2, 3, sent, wanted=1)
    (on,) = onward(hosted.compute())
    assert on.message.wanted == 1 and on.tensors["hidden_states"].shape == (2, 3, HIDDEN)  # type: ignore[union-attr]


def test_position_ids_and_mask_arrive_with_their_step() -> None:
    hosted = Hosted()
    position_ids, mask = torch.tensor([[0, 1], [0, 0]]), torch.tensor([[1, 1], [0, 1]], dtype=torch.uint8)
    hosted.send(1, 0, states(2, 2), position_ids=position_ids, mask=mask)
    (work,) = hosted.working
    assert work.position_ids is not None and torch.equal(work.position_ids, position_ids)
    assert work.mask is not None and torch.equal(work.mask, mask)
    (answer,) = outputs(hosted.compute())
    assert answer.tensors is not None and set(answer.tensors) == {"hidden_states"}


@pytest.mark.parametrize("error_type", REMOTE_ERRORS.values(), ids=REMOTE_ERRORS)
def test_a_step_that_fails_is_refused_as_the_error_it_was_and_ends_the_session(error_type: type[RemoteError]) -> None:
    hosted = Hosted()
    hosted.send(1, 0, states(2, 1))
    refusal = ToClient(Refusal(code=error_type.code, reason="because"))
    assert hosted.session.failed(error_type("because")) == [refusal, End()]
    assert REMOTE_ERRORS[error_type.code] is error_type
    (patient,) = ServedSession.refuse(error_type("because"), retry_after_s=2.0)
    assert isinstance(patient, ToClient) and patient.message == Refusal(
        code=error_type.code, reason="because", retry_after_s=2.0
    )


def test_a_reason_too_long_for_the_wire_is_cut() -> None:
    (refused,) = ServedSession.refuse(ServerFault("x" * 10_000))
    assert isinstance(refused, ToClient) and isinstance(refused.message, Refusal)
    assert refused.message.reason == "x" * 2000
    hosted = Hosted()
    hosted.link()
    (lost,) = hosted.session.link_lost(1, "y" * 10_000)
    assert isinstance(lost, ToClient) and lost.message == LinkLost(link=1, reason="y" * 2000)


def test_several_steps_may_be_under_way_and_are_run_one_after_another() -> None:
    hosted, sent = Hosted(), [states(2, count) for count in (3, 1, 2)]
    for number, (position, one) in enumerate(zip((0, 3, 4), sent, strict=True), start=1):
        hosted.send(number, position, one)
        assert len(hosted.working) == 1
    answers = outputs(hosted.compute_all())
    assert [one.message.sequence for one in answers] == [1, 2, 3]  # type: ignore[union-attr]
    for answer, one, position in zip(answers, sent, (0, 3, 4), strict=True):
        assert answer.tensors is not None and torch.equal(answer.tensors["hidden_states"], one * 2 + position)


def test_a_duplicated_step_is_answered_from_the_history_and_run_once() -> None:
    hosted, sent = Hosted(), states(2, 3)
    first = hosted.step(1, 0, sent)
    (again,) = outputs(hosted.send(1, 0, sent, hops=[BEFORE]))
    assert again.tensors is not None and torch.equal(again.tensors["hidden_states"], first)
    here = HopTime(start=2, end=4, queue_s=0.0, compute_s=0.0)  # no time was spent
    assert again.message == Output(sequence=1, hops=[BEFORE, here], tensors=[])
    assert hosted.runs == 1


def test_a_step_duplicated_while_it_runs_or_waits_is_answered_by_its_one_result() -> None:
    hosted, sent = Hosted(), states(2, 3)
    hosted.send(1, 0, sent)
    hosted.send(2, 3, sent)
    assert hosted.send(1, 0, sent) == [] and hosted.send(2, 3, sent) == []
    assert len(outputs(hosted.compute_all())) == 2 and hosted.runs == 2


def test_a_duplicated_reorder_reorders_once() -> None:
    hosted, sent = Hosted(), states(3, 1)
    hosted.step(1, 0, states(2, 3))
    hosted.step(2, 3, sent, reorder=[0, 0, 1])
    (again,) = outputs(hosted.send(2, 3, sent, reorder=[0, 0, 1]))
    assert again.tensors is not None and torch.equal(again.tensors["hidden_states"], sent * 2 + 3)
    hosted.step(3, 4, states(3, 1))
    assert hosted.runs == 3


def test_a_repeat_is_answered_with_no_more_than_it_carries() -> None:
    """Who repeats small steps must not make us queue large answers."""
    hosted = Hosted({"batch": 100})
    hosted.step(1, 0, states(100, 20))
    assert hosted.send(1, 0, states(1, 20)) == []
    assert hosted.send(1, 0, states(1, 1)) == []
    (small,) = outputs(hosted.send(1, 0, states(100, 1)))
    assert small.tensors is not None and small.tensors["hidden_states"].shape == (100, 1, HIDDEN)
    with pytest.raises(ProtocolError, match="must carry hidden_states"):
        hosted.tell(Step(sequence=1, position=0, tensors=[]))


def test_a_repeat_of_what_was_rolled_back_is_not_answered() -> None:
    hosted = Hosted()
    hosted.step(1, 0, states(2, 5))
    hosted.step(2, 1, states(2, 1))
    assert hosted.send(1, 0, states(2, 5)) == []


def test_an_answer_does_not_change_with_what_comes_after_it() -> None:
    hosted, sent = Hosted(), states(2, 3)
    first = hosted.step(1, 0, sent)
    hosted.step(2, 0, states(2, 3))
    assert torch.equal(first, sent * 2)


def test_rolling_back_is_an_ordinary_step() -> None:
    hosted, again = Hosted(), states(2, 2)
    hosted.step(1, 0, states(2, 5))
    assert torch.equal(hosted.step(2, 3, again), again * 2 + 3)
    with pytest.raises(ProtocolError, match="the cache ends at 5"):
        hosted.send(3, 6, states(2, 1))


def test_a_session_can_begin_anew_at_position_zero_with_another_number_of_sequences() -> None:
    hosted, anew = Hosted(), states(3, 1)
    hosted.step(1, 0, states(2, 5))
    assert torch.equal(hosted.step(2, 0, anew), anew * 2)
    hosted.step(3, 1, states(3, 1))


def test_a_reorder_may_change_the_number_of_sequences() -> None:
    hosted = Hosted()
    hosted.step(1, 0, states(2, 3))
    hosted.step(2, 3, states(4, 1), reorder=[0, 0, 1, 1])
    hosted.step(3, 4, states(4, 1))
    hosted.step(4, 5, states(1, 1), reorder=[3])
    with pytest.raises(ProtocolError, match="the session has 1"):
        hosted.send(5, 6, states(4, 1))


def test_a_reorder_may_follow_a_roll_back() -> None:
    hosted = Hosted()
    hosted.step(1, 0, states(2, 3))
    hosted.step(2, 1, states(2, 2))
    hosted.step(3, 3, states(4, 1), reorder=[0, 0, 1, 1])
    hosted.step(4, 4, states(4, 1))
    assert hosted.runs == 4


def test_a_closed_session_is_over() -> None:
    assert Hosted().tell(Close()) == [End()]


# What does not fit


@pytest.mark.parametrize(
    ("position", "shape", "fields", "words"),
    [
        (4, (2, 1, HIDDEN), {}, "begins at position 4; the cache ends at 3"),
        (MAX_POSITIONS, (2, 1, HIDDEN), {}, "the cache ends at 3"),
        (3, (2, 1, HIDDEN + 1), {}, rf"must carry hidden_states \[batch, positions, {HIDDEN}\]"),
        (3, (2, HIDDEN), {}, "must carry hidden_states"),
        (3, (2, 1, 1, HIDDEN), {}, "must carry hidden_states"),
        (3, (1, 1, HIDDEN), {}, "1 sequences; the session has 2"),
        (3, (3, 1, HIDDEN), {}, "3 sequences; the session has 2"),
        (3, (2, 0, HIDDEN), {}, "2 sequences of 0 positions"),
        (0, (2, 0, HIDDEN), {}, "2 sequences of 0 positions"),
        (3, (2, 1, HIDDEN), {"reorder": [0, 2]}, r"rows that do not exist \(there are 2\)"),
        (3, (2, 1, HIDDEN), {"reorder": [-1, 0]}, "rows that do not exist"),
        (3, (2, 1, HIDDEN), {"reorder": [2**64 - 1, 0]}, "rows that do not exist"),
        (0, (2, 1, HIDDEN), {"reorder": [0, 1]}, "rows that do not exist"),
        (3, (2, 1, HIDDEN), {"reorder": [0]}, "2 sequences; the session has 1"),
        (3, (0, 1, HIDDEN), {"reorder": []}, "0 sequences"),
        (3, (0, 2**24, HIDDEN), {"reorder": []}, "0 sequences"),
        (0, (MAX_BATCH + 1, 1, HIDDEN), {}, f"{MAX_BATCH + 1} sequences"),
        (0, (1, MAX_STEP_POSITIONS + 1, HIDDEN), {}, f"1 to {MAX_STEP_POSITIONS} may go together"),
        (3, (2, MAX_STEP_POSITIONS // 2 + 1, HIDDEN), {}, f"1 to {MAX_STEP_POSITIONS} may go together"),
        (3, (2, 1, HIDDEN), {"position_ids": torch.zeros(2, 2, dtype=torch.int64)}, r"position_ids must be \[2, 1\]"),
        (3, (2, 1, HIDDEN), {"position_ids": torch.zeros(2, 1)}, r"position_ids must be \[2, 1\] int64"),
        (3, (2, 1, HIDDEN), {"position_ids": torch.tensor([[0], [-1]])}, "position_ids must be at least 0"),
        (3, (2, 1, HIDDEN), {"position_ids": torch.tensor([[0], [MAX_POSITIONS]])}, "position_ids must be at least 0"),
        (3, (2, 1, HIDDEN), {"mask": torch.zeros(1, 2, dtype=torch.uint8)}, r"mask must be \[2, 1\]"),
        (3, (2, 1, HIDDEN), {"mask": torch.zeros(2, 1)}, r"mask must be \[2, 1\] uint8"),
        (3, (2, 1, HIDDEN), {"junk": torch.zeros(2, 1)}, "unknown tensors: 'junk'"),
        (3, (2, 1, HIDDEN), {"scales": torch.zeros(2, 1, 1)}, "neither floating-point numbers nor int8"),
        (3, (2, 1, HIDDEN), {"hops": [BEFORE.model_copy(update={"end": 4})]}, "came to block 2 from block 4"),
        (3, (2, 1, HIDDEN), {"hops": [BEFORE] * MAX_HOPS}, "has passed 256 servers"),
    ],
)  # fmt: skip
def test_a_step_that_does_not_fit_the_session_is_refused_and_changes_nothing(
    position: int, shape: tuple[int, ...], fields: dict[str, Any], words: str
) -> None:
    hosted, sent = Hosted(), states(2, 1)
    hosted.step(1, 0, states(2, 3))
    with pytest.raises(ProtocolError, match=words):
        hosted.send(2, position, torch.zeros(shape), **fields)
    assert torch.equal(hosted.step(2, 3, sent), sent * 2 + 3)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.int8])
def test_a_step_of_whole_numbers_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ProtocolError, match="neither floating-point numbers nor int8 with float32 scales"):
        Hosted().send(1, 0, torch.zeros(2, 1, HIDDEN, dtype=dtype))


@pytest.mark.parametrize(
    ("scales", "words"),
    [
        (torch.ones(2, 1, 2), r"scales must be \[2, 1, 1\], not \[2, 1, 2\]"),
        (torch.ones(2, 1), r"scales must be \[2, 1, 1\], not \[2, 1\]"),
        (torch.ones(2, 1, 1).half(), "float32 scales"),
    ],
)
def test_int8_with_scales_that_do_not_fit_is_refused(scales: torch.Tensor, words: str) -> None:
    with pytest.raises(ProtocolError, match=words):
        Hosted().send(1, 0, torch.zeros(2, 1, HIDDEN, dtype=torch.int8), scales=scales)


@pytest.mark.parametrize("shape", [(0, 1, HIDDEN), (2, 0, HIDDEN), (0, 0, HIDDEN)])
def test_int8_of_nothing_is_refused(shape: tuple[int, int, int]) -> None:
    with pytest.raises(ProtocolError, match="may go together"):
        Hosted().send(1, 0, torch.zeros(shape, dtype=torch.int8), scales=torch.zeros(*shape[:2], 1))


def test_a_step_without_hidden_states_is_refused() -> None:
    with pytest.raises(ProtocolError, match="must carry hidden_states"):
        Hosted().tell(Step(sequence=1, position=0, tensors=[]), mask=torch.ones(2, 1, dtype=torch.uint8))


def test_a_gap_between_steps_is_refused() -> None:
    hosted = Hosted()
    hosted.send(5, 0, states(2, 1))  # a session may begin with any number: that of the client's other sessions
    with pytest.raises(ProtocolError, match="step 7 was sent after step 5"):
        hosted.send(7, 1, states(2, 1))
    hosted.send(6, 1, states(2, 1))
    hosted.compute_all()
    with pytest.raises(ProtocolError, match="step 8 was sent after step 6"):
        hosted.send(8, 2, states(2, 1))


def test_more_steps_or_positions_than_anybody_needs_do_not_wait() -> None:
    hosted = Hosted()
    hosted.send(1, 0, states(2, 1))
    with pytest.raises(ProtocolError, match="more than 4096 steps are waiting"):
        for sequence in range(2, 5000):
            hosted.send(sequence, 0, states(2, 1))
    hosted = Hosted()
    hosted.send(1, 0, states(2, 1))
    whole = states(1, MAX_STEP_POSITIONS)
    with pytest.raises(ProtocolError, match="more than 262144 positions are waiting"):
        for sequence in range(2, 1000):
            hosted.send(sequence, 0, whole)
    before = hosted.session.position
    hosted.compute()  # makes room for one more
    hosted.send(130, 0, whole)
    assert hosted.session.position == before


@pytest.mark.parametrize(
    "message",
    [OPEN, Opened(dtype="float32"), Hello(version=2, agent=""), Attach(session=TOKEN), Linked(link=1), Pong(),
     Output(sequence=1, hops=[], tensors=[]), Refusal(code="draining", reason=""), Replayed(sequence=1)],
    ids=lambda message: message.type,
)  # fmt: skip
def test_what_no_client_and_no_predecessor_says_is_refused(message: Message) -> None:
    with pytest.raises(ProtocolError, match=f"unexpected message '{message.type}' in a session"):
        Hosted().tell(message)
    with pytest.raises(ProtocolError, match=f"unexpected message '{message.type}' in a session"):
        Hosted().forward(message)


@pytest.mark.parametrize(
    "message", [TO_PEER, Promote(link=1), TakeOver(delivered=0), Close()], ids=lambda one: one.type
)
def test_a_predecessor_cannot_do_what_the_client_can(message: Message) -> None:
    with pytest.raises(ProtocolError, match=f"unexpected message '{message.type}'"):
        Hosted().forward(message)


# Replay


def test_a_fresh_server_is_brought_to_the_sessions_state_and_goes_on() -> None:
    hosted, first, second, sent = Hosted(), states(2, 3), states(2, 2), states(2, 1)
    assert hosted.session.attach() is True
    actions = hosted.replay(9, first, second)
    assert to_client(actions) == [Replayed(sequence=9)]
    assert torch.equal(hosted.step(10, 5, sent), sent * 2 + 5)
    (again,) = outputs(hosted.send(9, 3, second))
    assert again.tensors is not None and torch.equal(again.tensors["hidden_states"], second * 2 + 3)
    assert hosted.session.attach() is False


def test_steps_wait_for_the_end_of_the_replay_that_they_follow() -> None:
    hosted, told, sent = Hosted(), states(2, 3), states(2, 1)
    hosted.session.attach()
    hosted.forward(Replay(sequence=4, position=0, last=True, tensors=[]), hidden_states=told)
    hosted.forward(Step(sequence=5, position=3, tensors=[]), hidden_states=sent)
    actions = hosted.compute_all()
    assert [type(message) for message in to_client(actions)] == [Replayed, Output]
    assert hosted.runs == 2


def test_a_step_that_comes_again_during_the_replay_is_answered_after_it() -> None:
    hosted, told = Hosted(), states(2, 3)
    hosted.session.attach()
    hosted.forward(Replay(sequence=4, position=0, last=True, tensors=[]), hidden_states=told)
    assert hosted.forward(Step(sequence=4, position=2, tensors=[]), hidden_states=told[:, 2:]) == []
    replayed, output = hosted.compute()
    assert to_client([replayed, output])[0] == Replayed(sequence=4)
    assert isinstance(output, ToClient) and output.tensors is not None
    assert torch.equal(output.tensors["hidden_states"], told[:, 2:] * 2)


def test_a_thousand_repeats_during_a_replay_are_not_all_remembered() -> None:
    hosted, told = Hosted(), states(2, 3)
    hosted.forward(Replay(sequence=4, position=0, last=True, tensors=[]), hidden_states=told)
    for _ in range(1000):
        hosted.forward(Step(sequence=4, position=2, tensors=[]), hidden_states=told[:, 2:])
    assert len(outputs(hosted.compute())) <= 64


def test_a_replay_may_bring_another_number_of_sequences_than_the_session_was_opened_with() -> None:
    hosted = Hosted()
    hosted.replay(3, states(5, 2))
    with pytest.raises(ProtocolError, match="2 sequences; the session has 5"):
        hosted.send(4, 2, states(2, 1))


@pytest.mark.parametrize(
    ("part", "batch", "words"),
    [
        ({"sequence": 9, "position": 2}, 2, "a replay from position 2 came to a session at 3"),
        ({"sequence": 9, "position": 4}, 2, "a replay from position 4 came to a session at 3"),
        ({"sequence": 9, "position": 0}, 2, "a replay from position 0 came to a session at 3"),
        ({"sequence": 8, "position": 3}, 2, "a replay from position 3 came to a session at 3"),
        ({"sequence": 9, "position": 3}, 1, "a replay carries 1 sequences; the session has 2"),
        ({"sequence": 9, "position": 3}, 3, "a replay carries 3 sequences; the session has 2"),
    ],
)
def test_a_part_of_a_replay_that_does_not_follow_the_last_one_is_refused(
    part: dict[str, int], batch: int, words: str
) -> None:
    hosted = Hosted()
    hosted.replay(9, states(2, 3), last=False)
    with pytest.raises(ProtocolError, match=words):
        hosted.forward(Replay(**part, last=True, tensors=[]), hidden_states=states(batch, 1))
    hosted.forward(Replay(sequence=9, position=3, last=True, tensors=[]), hidden_states=states(2, 1))
    assert to_client(hosted.compute()) == [Replayed(sequence=9)]


def test_a_replay_that_begins_in_the_middle_is_refused_and_the_session_stays_fresh() -> None:
    hosted, sent = Hosted(), states(2, 1)
    with pytest.raises(ProtocolError, match="a replay from position 3 came to a session at 0"):
        hosted.forward(Replay(sequence=9, position=3, last=True, tensors=[]), hidden_states=sent)
    hosted.step(1, 0, sent)
    assert len(outputs(hosted.send(1, 0, sent))) == 1


def test_a_replay_to_a_session_that_knows_its_state_is_refused() -> None:
    hosted = Hosted()
    hosted.step(1, 0, states(2, 3))
    for position in (0, 3):
        with pytest.raises(ProtocolError, match="a replay from position"):
            hosted.forward(Replay(sequence=1, position=position, last=True, tensors=[]), hidden_states=states(2, 1))


@pytest.mark.parametrize(
    ("shape", "tensors", "words"),
    [
        ((2, 0, HIDDEN), {}, "0 positions"),
        ((2, 1, HIDDEN + 1), {}, "must carry hidden_states"),
        ((2, MAX_STEP_POSITIONS, HIDDEN), {}, "may go together"),
        ((2, 1, HIDDEN), {"mask": torch.zeros(2, 2, dtype=torch.uint8)}, "mask must be"),
        ((2, 1, HIDDEN), {"position_ids": torch.zeros(2, 1)}, "position_ids must be"),
        ((2, 1, HIDDEN), {"junk": torch.zeros(1)}, "unknown tensors"),
    ],
)
def test_a_malformed_replay_is_refused(shape: tuple[int, ...], tensors: dict[str, torch.Tensor], words: str) -> None:
    with pytest.raises(ProtocolError, match=words):
        Hosted().forward(
            Replay(sequence=1, position=0, last=True, tensors=[]), hidden_states=torch.zeros(shape), **tensors
        )


@pytest.mark.parametrize("running", [True, False])
def test_when_a_predecessor_dies_during_its_replay_the_next_one_begins_anew(running: bool) -> None:
    hosted, half, whole, sent = Hosted(), states(2, 3), states(2, 5), states(2, 1)
    assert hosted.session.attach() is True
    hosted.forward(Replay(sequence=4, position=0, last=False, tensors=[]), hidden_states=half)
    hosted.forward(Replay(sequence=4, position=3, last=False, tensors=[]), hidden_states=half)
    if not running:
        hosted.compute_all()
    assert hosted.session.attach() is True
    hosted.forward(Replay(sequence=6, position=0, last=True, tensors=[]), hidden_states=whole)
    actions = hosted.compute_all()
    assert to_client(actions) == [Replayed(sequence=6)]
    assert torch.equal(hosted.step(7, 5, sent), sent * 2 + 5)
    (again,) = outputs(hosted.send(6, 3, whole[:, 3:]))
    assert again.tensors is not None and torch.equal(again.tensors["hidden_states"], whole[:, 3:] * 2)


# Links


def test_results_go_to_the_successor_and_say_how_far_it_is() -> None:
    hosted, sent = Hosted(), states(2, 1)
    assert hosted.tell(TO_PEER) == [Dial(TO_PEER)]
    assert to_client(hosted.do(hosted.session.link_opened(1, False))) == [Linked(link=1)]
    hosted.session.link_measured(1, 0.125)
    hosted.session.link_measured(99, 1.0)  # one that is gone
    ids, mask = torch.tensor([[3], [4]]), torch.ones(2, 1, dtype=torch.uint8)
    hosted.send(1, 0, sent, position_ids=ids, mask=mask, hops=[BEFORE])
    (on,) = hosted.compute()
    assert isinstance(on, ToSuccessor) and on.link == 1
    here = HopTime(start=2, end=4, queue_s=0.25, compute_s=0.5, link_s=0.125)
    assert on.message == Step(sequence=1, position=0, hops=[BEFORE, here], tensors=[])
    assert torch.equal(on.tensors["hidden_states"], sent * 2)
    assert torch.equal(on.tensors["position_ids"], ids) and torch.equal(on.tensors["mask"], mask)


def test_a_reorder_is_sent_on() -> None:
    hosted = Hosted()
    hosted.link()
    hosted.send(1, 0, states(2, 3))
    hosted.send(2, 3, states(3, 1), reorder=[1, 0, 0])
    _, on = onward(hosted.compute_all())
    assert isinstance(on.message, Step) and on.message.reorder == [1, 0, 0]
    assert on.tensors["hidden_states"].shape == (3, 1, HIDDEN)


def test_a_fresh_successor_is_told_everything_first() -> None:
    hosted, first, sent = Hosted(), states(2, 3), states(2, 1)
    hosted.step(1, 0, first)
    hosted.send(2, 3, sent)
    told, linked = hosted.link(fresh=True)
    assert isinstance(told, ToSuccessor) and told.message == Replay(sequence=1, position=0, last=True, tensors=[])
    assert torch.equal(told.tensors["hidden_states"], first * 2)
    assert isinstance(linked, ToClient) and linked.message == Linked(link=1)
    (on,) = hosted.compute()
    assert isinstance(on, ToSuccessor) and isinstance(on.message, Step) and on.message.sequence == 2


def test_a_long_state_is_told_in_parts_that_may_go_together() -> None:
    hosted = Hosted()
    for sequence in range(3):
        hosted.step(sequence + 1, sequence * 1000, states(2, 1000))
    parts = onward(hosted.link(fresh=True))
    assert [part.message.last for part in parts] == [False, False, True]  # type: ignore[union-attr]
    assert sum(part.tensors["hidden_states"].shape[1] for part in parts) == 3000
    assert all(part.tensors["hidden_states"].shape[:2].numel() <= MAX_STEP_POSITIONS for part in parts)
    other = Hosted()
    for part in parts:
        other.forward(part.message, **part.tensors)
    assert to_client(other.compute_all()) == [Replayed(sequence=3)]


def test_a_successor_that_is_attached_in_the_middle_of_our_own_replay_is_told_the_rest_as_it_comes() -> None:
    hosted, first, second = Hosted(), states(2, 3), states(2, 2)
    hosted.replay(7, first, last=False)
    (part,) = onward(hosted.link(fresh=True))
    assert part.message == Replay(sequence=7, position=0, last=False, tensors=[])
    hosted.forward(Replay(sequence=7, position=3, last=True, tensors=[]), hidden_states=second)
    rest, replayed = hosted.compute()
    assert isinstance(rest, ToSuccessor) and rest.message == Replay(sequence=7, position=3, last=True, tensors=[])
    assert torch.equal(rest.tensors["hidden_states"], second * 2 + 3)
    assert to_client([replayed]) == [Replayed(sequence=7)]


def test_through_the_client_a_fresh_successor_is_told_everything_too() -> None:
    hosted, first = Hosted(), states(2, 3)
    hosted.step(1, 0, first)
    told, linked = hosted.tell(Link(link=4, fresh=True))
    assert isinstance(told, ToClient) and told.tensors is not None
    assert told.message == Replay(sequence=1, position=0, last=True, link=4, tensors=[])
    assert torch.equal(told.tensors["hidden_states"], first * 2)
    assert to_client([linked]) == [Linked(link=4)]


def test_after_a_lost_link_nothing_is_sent_and_nothing_is_lost() -> None:
    hosted, sent = Hosted(), states(2, 1)
    hosted.link()
    assert to_client(hosted.do(hosted.session.link_lost(1, "it hung up"))) == [LinkLost(link=1, reason="it hung up")]
    hosted.send(1, 0, sent)
    assert hosted.compute() == []
    assert to_client(hosted.tell(Link(link=2))) == [Linked(link=2)]
    (answer,) = outputs(hosted.send(1, 0, sent))  # as the client does
    assert answer.tensors is not None and torch.equal(answer.tensors["hidden_states"], sent * 2)
    assert hosted.runs == 1


def test_a_new_link_replaces_the_old_one_which_is_not_heard_of_again() -> None:
    hosted = Hosted()
    hosted.link(1)
    second = TO_PEER.model_copy(update={"link": 2})
    assert hosted.tell(second) == [HangUp(1), Dial(second)]
    assert hosted.session.link_lost(1, "cancelled") == []
    assert hosted.session.link_opened(1, True) == [HangUp(1)]
    hosted.send(1, 0, states(2, 1))
    assert hosted.compute() == []  # the new one does not stand yet
    assert hosted.tell(Link(link=3)) == [HangUp(2), ToClient(Linked(link=3))]
    assert len(outputs(hosted.send(1, 0, states(2, 1)))) == 1


@pytest.mark.parametrize(
    ("link", "words"),
    [
        (Link(link=3), "link 3 was asked for after link 3"),
        (Link(link=2), "link 2 was asked for after link 3"),
        (Link(link=4, peer_id="12D3KooW"), "needs both a peer and its session"),
        (Link(link=4, session=OTHER), "needs both a peer and its session"),
        (Link(link=4, standby=True), "needs both a peer and its session"),
    ],
)
def test_a_link_that_makes_no_sense_is_refused_and_the_old_one_stays(link: Link, words: str) -> None:
    hosted = Hosted()
    hosted.link(3)
    with pytest.raises(ProtocolError, match=words):
        hosted.tell(link)
    hosted.send(1, 0, states(2, 1))
    assert [one.link for one in onward(hosted.compute())] == [3]


def test_two_sessions_that_are_linked_in_a_circle_do_not_send_one_step_round_and_round() -> None:
    """However a malicious client links and numbers: what has passed block 4 does not come to block 2."""
    one, other, sent = Hosted(), Hosted({"start": 4, "end": 6}), states(2, 1)
    one.link()
    other.link()
    one.send(1, 0, sent)
    (on,) = onward(one.compute())
    other.forward(on.message, **on.tensors)
    (back,) = onward(other.compute())
    with pytest.raises(ProtocolError, match="a step came to block 2 from block 6"):
        one.forward(back.message, **back.tensors)
    (on,) = onward(one.send(1, 0, sent))  # a repeat, which is sent on as well
    (back,) = onward(other.forward(on.message, **on.tensors))
    with pytest.raises(ProtocolError, match="a step came to block 2 from block 6"):
        one.forward(back.message, **back.tensors)


def test_a_session_that_is_linked_to_itself_does_not_feed_itself() -> None:
    hosted = Hosted()
    hosted.tell(TO_PEER.model_copy(update={"session": TOKEN}))
    hosted.do(hosted.session.link_opened(1, hosted.session.attach()))
    hosted.send(1, 0, states(2, 1))
    (on,) = onward(hosted.compute())
    with pytest.raises(ProtocolError, match="came to block 2 from block 4"):
        hosted.forward(on.message, **on.tensors)


def test_a_step_through_as_many_servers_as_may_be_is_answered() -> None:
    hosted = Hosted()
    hosted.send(1, 0, states(2, 1), hops=[BEFORE] * (MAX_HOPS - 1))
    (answer,) = outputs(hosted.compute())
    assert isinstance(answer.message, Output) and len(answer.message.hops) == MAX_HOPS
    Output.model_validate(answer.message.model_dump())


# Standbys


def test_a_standby_withholds_its_results_until_it_takes_over() -> None:
    hosted, sent = Hosted({"standby": True}), [states(2, 1) for _ in range(3)]
    hosted.link()
    for position, one in enumerate(sent):
        hosted.send(position + 1, position, one)
    assert to_client(hosted.compute_all()) == [Replayed(sequence=1)] and onward(hosted.said) == []
    on = onward(hosted.tell(TakeOver(delivered=1)))
    assert [one.message.sequence for one in on] == [2, 3]  # type: ignore[union-attr]
    assert torch.equal(on[1].tensors["hidden_states"], sent[2] * 2 + 2)
    assert not hosted.session.standby
    hosted.send(4, 3, sent[0])
    assert len(onward(hosted.compute())) == 1


def test_what_a_standby_is_still_computing_when_it_takes_over_is_sent_when_it_is_done() -> None:
    hosted = Hosted({"standby": True})
    hosted.send(1, 0, states(2, 1))
    hosted.send(2, 1, states(2, 1))
    hosted.compute()
    assert [one.message.sequence for one in outputs(hosted.tell(TakeOver(delivered=0)))] == [1]  # type: ignore[union-attr]
    assert [one.message.sequence for one in outputs(hosted.compute())] == [2]  # type: ignore[union-attr]


def test_taking_over_twice_or_without_being_a_standby_sends_nothing_again() -> None:
    hosted = Hosted({"standby": True})
    hosted.send(1, 0, states(2, 1))
    hosted.compute()
    assert len(outputs(hosted.tell(TakeOver(delivered=0)))) == 1
    assert hosted.tell(TakeOver(delivered=0)) == []
    other = Hosted()
    other.step(1, 0, states(2, 1))
    assert other.tell(TakeOver(delivered=0)) == []


def test_a_standby_that_is_told_the_state_says_so_and_sends_nothing_on() -> None:
    hosted = Hosted({"standby": True})
    hosted.session.attach()
    assert to_client(hosted.replay(5, states(2, 3))) == [Replayed(sequence=5)]


def test_a_standby_successor_is_told_and_sent_what_the_successor_is() -> None:
    hosted, first, sent = Hosted(), states(2, 3), states(2, 1)
    hosted.link(1)
    hosted.send(1, 0, first)
    hosted.compute()
    told, _ = hosted.link(2, fresh=True, standby=True)
    assert isinstance(told, ToSuccessor) and told.link == 2 and isinstance(told.message, Replay)
    hosted.send(2, 3, sent)
    on = onward(hosted.compute())
    assert [one.link for one in on] == [1, 2]
    assert all(torch.equal(one.tensors["hidden_states"], sent * 2 + 3) for one in on)


def test_a_standby_successor_that_is_promoted_replaces_the_successor() -> None:
    hosted = Hosted()
    hosted.link(1)
    hosted.link(2, standby=True)
    assert hosted.tell(Promote(link=2)) == [HangUp(1)]
    assert hosted.tell(Promote(link=2)) == []
    hosted.send(1, 0, states(2, 1))
    assert [one.link for one in onward(hosted.compute())] == [2]
    assert to_client(hosted.session.link_lost(2, "gone")) == [LinkLost(link=2, reason="gone")]


def test_only_the_present_standby_successor_can_be_promoted() -> None:
    hosted = Hosted()
    hosted.link(1)
    assert hosted.tell(Promote(link=1)) == [] and hosted.tell(Promote(link=9)) == []
    hosted.link(2, standby=True)
    hosted.link(3, standby=True)
    assert HangUp(2) in hosted.said
    assert hosted.tell(Promote(link=2)) == []
    hosted.send(1, 0, states(2, 1))
    assert [one.link for one in onward(hosted.compute())] == [1, 3]


def test_a_lost_standby_successor_is_said_and_the_successor_goes_on() -> None:
    hosted = Hosted()
    hosted.link(1)
    hosted.link(2, standby=True)
    assert to_client(hosted.session.link_lost(2, "gone")) == [LinkLost(link=2, reason="gone")]
    hosted.send(1, 0, states(2, 1))
    assert [one.link for one in onward(hosted.compute())] == [1]


# Codecs

BOUND = 1 / 254
ROUNDING = 1e-5
"""Of float32, and of denormals near zero."""


@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3), st.sampled_from([1, 4, 63, 64, 65, 100, 576, 2049])),
    magnitude=st.floats(1e-30, 1e30),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**32),
    outlier=st.booleans(),
    some_zeros=st.booleans(),
)
@settings(deadline=None, max_examples=300)
def test_int8_brings_every_number_back_within_a_254th_of_its_blocks_largest(
    shape: tuple[int, int, int], magnitude: float, dtype: torch.dtype, seed: int, outlier: bool, some_zeros: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    sent = torch.randn(shape, generator=generator) * magnitude
    if outlier:
        sent[..., 0] *= 1000
    if some_zeros:
        sent[..., : shape[2] // 2] = 0
    sent = sent.clamp(-6e4, 6e4).to(dtype) if dtype == torch.float16 else sent.to(dtype)
    encoded = encode_hidden_states(sent, "int8")
    assert encoded["hidden_states"].shape == sent.shape and encoded["hidden_states"].dtype == torch.int8
    received = decode_hidden_states(encoded, shape[2])
    assert received.shape == sent.shape and received.is_floating_point()
    for begin in range(0, shape[2], 64):
        block, back = sent[..., begin : begin + 64].float(), received[..., begin : begin + 64]
        largest = block.abs().amax(dim=-1, keepdim=True)
        assert ((block - back).abs() <= largest * (BOUND * (1 + ROUNDING)) + 1e-38).all()
        assert (back[block == 0] == 0).all()


@pytest.mark.parametrize("hidden", [64, 100])
def test_zeros_come_back_as_zeros(hidden: int) -> None:
    received = decode_hidden_states(encode_hidden_states(torch.zeros(2, 3, hidden), "int8"), hidden)
    assert torch.equal(received, torch.zeros(2, 3, hidden))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_block_with_a_number_that_is_none_comes_back_as_nan_and_the_others_as_they_were(bad: float) -> None:
    sent = torch.ones(1, 2, 130)
    sent[0, 1, 70] = bad
    encoded = encode_hidden_states(sent, "int8")
    assert (encoded["hidden_states"][0, 1, 64:128] == 0).all()
    received = decode_hidden_states(encoded, 130)
    assert received[0, 1, 64:128].isnan().all()
    received[0, 1, 64:128] = 1.0
    torch.testing.assert_close(received, torch.ones(1, 2, 130))


@pytest.mark.parametrize("codec", [None, *CODECS])
def test_every_codec_that_may_be_asked_for_works_and_none_is_lossless(codec: str | None) -> None:
    hosted, sent = Hosted({"codec": codec}), states(2, 3)
    hosted.send(1, 0, sent)
    (answer,) = outputs(hosted.compute())
    assert answer.tensors is not None and isinstance(answer.message, Output)
    assert answer.message.hops[0].codec == codec
    received = decode_hidden_states(answer.tensors, HIDDEN)
    torch.testing.assert_close(received.float(), sent * 2, atol=0.02 if codec else 0.0, rtol=0.0)
    other = Hosted()
    other.tell(Step(sequence=1, position=0, tensors=[]), **answer.tensors)  # as the next server gets it
    assert torch.equal(other.working[0].hidden_states, received)


def test_numbers_that_are_none_from_a_stranger_are_computed_with_and_harm_nobody() -> None:
    hosted = Hosted()
    hosted.send(1, 0, torch.zeros(2, 1, HIDDEN, dtype=torch.int8), scales=torch.full((2, 1, 1), math.nan))
    assert hosted.working[0].hidden_states.isnan().all()
    assert len(outputs(hosted.compute())) == 1


# Fuzzing


def anything_said(random: Random, session: ServedSession, turn: int) -> tuple[Message, dict[str, torch.Tensor]]:
    """A message that fits its type, with fields and tensors that may or may not fit the session."""
    batch, count = random.choice([1, 2, 2, 2, 3]), random.choice([0, 1, 1, 2, 3])
    dtype = random.choice([torch.float32, torch.float32, torch.bfloat16, torch.int8, torch.int64])
    hidden = torch.ones(batch, count, random.choice([HIDDEN] * 9 + [3]))
    tensors = {"hidden_states": hidden.to(dtype)}
    for name, extra, likely in [
        ("scales", torch.ones(batch, count, 1), 0.8 if dtype == torch.int8 else 0.05),
        ("mask", torch.ones(batch, count, dtype=random.choice([torch.uint8, torch.float32])), 0.2),
        ("position_ids", torch.full((batch, count), random.choice([0, 5, -1, 2**62])), 0.2),
        ("junk", torch.ones(1), 0.03),
    ]:
        if random.random() < likely:
            tensors[name] = extra
    number, position = max(1, turn - random.choice([0, 0, 0, 1, 2, -1])), random.randint(0, session.position + 1)
    hops = [BEFORE] * random.choice([0, 0, 1, 255, 256])
    link = random.choice([*range(turn, turn + 9), 2**64 - 1])
    match random.randrange(9):
        case 0:
            peer = random.choice([None, "12D3KooW", "\x00"])
            token = TOKEN if (peer is None) == (random.random() < 0.1) else None
            return Link(link=link, peer_id=peer, session=token, standby=random.random() < 0.3, fresh=True), {}
        case 1:
            return random.choice([Promote(link=link), TakeOver(delivered=number), Linked(link=link), Pong()]), {}
        case 2 | 3:
            return Replay(sequence=number, position=position, last=random.random() < 0.3, tensors=[]), tensors
        case _:
            reorder = random.choice([None, None, [0] * batch, [9], [-1, 0], []])
            return Step(sequence=number, position=position, reorder=reorder, hops=hops, tensors=[]), tensors


def test_no_message_in_any_order_does_more_than_a_protocol_error() -> None:
    random, accepted, refused = Random("served session"), 0, 0
    for _ in range(1500):
        turn = 1
        hosted = Hosted({"standby": random.random() < 0.2, "codec": random.choice([None, "int8"])})
        for _ in range(60):
            what = random.random()
            if what < 0.35 and hosted.working:
                hosted.compute()
            elif what < 0.4:
                hosted.session.attach()
            elif what < 0.45:
                hosted.do(hosted.session.link_opened(random.randint(1, 12), random.random() < 0.5))
            elif what < 0.5:
                hosted.do(hosted.session.link_lost(random.randint(1, 12), "x" * random.choice([1, 9999])))
            else:
                message, tensors = anything_said(random, hosted.session, turn)
                say = hosted.tell if random.random() < 0.6 else hosted.forward
                try:
                    say(message, **tensors)
                    accepted += 1
                    turn = max(turn, message.sequence + 1) if isinstance(message, Step | Replay) else turn
                except ProtocolError as error:
                    assert str(error).isprintable() and len(str(error)) < 300
                    refused += 1
            for action in hosted.said:  # all of it can be written, and read again
                if isinstance(action, ToClient | ToSuccessor):
                    type(action.message).model_validate(action.message.model_dump())
            hosted.said.clear()
        hosted.compute_all()
    assert accepted > 5000 and refused > 5000
