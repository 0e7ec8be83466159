"""A server that is told the state of a session goes on from there, whoever dies meanwhile."""

from __future__ import annotations

import pytest
import torch
from hosted_session import HIDDEN, Hosted, onward, outputs, states, to_client

from swarm.errors import ProtocolError
from swarm.protocol.messages import MAX_STEP_POSITIONS, Message, Output, Recall, Replay, Replayed, Step
from swarm.protocol.served_actions import Action, ToClient


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
        ({"sequence": 9, "position": 4}, 2, "a replay from position 4 came to a session at 3"),
        ({"sequence": 10, "position": 3}, 2, "a replay from position 3 came to a session at 3"),
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


def test_what_another_predecessor_is_telling_already_is_passed_over() -> None:
    """Two may have attached before either of them said a word."""
    hosted, told, sent = Hosted(), states(2, 4), states(2, 1)
    hosted.replay(9, told[:, :3], last=False)
    for part in ({"sequence": 9, "position": 2}, {"sequence": 8, "position": 3}):
        assert hosted.forward(Replay(**part, last=True, tensors=[]), hidden_states=states(2, 1)) == []  # type: ignore[arg-type]
    hosted.forward(Replay(sequence=9, position=3, last=True, tensors=[]), hidden_states=told[:, 3:])
    assert to_client(hosted.compute()) == [Replayed(sequence=9)]
    assert torch.equal(hosted.step(10, 4, sent), sent * 2 + 4)
    (again,) = outputs(hosted.send(9, 0, told))
    expected = torch.cat([told[:, :3] * 2, told[:, 3:] * 2 + 3], dim=1)
    assert again.tensors is not None and torch.equal(again.tensors["hidden_states"], expected)


def test_a_replay_of_what_is_known_is_passed_over() -> None:
    hosted = Hosted()
    first = states(2, 3)
    result = hosted.step(1, 0, first)
    for position in (0, 3):
        part = Replay(sequence=1, position=position, last=True, tensors=[])
        assert hosted.forward(part, hidden_states=states(2, 1)) == []
    assert hosted.forward(Recall(sequence=1, positions=64, last=True)) == []
    with pytest.raises(ProtocolError, match="a replay from position 3"):
        hosted.forward(Replay(sequence=2, position=3, last=True, tensors=[]), hidden_states=states(2, 1))
    (again,) = outputs(hosted.send(1, 0, first))
    assert again.tensors is not None and torch.equal(again.tensors["hidden_states"], result)


@pytest.mark.parametrize("replayed", [False, True])
def test_a_replay_of_more_takes_the_place_of_what_is_known_and_what_had_not_run_is_answered(replayed: bool) -> None:
    hosted, told, sent = Hosted(), states(2, 5), states(2, 1)
    hosted.link()
    if replayed:
        hosted.replay(1, told[:, :3], last=False)
    else:
        hosted.send(1, 0, told[:, :3])
        hosted.compute_all()
        hosted.send(2, 3, told[:, 3:4])
    hosted.forward(Replay(sequence=3, position=0, last=True, tensors=[]), hidden_states=told)
    actions = hosted.compute_all()
    assert to_client(actions) == [Replayed(sequence=3)]
    on, *answers = onward(actions)
    assert on.message == Replay(sequence=3, position=0, last=True, tensors=[])  # successors may have missed it, too
    assert [one.message.sequence for one in answers] == [2] * (not replayed)  # type: ignore[union-attr]
    hosted.send(4, 5, sent)
    (last,) = onward(hosted.compute_all())
    assert torch.equal(last.tensors["hidden_states"], sent * 2 + 5)


def test_a_step_that_follows_the_replay_is_not_answered_before_it_has_run() -> None:
    """It may begin where the replay goes further: what was there is no result of it."""
    hosted, told, sent = Hosted(), states(2, 3), states(2, 1)
    hosted.session.attach()
    hosted.forward(Replay(sequence=4, position=0, last=True, tensors=[]), hidden_states=told)
    for _ in range(2):
        assert hosted.forward(Step(sequence=5, position=2, tensors=[]), hidden_states=sent) == []
    (output,) = outputs(hosted.compute_all())
    assert output.tensors is not None and torch.equal(output.tensors["hidden_states"], sent * 2 + 2)


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


# what is known by name


def knowing(positions: int) -> Hosted:
    """A session of one sequence, of whose beginning so many positions are known."""
    hosted = Hosted({"batch": 1})
    hosted.session.known = positions
    return hosted


def told(actions: list[Action]) -> list[tuple[type[Message], int, bool]]:
    """What a successor is told of the state: the message, how many positions it stands for, and whether it is all."""
    found = []
    for one in onward(actions):
        if isinstance(one.message, Recall):
            found.append((Recall, one.message.positions, one.message.last))
        elif isinstance(one.message, Replay):
            found.append((Replay, one.tensors["hidden_states"].shape[1], one.message.last))
    return found


def test_what_is_known_is_recalled_and_the_session_goes_on_after_it() -> None:
    hosted, sent = knowing(48), states(1, 2)
    assert to_client(hosted.recall(4, 32)) == [Replayed(sequence=4)]
    assert torch.equal(hosted.step(5, 32, sent), sent * 2 + 32)
    assert hosted.session.attach() is False


def test_recalled_and_replayed_parts_follow_one_another() -> None:
    hosted, rest = knowing(32), states(1, 3)
    assert to_client(hosted.recall(4, 32, last=False)) == []
    hosted.forward(Replay(sequence=4, position=32, last=True, tensors=[]), hidden_states=rest)
    assert to_client(hosted.compute()) == [Replayed(sequence=4)]
    actions = hosted.link(fresh=True)
    assert told(actions) == [(Replay, 35, True)]
    assert torch.equal(onward(actions)[0].tensors["hidden_states"][:, 32:], rest * 2 + 32)


@pytest.mark.parametrize(("known", "positions"), [(0, 16), (16, 32)])
def test_who_wants_more_recalled_than_is_known_is_refused(known: int, positions: int) -> None:
    with pytest.raises(ProtocolError, match=f"{positions} positions are to be recalled; {known} are known"):
        knowing(known).recall(4, positions)


def test_a_session_that_has_begun_recalls_nothing() -> None:
    hosted = knowing(32)
    hosted.step(1, 0, states(1, 2))
    with pytest.raises(ProtocolError, match="are to be recalled"):
        hosted.recall(4, 32)


@pytest.mark.parametrize(
    ("known", "expected"),
    [(0, [(Replay, 32, True)]), (16, [(Recall, 16, False), (Replay, 16, True)]), (48, [(Recall, 32, True)])],
)
@pytest.mark.parametrize("linked_first", [False, True])
def test_a_fresh_successor_recalls_what_it_knows_and_is_told_the_rest(
    linked_first: bool, known: int, expected: list[tuple[type[Message], int, bool]]
) -> None:
    hosted = knowing(32)
    actions = hosted.link(fresh=True, known=known) if linked_first else []
    actions += hosted.recall(4, 32)
    actions += [] if linked_first else hosted.link(fresh=True, known=known)
    assert told(actions) == expected


def test_a_successor_recalls_nothing_of_what_has_changed_since() -> None:
    hosted = knowing(48)
    hosted.recall(4, 48)
    hosted.step(5, 20, states(1, 30))
    assert told(hosted.link(fresh=True, known=48)) == [(Recall, 16, False), (Replay, 34, True)]
    hosted.send(6, 50, states(2, 1), reorder=[0, 0])
    hosted.compute_all()
    assert told(hosted.link(2, fresh=True, known=48)) == [(Replay, 51, True)]


def test_a_successor_recalls_nothing_that_came_here_in_another_way() -> None:
    hosted = knowing(48)
    hosted.step(1, 0, states(1, 40))
    assert told(hosted.link(fresh=True, known=32)) == [(Replay, 40, True)]


def test_what_was_recalled_for_a_predecessor_that_died_does_not_count() -> None:
    hosted = knowing(48)
    hosted.recall(4, 32, last=False)
    assert hosted.session.attach() is True
    hosted.replay(4, states(1, 33))
    assert told(hosted.link(fresh=True, known=48)) == [(Replay, 33, True)]
