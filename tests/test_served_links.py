"""Results go on to the right place, whatever becomes of links and standbys."""

from __future__ import annotations

import pytest
import torch
from hosted_session import BEFORE, HIDDEN, OTHER, TO_PEER, TOKEN, Hosted, onward, outputs, states, to_client

from swarm.errors import ProtocolError
from swarm.protocol.messages import (
    MAX_HOPS,
    MAX_STEP_POSITIONS,
    HopTime,
    Link,
    Linked,
    LinkLost,
    Output,
    Promote,
    Replay,
    Replayed,
    Step,
    TakeOver,
)
from swarm.protocol.served_actions import Dial, HangUp, ToClient, ToSuccessor


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


def test_a_successor_is_told_the_results_that_it_has_missed() -> None:
    hosted, sent = Hosted(), [states(2, 1) for _ in range(3)]
    for number, one in enumerate(sent):
        hosted.step(number + 1, number, one)
    *told, linked = hosted.link(accepted=1)
    assert [one.message.sequence for one in onward(told)] == [2, 3] and to_client([linked]) == [Linked(link=1)]  # type: ignore[union-attr]
    for number, one in enumerate(onward(told), start=1):
        assert torch.equal(one.tensors["hidden_states"], sent[number] * 2 + number)
    assert onward(hosted.link(2, accepted=3)) == []
    hosted.send(4, 3, states(2, 1), reorder=[1, 0])
    hosted.compute()
    assert [one.message.sequence for one in onward(hosted.link(3, accepted=3))] == [4]  # type: ignore[union-attr]
    (everything,) = onward(hosted.link(4, accepted=2))  # what came of step 3 has changed places since
    assert everything.message == Replay(sequence=4, position=0, last=True, tensors=[])


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
