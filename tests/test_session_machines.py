"""The session machines under any interleaving: whatever breaks and in whatever order, the outputs are the same."""

from __future__ import annotations

import secrets
from random import Random

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from simulated_swarm import HIDDEN, SimulatedSwarm, ToyCache

from swarm.errors import ProtocolError
from swarm.protocol.messages import (
    Drain,
    Link,
    Linked,
    LinkLost,
    Message,
    Opened,
    Output,
    Pong,
    Promote,
    Recall,
    Replay,
    Replayed,
    Step,
)
from swarm.protocol.routed_actions import CloseHop, FindRoute, FindStandby, OpenHop, Place, ToHop
from swarm.protocol.routed_session import RoutedSession

BLOCKS = 6
SPANS = [(0, 2), (2, 4), (4, 6), (0, 3), (3, 6), (1, 5)]
MOST_EVENTS = 20_000


def places(copies: int) -> list[Place]:
    return [Place(f"{start}-{end}-{copy}", start, end) for start, end in SPANS for copy in range(copies)]


class Program:
    """What a user does: prefill in chunks, tokens, roll-backs and beams; and what must come of it."""

    def __init__(self, random: Random, prompt: torch.Tensor | None = None) -> None:
        """
        Args:
            prompt: ``[1, n, hidden]``, to begin with.
        """
        self.random, self.reference = random, ToyCache(0, BLOCKS)
        self.position, self.batch = 0, random.choice([1, 1, 3]) if prompt is None else 1
        self._prompt = prompt
        self.custom_positions = random.random() < 0.3
        self._before: list[tuple[ToyCache, int, int]] = []  # every step: the state, its position, and sequences

    def next_steps(self) -> list[tuple[int, list[int] | None, torch.Tensor, torch.Tensor | None]]:
        """Some steps to be submitted at once."""
        random = self.random
        if self._prompt is not None:
            prompt, self._prompt = self._prompt, None
            self.position = prompt.shape[1]
            pieces, each = [], random.randint(3, 40)
            for begin in range(0, prompt.shape[1], each):
                pieces.append((begin, None, prompt[:, begin : begin + each], None))
            return pieces
        what = random.random()
        reorder, count, chunks = None, 1, 1
        steps = [self._guess()] if self.position and random.random() < 0.3 else []
        if self.position == 0 or what < 0.1:
            count, chunks = random.randint(1, 3), random.randint(1, 4)
        elif what < 0.3:
            self.position = random.randint(0, self.position)
            if self.position == 0:
                self.batch = random.choice([1, 2])
        elif what < 0.6:
            self.batch, old = random.randint(1, 3), self.batch
            reorder = [random.randrange(old) for _ in range(self.batch)]
        for chunk in range(chunks):
            shape, hidden = (self.batch, count, HIDDEN), self._hidden_states(count)
            ids = torch.randint(0, 9, shape[:2], generator=torch.Generator().manual_seed(random.randrange(99)))
            steps.append(
                (self.position, reorder if chunk == 0 else None, hidden,
                 ids if self.custom_positions and random.random() < 0.5 else None)
            )  # fmt: skip
            self.position += count
        return steps

    def _guess(self) -> tuple[int, None, torch.Tensor, None]:
        """A step that is begun before it is known what will be asked for, and turns out to be wrong."""
        return self.position, None, self._hidden_states(1), None

    def _hidden_states(self, count: int) -> torch.Tensor:
        numbers = [float(self.random.randrange(100)) for _ in range(self.batch * count * HIDDEN)]
        return torch.tensor(numbers).reshape(self.batch, count, HIDDEN)

    def expect(
        self, position: int, reorder: list[int] | None, hidden: torch.Tensor, ids: torch.Tensor | None
    ) -> torch.Tensor:
        """What must come of the next step."""
        self._before.append((self.reference.copy(), position, self.reference.batch))
        return self.reference.run(position, reorder, hidden, ids)

    def undo_after(self, sequence: int) -> None:
        """The user gave up the steps after this one; what the first of them rolled back stays rolled back."""
        if len(self._before) > sequence:
            self.reference, self.position, self.batch = self._before[sequence]
            del self._before[sequence:]
            self.batch = self.batch or 1


def run(random: Random, swarm: SimulatedSwarm, faults: int, rounds: int, prompt: torch.Tensor | None = None) -> None:
    program = Program(random, prompt)
    expected: dict[int, torch.Tensor] = {}
    events = 0
    for number in range(rounds):
        steps = program.next_steps()
        for index, (position, reorder, hidden, ids) in enumerate(steps):
            wanted = random.choice([None, 0, 1, 2, 5])
            if prompt is not None and number == 0 and random.random() < 0.9:
                wanted = int(index == len(steps) - 1)  # as clients want it
            sequence, actions = swarm.client.submit(position, reorder, hidden, ids, None, wanted)
            everything = program.expect(position, reorder, hidden, ids)
            expected[sequence] = everything if wanted is None else everything[:, max(0, hidden.shape[1] - wanted) :]
            swarm.do(actions)
        while len(swarm.delivered) < len(expected):
            if faults and random.random() < 0.05:
                faults -= 1
                if random.random() < 0.2:  # the user interrupts
                    abort(swarm, program, expected)
                    continue
                harm(random, swarm)
            if random.random() < 0.02:
                swarm.do(swarm.client.look_for_standbys())
            if random.random() < 0.01:
                swarm.do(swarm.client.send_again())
            if not swarm.happen():
                pytest.fail(f"a hang: {len(expected) - len(swarm.delivered)} steps were never delivered")
            events += 1
            assert events < MOST_EVENTS, "it goes round in circles"
    for sequence, output in expected.items():
        assert torch.equal(swarm.delivered[sequence], output), f"step {sequence} differs"


def abort(swarm: SimulatedSwarm, program: Program, expected: dict[int, torch.Tensor]) -> None:
    """Give up what is under way; what was delivered stays."""
    swarm.do(swarm.client.abort())
    for sequence in [one for one in expected if one not in swarm.delivered]:
        del expected[sequence]
    program.undo_after(len(swarm.delivered))


def harm(random: Random, swarm: SimulatedSwarm) -> None:
    """One fault; every block keeps a server that is well."""
    well = [server for server in swarm.servers.values() if server.alive and not server.draining]
    match random.choice(["kill", "kill", "cut", "cut", "drain", "fail"]):
        case "kill" | "drain" as what:
            victim = random.choice(well)
            others = [one.place for one in well if one is not victim]
            if all(any(place.start <= block < place.end for place in others) for block in range(BLOCKS)):
                (swarm.kill if what == "kill" else swarm.drain)(victim.place.peer_id)
        case "cut":
            swarm.cut_link()
            swarm.forget()
        case "fail":
            swarm.fail_a_computation()


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 2**32),
    chain=st.sampled_from([True, True, False]),
    standbys=st.booleans(),
    faults=st.integers(0, 6),
)
@example(seed=717, chain=True, standbys=False, faults=6)  # a step that had not run yet was answered from a replay
def test_any_interleaving_of_faults_gives_the_same_outputs(seed: int, chain: bool, standbys: bool, faults: int) -> None:
    random = Random(seed)  # thousands of choices: too many for hypothesis to draw one by one
    swarm = SimulatedSwarm(random, places(2), BLOCKS, chain=chain, standbys=standbys, window=3)
    run(random, swarm, faults, rounds=6)


@settings(max_examples=1000, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 2**32), chain=st.sampled_from([True, True, False]), standbys=st.booleans())
@example(seed=103, chain=False, standbys=False)
@example(seed=326, chain=True, standbys=True)
@example(seed=881, chain=True, standbys=True)
def test_after_one_fault_all_who_are_well_get_on(seed: int, chain: bool, standbys: bool) -> None:
    random = Random(seed)
    swarm = SimulatedSwarm(random, places(2), BLOCKS, chain=chain, standbys=standbys, window=3)
    run(random, swarm, 1, rounds=3)
    assert swarm.quarrels == []


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("standbys", [False, True])
@pytest.mark.parametrize("chain", [True, False])
def test_a_step_that_has_passed_the_first_server_when_it_dies_is_told_to_the_next(
    seed: int, standbys: bool, chain: bool
) -> None:
    talk = Conversation(seed, THREE, standbys=standbys, chain=chain)
    for count in (5, 1):
        talk.step(count)
    talk.submit()
    first, second, _ = talk.peers
    while not any(peer == second and isinstance(message, Step) for peer, message in talk.swarm.heard[-1:]):
        assert talk.swarm.happen()
    talk.swarm.kill(first)
    for _ in range(3):
        talk.wait()
        talk.submit()
    talk.wait()
    assert talk.swarm.quarrels == []
    assert [one.place.peer_id for one in talk.swarm.replaced] == [first]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 2**32),
    chain=st.sampled_from([True, True, False]),
    standbys=st.booleans(),
    faults=st.integers(0, 6),
)
def test_users_with_the_same_beginning_get_what_each_would_get_alone(
    seed: int, chain: bool, standbys: bool, faults: int
) -> None:
    random = Random(seed)
    swarm = SimulatedSwarm(random, places(2), BLOCKS, chain=chain, standbys=standbys, window=3)
    beginning = states_of(random, 70)
    for _ in range(3):
        alike = random.choice([0, 15, 40, 64, 70])
        run(random, swarm, faults, 3, torch.cat([beginning[:, :alike], states_of(random, random.randint(1, 20))], 1))
        swarm.next_user()


@pytest.mark.parametrize(("chain", "recalling"), [(True, 2), (False, 1)])
def test_what_servers_know_by_name_is_not_sent_again(chain: bool, recalling: int) -> None:
    random = Random(5)
    places = [Place("first", 0, 3), Place("last", 3, 6)]
    swarm = SimulatedSwarm(random, places, BLOCKS, chain=chain)
    swarm.dials_that_fail = 0.0
    beginning = states_of(random, 64)
    run(random, swarm, 0, 1, torch.cat([beginning, states_of(random, 3)], dim=1))
    assert not any(isinstance(message, Recall) for _, message in swarm.heard)
    swarm.next_user()
    swarm.heard.clear()
    run(random, swarm, 0, 1, torch.cat([beginning, states_of(random, 5)], dim=1))
    recalled = [(peer, message.positions) for peer, message in swarm.heard if isinstance(message, Recall)]
    assert recalled == [("first", 64), ("last", 64)][:recalling]
    assert min(message.position for _, message in swarm.heard if isinstance(message, Step)) == 64


def states_of(random: Random, count: int) -> torch.Tensor:
    """Of one sequence."""
    return torch.tensor([float(random.randrange(100)) for _ in range(count * HIDDEN)]).reshape(1, count, HIDDEN)


# One at a time


class Conversation:
    """A user, a small swarm in which nothing fails by chance, and what must come of it."""

    def __init__(self, seed: int, spans: list[tuple[int, int]], **options: object) -> None:
        names = [Place(f"{start}-{end}-{copy}", start, end) for start, end in spans for copy in "ab"]
        self.swarm = SimulatedSwarm(Random(seed), names, BLOCKS, **options)
        self.swarm.dials_that_fail = 0.0
        self.reference, self.position, self.random = ToyCache(0, BLOCKS), 0, Random(seed + 1)
        self.expected: dict[int, torch.Tensor] = {}

    @property
    def peers(self) -> list[str]:
        """The servers in use now."""
        return [place.peer_id for place in self.swarm.client.places]

    def submit(self, count: int = 1) -> int:
        hidden = torch.tensor([float(self.random.randrange(100)) for _ in range(count * HIDDEN)])
        hidden = hidden.reshape(1, count, HIDDEN)
        sequence, actions = self.swarm.client.submit(self.position, None, hidden, None, None)
        self.expected[sequence] = self.reference.run(self.position, None, hidden, None)
        self.position += count
        self.swarm.do(actions)
        return sequence

    def wait(self) -> None:
        """Until all steps are delivered, and right."""
        for _ in range(MOST_EVENTS):
            if len(self.swarm.delivered) == len(self.expected):
                break
            assert self.swarm.happen(), "a hang"
        for sequence, output in self.expected.items():
            assert torch.equal(self.swarm.delivered[sequence], output), f"step {sequence} differs"

    def step(self, count: int = 1) -> None:
        self.submit(count)
        self.wait()

    def settle(self) -> None:
        """Let everything happen that can happen by itself."""
        self.swarm.do(self.swarm.client.look_for_standbys())
        for _ in range(MOST_EVENTS):
            if not self.swarm.happen():
                return
        pytest.fail("it never comes to rest")

    def replays(self, peer: str) -> list[tuple[int, int]]:
        """(step, position) of everything that was replayed to a server."""
        told = [message for one, message in self.swarm.heard if one == peer and isinstance(message, Replay)]
        return [(part.sequence, part.position) for part in told]


TWO, THREE = [(0, 3), (3, 6)], [(0, 2), (2, 4), (4, 6)]
SEEDS = pytest.mark.parametrize("seed", range(8))


@SEEDS
@pytest.mark.parametrize("victim", [0, 1, 2])
@pytest.mark.parametrize("during_a_step", [False, True])
def test_a_standby_takes_over_and_nothing_is_replayed_to_it_twice(seed: int, victim: int, during_a_step: bool) -> None:
    talk = Conversation(seed, THREE, standbys=True)
    talk.step(5)
    talk.settle()
    talk.step()
    talk.settle()
    assert len(talk.swarm.client.standbys) == 3
    lost, standby = talk.swarm.client.places[victim], talk.swarm.client.standbys[victim].peer_id
    told = talk.replays(standby)
    assert len(told) <= 1  # none, if it has been there from the first step on
    if during_a_step:
        talk.submit()
        for _ in range(seed):
            talk.swarm.happen()
    talk.swarm.kill(lost.peer_id)
    talk.wait()
    talk.step()
    talk.settle()
    (replaced,) = talk.swarm.replaced
    assert (replaced.place, replaced.by_standby) == (lost, True) and replaced.lost_at is not None
    assert talk.peers[victim] == standby
    assert talk.replays(standby) == told


@SEEDS
@pytest.mark.parametrize("leaver", [0, 1])
def test_a_server_that_leaves_is_followed_between_steps_and_nobody_waits(seed: int, leaver: int) -> None:
    talk = Conversation(seed, TWO)
    talk.step(5)
    place = talk.swarm.client.places[leaver]
    assert not talk.swarm.client.is_left
    talk.swarm.drain(place.peer_id)
    talk.settle()
    assert talk.swarm.client.is_left or talk.swarm.replaced
    talk.step()
    talk.settle()
    (replaced,) = talk.swarm.replaced
    assert (replaced.place, replaced.lost_at, replaced.by_standby) == (place, None, True)
    assert place.peer_id not in talk.peers and not talk.swarm.client.is_left
    talk.step()
    assert len(talk.swarm.replaced) == 1


@SEEDS
def test_a_server_that_never_let_the_session_in_is_not_counted_as_lost(seed: int) -> None:
    talk = Conversation(seed, TWO)
    talk.swarm.kill("0-3-a")
    talk.swarm.kill("3-6-b")
    talk.step(3)
    assert talk.peers == ["0-3-b", "3-6-a"] and talk.swarm.replaced == []
    talk.swarm.kill("0-3-b")
    talk.swarm.servers["0-3-a"].alive = True
    talk.step()
    assert [one.place.peer_id for one in talk.swarm.replaced] == ["0-3-b"]


def test_who_is_refused_before_anything_is_known_looks_for_a_whole_route() -> None:
    machine = RoutedSession(BLOCKS, HIDDEN, lambda: secrets.token_hex(16))
    chain = (Place("a", 0, 2), Place("b", 2, 4), Place("c", 4, 6))
    _, actions = machine.submit(0, None, torch.zeros(1, 1, HIDDEN), None, None)
    assert actions == [FindRoute(0, 6)]
    _, refused, _ = (one.hop for one in machine.route_found(chain) if isinstance(one, OpenHop))
    assert FindRoute(0, 6) in machine.lost(refused, "full", now=0.0)  # not (2, 4): another may do all of it at once
    assert machine.places == ()

    first, second, third = (one.hop for one in machine.route_found(chain) if isinstance(one, OpenHop))
    for hop in (first, second, third):
        machine.received(hop, Opened(dtype="float32"), {})
    assert FindRoute(2, 4) in machine.lost(second, "died", now=0.0)
    (again,) = (one.hop for one in machine.route_found((Place("d", 2, 4),)) if isinstance(one, OpenHop))
    assert FindRoute(2, 4) in machine.lost(again, "full", now=0.0)  # the step is on its way: the others know of it
    assert [place.peer_id for place in machine.places] == ["a", "c"]


@SEEDS
def test_where_no_link_can_be_dialled_the_client_relays(seed: int) -> None:
    talk = Conversation(seed, THREE)
    names = list(talk.swarm.servers)
    talk.swarm.no_way = {(one, other) for one in names for other in names if one.startswith("0-2")}
    for count in (5, 1, 1):
        talk.step(count)
    assert talk.swarm.client.relayed == (2,)  # but from block 4 on they are linked
    talk.swarm.kill(talk.peers[1])
    talk.step()
    assert talk.swarm.client.relayed == (2,)
    assert [one.by_standby for one in talk.swarm.replaced] == [False]


@SEEDS
def test_a_link_that_is_cut_is_no_loss_of_a_server(seed: int) -> None:
    talk = Conversation(seed, THREE)
    talk.step(5)
    before = talk.peers
    talk.swarm.cut_link()
    talk.step()
    assert talk.peers == before and talk.swarm.replaced == []
    assert len(talk.swarm.client.relayed) == 1


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("standbys", [False, True])
def test_a_step_that_was_given_up_leaves_no_trace_in_the_next(seed: int, standbys: bool) -> None:
    talk = Conversation(seed, THREE, standbys=standbys)
    talk.step(3)
    position, kept = talk.position, talk.reference.copy()
    for _ in range(3):
        talk.submit(2)
    for _ in range(seed):
        talk.swarm.happen()
    talk.swarm.do(talk.swarm.client.abort())
    delivered = {1: talk.swarm.delivered[1]}
    talk.expected = {sequence: output for sequence, output in talk.expected.items() if sequence in talk.swarm.delivered}
    assert len(talk.swarm.delivered) >= len(delivered)
    talk.position, talk.reference = position, kept  # the user goes back to before the step, as far as it had got
    talk.step(2)
    talk.step()
    assert not talk.swarm.client.is_recovering


@SEEDS
@pytest.mark.parametrize(
    "starved",
    ["to server", "to client", "open", "compute", "over link", "dial", "attached", "search", "search standby",
     "client notices", "link lost"],
)  # fmt: skip
def test_whatever_is_late_and_however_often_steps_are_sent_again_each_is_delivered_once(
    seed: int, starved: str
) -> None:
    talk = Conversation(seed, TWO, standbys=True, window=3)
    talk.swarm.starved = starved
    talk.step(3)
    for _ in range(4):
        talk.submit()
    talk.swarm.kill(talk.peers[seed % 2])
    for _ in range(60):
        talk.swarm.do(talk.swarm.client.send_again())
        talk.swarm.happen()
    talk.wait()  # that no step is delivered twice is asserted by the swarm
    talk.step()


# What servers may say


def test_no_message_of_a_server_does_more_to_a_client_than_a_protocol_error() -> None:
    random, accepted, refused = Random("routed session"), 0, 0
    for _ in range(700):
        tokens = iter(f"{number:032x}" for number in range(10**6))
        client = RoutedSession(
            BLOCKS, HIDDEN, lambda tokens=tokens: next(tokens), chain=random.random() < 0.7,
            standbys=random.random() < 0.5, codec=random.choice([None, "int8"]),
        )  # fmt: skip
        position, hops, links = 0, [0], [0]
        for _ in range(60):
            actions = []
            what = random.random()
            if what < 0.1:
                _, actions = client.submit(position, None, torch.ones(2, 1, HIDDEN), None, None)
                position += 1
            elif what < 0.12:
                actions, position = client.abort(), client.length
            elif what < 0.15:
                actions = client.lost(random.choice(hops), "gone", 0.0)
            else:
                message, tensors = anything_said(random, random.choice(links))
                hop = random.choice(hops[-4:])
                try:
                    actions = client.received(hop, message, tensors)
                    accepted += 1
                except ProtocolError as error:
                    assert str(error).isprintable() and len(str(error)) < 300
                    refused += 1
                    actions = client.lost(hop, str(error), 0.0)
            while actions:
                match action := actions.pop(0):
                    case FindRoute(start, end):
                        middle = random.randint(start, end - 1) if end - start > 1 else start
                        found = [Place(f"{start}", start, middle), Place(f"{middle}", middle, end)]
                        actions += client.route_found(tuple(place for place in found if place.start < place.end))
                    case FindStandby(_, start, end):
                        actions += client.standby_found(start, Place(f"standby {start}", start, end))
                    case OpenHop(hop):
                        hops.append(hop)
                        actions += client.received(hop, Opened(dtype="float32"), {})
                    case ToHop(hop, Link(link=link)):
                        links.append(link)
                        actions += client.received(hop, Linked(link=link), {}) if random.random() < 0.7 else []
                    case ToHop() | CloseHop():
                        pass
                    case _:
                        assert action is not None
    assert accepted > 5000 and refused > 2000


def anything_said(random: Random, link: int) -> tuple[Message, dict[str, torch.Tensor]]:
    """A message that fits its type, with fields and tensors that may or may not fit the session."""
    dtype = random.choice([torch.float32, torch.float32, torch.int8, torch.int64])
    hidden = torch.ones(2, random.choice([0, 1, 1, 1, 2]), random.choice([HIDDEN] * 5 + [3]))
    tensors = {"hidden_states": hidden.to(dtype)}
    if random.random() < 0.3:
        tensors["scales"] = torch.ones(2, hidden.shape[1], 1)
    if random.random() < 0.05:
        tensors = {"mask": torch.ones(1)}
    number = random.randint(1, 8)
    link = random.choice([link, max(1, link), 2**64 - 1])
    messages: list[tuple[Message, dict[str, torch.Tensor]]] = [
        (Opened(dtype=random.choice(["float32", "bfloat16", "int64", "compile"]), known=random.randint(0, 9)), {}),
        (Linked(link=max(1, link)), {}),
        (LinkLost(link=max(1, link), reason="gone"), {}),
        (Replayed(sequence=number), {}),
        (Drain(within_s=1.0), {}),
        (random.choice([Pong(), Promote(link=1), Step(sequence=1, position=0, tensors=[])]), {}),
        (Replay(sequence=number, position=0, last=True, link=link, tensors=[]), tensors),
        *[(Output(sequence=number, hops=[], tensors=[]), tensors)] * 4,
    ]
    return random.choice(messages)
