"""A server's end of a session: every step is run once, or refused with the reason why."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
import torch
from hosted_session import BEFORE, HIDDEN, OPEN, TO_PEER, TOKEN, Hosted, onward, outputs, states

from swarm.errors import REMOTE_ERRORS, ProtocolError, RemoteError, ServerFault
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
from swarm.protocol.served_actions import End, ToClient, ToSuccessor
from swarm.protocol.served_session import ServedSession


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
            wanted = random.choice([None, None, 0, 1, MAX_POSITIONS])
            return Step(
                sequence=number, position=position, reorder=reorder, wanted=wanted, hops=hops, tensors=[]
            ), tensors  # fmt: skip


def test_no_message_in_any_order_does_more_than_a_protocol_error() -> None:
    random, accepted, refused = Random("served session"), 0, 0
    for _ in range(1500):
        turn = 1
        codec, is_last = random.choice([None, "int8"]), random.random() < 0.3
        hosted = Hosted({"standby": random.random() < 0.2, "codec": codec, "is_last": is_last})
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
