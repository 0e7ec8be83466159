"""Both ends of a session stream, driven against each other in memory: answers, refusals, repeats and nonsense."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.errors import REMOTE_ERRORS, CacheFull, ProtocolError, RemoteError, ServerFault
from swarm.protocol.frames import Buffer, FrameDecoder
from swarm.protocol.messages import (
    PROTOCOL_VERSION,
    Close,
    Hello,
    Message,
    Open,
    Opened,
    Output,
    Ping,
    Pong,
    Refusal,
    Step,
    decode_message,
    encode_message,
)
from swarm.protocol.sessions import (
    ClientEvent,
    ClientSession,
    DrainAnnounced,
    OpenRequested,
    OutputReceived,
    Refused,
    ServerEvent,
    ServerSession,
    SessionEnded,
    SessionOpened,
    StepRequested,
)

HIDDEN = 4
OPEN = Open(model="ab" * 32, start=0, end=2, batch=2, max_length=100)
CUTS = st.lists(st.integers(0, 2**16), max_size=20)


def joined(buffers: list[Buffer]) -> bytes:
    return b"".join(bytes(buffer) for buffer in buffers)


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[begin:end] for begin, end in itertools.pairwise(edges)]


def messages_in(data: bytes) -> list[Message]:
    return [decode_message(frame)[0] for frame in FrameDecoder().feed(data)]


def encoded(*messages: Message, **tensors: torch.Tensor) -> bytes:
    """`messages` one after another; the last one carries `tensors`."""
    *first, last = messages
    return b"".join(joined(encode_message(message)) for message in first) + joined(encode_message(last, tensors))


def run(request: StepRequested) -> torch.Tensor:
    """What our servers compute."""
    return request.hidden_states * 2 + request.step.position


class Conversation:
    """A client and a server joined by function calls; `cuts` says how the bytes are chunked on their way."""

    def __init__(self, cuts: list[int] | None = None) -> None:
        self.client, self.server = ClientSession(), ServerSession(HIDDEN)
        self.cuts = cuts or []
        self.runs = 0

    def to_server(self) -> list[ServerEvent]:
        stream = joined(self.client.take_outgoing())
        return [event for piece in pieces(stream, self.cuts) for event in self.server.receive_data(piece)]

    def to_client(self) -> list[ClientEvent]:
        stream = joined(self.server.take_outgoing())
        return [event for piece in pieces(stream, self.cuts) for event in self.client.receive_data(piece)]

    def opened(self, batch: int = 2) -> Conversation:
        self.client.open(OPEN.model_copy(update={"batch": batch}))
        (request,) = self.to_server()
        assert isinstance(request, OpenRequested) and request.request.batch == batch
        self.server.accept("float32")
        assert self.to_client() == [SessionOpened("float32")]
        return self

    def send(self, sequence: int, position: int, states: torch.Tensor, **fields: Any) -> list[ServerEvent]:
        """Send a step. Tensors besides `states` are given as fields."""
        tensors = {name: value for name, value in fields.items() if isinstance(value, torch.Tensor)}
        others = {name: value for name, value in fields.items() if name not in tensors}
        step = Step(sequence=sequence, position=position, tensors=[], **others)
        self.client.step(step, {"hidden_states": states, **tensors})
        return self.to_server()

    def answer(self, events: list[ServerEvent]) -> OutputReceived:
        """Run the step that was requested and return what the client gets."""
        (request,) = events
        assert isinstance(request, StepRequested)
        self.runs += 1
        self.server.send_output(request.step, run(request), queue_s=0.25, compute_s=0.5)
        (output,) = self.to_client()
        assert isinstance(output, OutputReceived)
        return output

    def step(self, sequence: int, position: int, states: torch.Tensor, **fields: Any) -> OutputReceived:
        return self.answer(self.send(sequence, position, states, **fields))


def states(batch: int, count: int) -> torch.Tensor:
    return torch.rand(batch, count, HIDDEN)


def test_both_sides_greet_and_the_server_makes_room() -> None:
    talk = Conversation()
    assert talk.to_server() == []
    assert talk.to_client() == []
    talk.client.open(OPEN)
    assert talk.to_server() == [OpenRequested(OPEN)]
    assert talk.to_client() == []
    talk.server.accept("bfloat16")
    assert talk.to_client() == [SessionOpened("bfloat16")]


def test_a_step_is_answered_with_its_result_and_where_the_time_went() -> None:
    sent = states(2, 3)
    output = Conversation().opened().step(7, 0, sent)
    assert torch.equal(output.hidden_states, sent * 2)
    assert (output.sequence, output.queue_s, output.compute_s) == (7, 0.25, 0.5)


def test_position_ids_and_mask_arrive_with_their_step() -> None:
    position_ids, mask = torch.tensor([[0, 1], [0, 0]]), torch.tensor([[1, 1], [0, 1]], dtype=torch.uint8)
    (request,) = Conversation().opened().send(1, 0, states(2, 2), position_ids=position_ids, mask=mask)
    assert isinstance(request, StepRequested)
    assert request.position_ids is not None and torch.equal(request.position_ids, position_ids)
    assert request.mask is not None and torch.equal(request.mask, mask)


@pytest.mark.parametrize("error_type", REMOTE_ERRORS.values(), ids=REMOTE_ERRORS)
def test_a_refusal_arrives_as_the_error_it_was(error_type: type[RemoteError]) -> None:
    talk = Conversation()
    talk.client.open(OPEN)
    talk.to_server()
    talk.server.refuse(error_type("because"), retry_after_s=2.0)
    (refused,) = talk.to_client()
    assert isinstance(refused, Refused)
    assert type(refused.error) is error_type and str(refused.error) == "because" and refused.retry_after_s == 2.0


def test_a_refusal_of_a_later_version_arrives_as_a_remote_error() -> None:
    (refused,) = ClientSession().receive_data(encoded(Refusal(code="too_hot", reason="it is summer")))
    assert isinstance(refused, Refused)
    assert type(refused.error) is RemoteError and str(refused.error) == "it is summer"


def test_a_reason_too_long_for_the_wire_is_cut() -> None:
    talk = Conversation().opened()
    talk.server.refuse(ServerFault("x" * 10_000))
    (refused,) = talk.to_client()
    assert isinstance(refused, Refused) and str(refused.error) == "x" * 2000


def test_a_refused_step_can_be_sent_again() -> None:
    talk, sent = Conversation().opened(), states(2, 1)
    talk.send(1, 0, sent)
    talk.server.refuse(CacheFull("no room"))
    assert [type(event) for event in talk.to_client()] == [Refused]
    assert torch.equal(talk.step(1, 0, sent).hidden_states, sent * 2)


def test_a_ping_is_answered_with_a_pong_at_any_time() -> None:
    server = ServerSession(HIDDEN)
    assert server.receive_data(encoded(Ping())) == []
    assert messages_in(joined(server.take_outgoing())) == [Pong()]
    client = ClientSession()
    client.take_outgoing()
    assert client.receive_data(encoded(Ping(), Ping())) == []
    assert messages_in(joined(client.take_outgoing())) == [Pong(), Pong()]


def test_a_pong_is_no_event_and_not_answered() -> None:
    talk = Conversation().opened()
    talk.client.ping()
    talk.server.ping()
    assert talk.to_server() == [] and talk.to_client() == []
    assert talk.to_server() == [] and talk.to_client() == []
    assert talk.client.take_outgoing() == [] and talk.server.take_outgoing() == []


def test_a_ping_is_answered_while_a_step_runs() -> None:
    talk, sent = Conversation().opened(), states(2, 1)
    running = talk.send(1, 0, sent)
    talk.client.ping()
    assert talk.to_server() == []
    assert messages_in(joined(talk.server.take_outgoing())) == [Pong()]
    assert torch.equal(talk.answer(running).hidden_states, sent * 2)


def test_a_drain_is_announced_to_who_has_a_session_and_steps_go_on() -> None:
    talk, sent = Conversation().opened(), states(2, 1)
    talk.server.announce_drain(10.0)
    assert talk.to_client() == [DrainAnnounced(10.0)]
    assert torch.equal(talk.step(1, 0, sent).hidden_states, sent * 2)
    stranger = ServerSession(HIDDEN)
    stranger.announce_drain(10.0)
    assert stranger.take_outgoing() == []


def test_a_closed_session_has_ended_and_takes_no_step() -> None:
    talk = Conversation().opened()
    talk.client.close()
    assert talk.to_server() == [SessionEnded()]
    with pytest.raises(ProtocolError, match="unexpected message 'step' while closed"):
        talk.send(1, 0, states(2, 1))


def test_a_server_that_closes_ends_the_session() -> None:
    assert ClientSession().receive_data(encoded(Close())) == [SessionEnded()]


def test_a_duplicated_step_is_answered_twice_and_run_once() -> None:
    talk, sent = Conversation().opened(), states(2, 3)
    (request,) = talk.send(1, 0, sent)
    assert isinstance(request, StepRequested)
    talk.server.send_output(request.step, run(request), 0.25, 0.5)
    first = joined(talk.server.take_outgoing())
    assert talk.send(1, 0, sent) == []
    assert joined(talk.server.take_outgoing()) == first


def test_a_step_duplicated_while_it_runs_is_answered_by_its_one_result() -> None:
    talk, sent = Conversation().opened(), states(2, 3)
    running = talk.send(1, 0, sent)
    assert talk.send(1, 0, sent) == []
    assert torch.equal(talk.answer(running).hidden_states, sent * 2)


def test_a_duplicated_reorder_reorders_once() -> None:
    talk = Conversation().opened()
    talk.step(1, 0, states(2, 3))
    talk.step(2, 3, states(3, 1), reorder=[0, 0, 1])
    assert talk.send(2, 3, states(3, 1), reorder=[0, 0, 1]) == []
    talk.to_client()
    talk.step(3, 4, states(3, 1))
    assert talk.runs == 3


def test_a_thousand_repeats_of_a_small_step_do_not_queue_a_thousand_large_answers() -> None:
    talk = Conversation().opened()
    talk.step(1, 0, states(2, 500))
    answers = talk.server.receive_data(encoded(*[Step(sequence=1, position=0, tensors=[])] * 1000))
    assert answers == [] and len(joined(talk.server.take_outgoing())) < 20_000


def test_a_repeated_answer_and_the_next_one_leave_together() -> None:
    talk, sent = Conversation().opened(), states(2, 1)
    talk.step(1, 0, sent)
    assert talk.send(1, 0, sent) == []
    (request,) = talk.send(2, 1, sent)
    assert isinstance(request, StepRequested)
    talk.server.send_output(request.step, run(request), 0.25, 0.5)
    assert [event.sequence for event in talk.to_client() if isinstance(event, OutputReceived)] == [1, 2]


def test_a_step_before_the_previous_was_answered_is_refused() -> None:
    talk = Conversation().opened()
    talk.send(1, 0, states(2, 1))
    with pytest.raises(ProtocolError, match="step 2 was sent before step 1 was answered"):
        talk.send(2, 1, states(2, 1))


@pytest.mark.parametrize(
    ("position", "shape", "fields", "words"),
    [
        (4, (2, 1, HIDDEN), {}, "begins at position 4; the cache ends at 3"),
        (3, (2, 1, HIDDEN + 1), {}, rf"must carry hidden_states \[batch, positions, {HIDDEN}\]"),
        (3, (2, HIDDEN), {}, "must carry hidden_states"),
        (3, (2, 1, 1, HIDDEN), {}, "must carry hidden_states"),
        (3, (1, 1, HIDDEN), {}, "1 sequences of 1 positions; the session has 2"),
        (3, (3, 1, HIDDEN), {}, "3 sequences of 1 positions; the session has 2"),
        (3, (2, 0, HIDDEN), {}, "2 sequences of 0 positions"),
        (3, (2, 1, HIDDEN), {"reorder": [0, 2]}, r"rows that do not exist \(there are 2\)"),
        (3, (2, 1, HIDDEN), {"reorder": [-1, 0]}, "rows that do not exist"),
        (3, (2, 1, HIDDEN), {"reorder": [0]}, "2 sequences of 1 positions; the session has 1"),
        (3, (0, 1, HIDDEN), {"reorder": []}, "0 sequences"),
        (3, (0, 2**24, HIDDEN), {"reorder": []}, "0 sequences"),
        (3, (2, 1, HIDDEN), {"position_ids": torch.zeros(2, 2, dtype=torch.int64)}, r"position_ids must be \[2, 1\]"),
        (3, (2, 1, HIDDEN), {"position_ids": torch.zeros(2, 1)}, r"position_ids must be \[2, 1\] int64"),
        (3, (2, 1, HIDDEN), {"mask": torch.zeros(1, 2, dtype=torch.uint8)}, r"mask must be \[2, 1\]"),
        (3, (2, 1, HIDDEN), {"mask": torch.zeros(2, 1)}, r"mask must be \[2, 1\] uint8"),
    ],
)
def test_a_step_that_does_not_fit_the_session_is_refused(
    position: int, shape: tuple[int, ...], fields: dict[str, Any], words: str
) -> None:
    talk = Conversation().opened()
    talk.step(1, 0, states(2, 3))
    with pytest.raises(ProtocolError, match=words):
        talk.send(2, position, torch.zeros(shape), **fields)


def test_a_step_of_whole_numbers_is_refused() -> None:
    with pytest.raises(ProtocolError, match="not floating-point"):
        Conversation().opened().send(1, 0, torch.zeros(2, 1, HIDDEN, dtype=torch.int64))


def test_a_step_without_hidden_states_is_refused() -> None:
    server = Conversation().opened().server
    with pytest.raises(ProtocolError, match="must carry hidden_states"):
        server.receive_data(encoded(Step(sequence=1, position=0, tensors=[]), other=torch.zeros(2, 1, HIDDEN)))


def test_an_output_without_hidden_states_is_refused() -> None:
    output = Output(sequence=1, queue_s=0.0, compute_s=0.0, tensors=[])
    client = Conversation().opened().client
    with pytest.raises(ProtocolError, match="carries no hidden_states"):
        client.receive_data(encoded(output))


def test_rolling_back_is_an_ordinary_step() -> None:
    talk, again = Conversation().opened(), states(2, 2)
    talk.step(1, 0, states(2, 5))
    assert torch.equal(talk.step(2, 3, again).hidden_states, again * 2 + 3)
    with pytest.raises(ProtocolError, match="the cache ends at 5"):
        talk.send(3, 6, states(2, 1))


def test_a_session_can_begin_anew_at_position_zero() -> None:
    talk, anew = Conversation().opened(), states(2, 1)
    talk.step(1, 0, states(2, 5))
    assert torch.equal(talk.step(2, 0, anew).hidden_states, anew * 2)


def test_a_reorder_may_change_the_number_of_sequences() -> None:
    talk = Conversation().opened(batch=2)
    talk.step(1, 0, states(2, 3))
    talk.step(2, 3, states(4, 1), reorder=[0, 0, 1, 1])
    talk.step(3, 4, states(4, 1))
    talk.step(4, 5, states(1, 1), reorder=[3])
    with pytest.raises(ProtocolError, match="the session has 1"):
        talk.send(5, 6, states(4, 1))


@pytest.mark.parametrize(
    ("version", "who"), [(PROTOCOL_VERSION - 1, "the peer must be updated"), (99, "this side must be updated")]
)
def test_another_version_is_refused_and_who_must_update_is_said(version: int, who: str) -> None:
    for session in (ServerSession(HIDDEN), ClientSession()):
        with pytest.raises(ProtocolError, match=rf"'other/1'.*version {version} of the protocol.*{who}"):
            session.receive_data(encoded(Hello(version=version, agent="other/1")))


HELLO = Hello(version=PROTOCOL_VERSION, agent="")
STEP = Step(sequence=1, position=0, tensors=[])
OUTPUT = Output(sequence=1, queue_s=0.0, compute_s=0.0, tensors=[])


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([OPEN], "'open' while greeting"),
        ([STEP], "'step' while greeting"),
        ([HELLO, HELLO], "'hello' while greeted"),
        ([HELLO, STEP], "'step' while greeted"),
        ([HELLO, OPEN, OPEN], "'open' while opening"),
        ([HELLO, OPEN, STEP], "'step' while opening"),
        ([HELLO, Opened(dtype="float32")], "'opened' while greeted"),
        ([HELLO, OUTPUT], "'output' while greeted"),
        ([HELLO, Refusal(code="draining", reason="")], "'refusal' while greeted"),
        ([Close(), HELLO], "'hello' while closed"),
    ],
)
def test_a_server_refuses_messages_out_of_order(messages: list[Message], words: str) -> None:
    with pytest.raises(ProtocolError, match=words):
        ServerSession(HIDDEN).receive_data(encoded(*messages))


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([Opened(dtype="float32")], "'opened' while greeting"),
        ([HELLO, HELLO], "'hello' while greeted"),
        ([HELLO, OUTPUT], "'output' while greeted"),
        ([HELLO, Opened(dtype="float32"), Opened(dtype="float32")], "'opened' while open"),
        ([HELLO, OPEN], "'open' while greeted"),
        ([HELLO, STEP], "'step' while greeted"),
    ],
)
def test_a_client_refuses_messages_out_of_order(messages: list[Message], words: str) -> None:
    with pytest.raises(ProtocolError, match=words):
        ClientSession().receive_data(encoded(*messages))


@given(CUTS, st.lists(st.tuples(st.integers(1, 4), st.booleans(), st.booleans()), min_size=1, max_size=5))
@settings(deadline=None, max_examples=60)
def test_a_session_goes_the_same_way_however_its_bytes_are_chunked(
    cuts: list[int], steps: list[tuple[int, bool, bool]]
) -> None:
    talk, position = Conversation(cuts).opened(), 0
    for sequence, (count, roll_back, duplicate) in enumerate(steps):
        position = max(0, position - 1) if roll_back else position
        sent = states(2, count)
        if duplicate:
            talk.client.ping()
        assert torch.equal(talk.step(sequence, position, sent).hidden_states, sent * 2 + position)
        if duplicate:
            assert talk.send(sequence, position, sent) == []
            (again,) = talk.to_client()
            assert isinstance(again, OutputReceived) and torch.equal(again.hidden_states, sent * 2 + position)
        position += count
    assert talk.runs == len(steps)
    talk.client.close()
    assert talk.to_server() == [SessionEnded()]


def client_stream() -> bytes:
    """Everything a client says in an ordinary session."""
    client = ClientSession()
    client.open(OPEN)
    for sequence, (position, batch, reorder) in enumerate([(0, 2, None), (3, 2, None), (2, 3, [0, 0, 1])]):
        step = Step(sequence=sequence, position=position, reorder=reorder, tensors=[])
        mask = torch.ones(batch, 3, dtype=torch.uint8)
        client.step(step, {"hidden_states": torch.ones(batch, 3, HIDDEN), "mask": mask})
        client.ping()
    client.close()
    return joined(client.take_outgoing())


def server_stream() -> bytes:
    """Everything a server says in an ordinary session."""
    server = ServerSession(HIDDEN)
    server.receive_data(encoded(HELLO, OPEN))
    server.accept("float32")
    server.send_output(STEP, torch.ones(2, 3, HIDDEN), 0.25, 0.5)
    server.ping()
    server.announce_drain(3.0)
    server.refuse(CacheFull("no room"), 5.0)
    return joined(server.take_outgoing())


CLIENT_STREAM, SERVER_STREAM = client_stream(), server_stream()
MUTATIONS = st.lists(
    st.tuples(st.sampled_from(["flip", "set", "insert", "delete"]), st.integers(0, 2**16), st.integers(0, 255)),
    min_size=1,
    max_size=6,
)


def mutated(stream: bytes, mutations: list[tuple[str, int, int]]) -> bytes:
    data = bytearray(stream)
    for how, where, value in mutations:
        at = where % len(data)
        match how:
            case "flip":
                data[at] ^= 1 << value % 8
            case "set":
                data[at] = value
            case "insert":
                data[at:at] = bytes([value]) * (1 + value % 3)
            case "delete":
                del data[at : at + 1 + value % 3]
    return bytes(data)


def serve(data: bytes, cuts: list[int]) -> int:
    """Feed a server, and do all that it is asked for; returns how many steps that were."""
    server, steps = ServerSession(HIDDEN), 0
    for piece in pieces(data, cuts):
        for event in server.receive_data(piece):
            match event:
                case OpenRequested():
                    server.accept("float32")
                case StepRequested():
                    server.send_output(event.step, run(event), 0.0, 0.0)
                    steps += 1
        server.take_outgoing()
    return steps


def test_the_stream_that_is_mutated_below_is_a_valid_one() -> None:
    assert serve(CLIENT_STREAM, list(range(len(CLIENT_STREAM)))) == 3
    assert len(ClientSession().receive_data(SERVER_STREAM)) == 4


@given(MUTATIONS, CUTS)
@settings(deadline=None, max_examples=400)
def test_a_mutated_client_does_no_more_to_a_server_than_a_protocol_error(
    mutations: list[tuple[str, int, int]], cuts: list[int]
) -> None:
    data = mutated(CLIENT_STREAM, mutations)
    try:
        serve(data, sorted({*cuts, *range(0, len(data), 150)}))
    except ProtocolError as error:
        assert str(error)


@given(MUTATIONS, CUTS)
@settings(deadline=None, max_examples=200)
def test_a_mutated_server_does_no_more_to_a_client_than_a_protocol_error(
    mutations: list[tuple[str, int, int]], cuts: list[int]
) -> None:
    client = ClientSession()
    try:
        for piece in pieces(mutated(SERVER_STREAM, mutations), cuts):
            client.receive_data(piece)
    except ProtocolError as error:
        assert str(error)
