"""Servers, streams and a client in memory, over the real session machines; a random source decides what happens next.

The "model" is integer arithmetic in which every output depends on all positions before it, so that a lost, repeated or
reordered step shows.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

import torch

from swarm.errors import Forgotten, ProtocolError, ServerFault
from swarm.page_names import PAGE, names_of
from swarm.protocol import routed_session as routed
from swarm.protocol import served_session as served
from swarm.protocol.messages import Drain, Link, Message, Open, Opened, Refusal
from swarm.protocol.routed_actions import Place
from swarm.protocol.routed_session import RoutedSession
from swarm.protocol.served_actions import Spent, Work
from swarm.protocol.served_session import ServedSession

HIDDEN = 2
MODULUS = 997
Tensors = dict[str, torch.Tensor]


class ToyCache:
    """Blocks ``[start, end)``: each adds up all it has seen."""

    def __init__(self, start: int, end: int) -> None:
        self._seen = [torch.zeros(0, 0, HIDDEN) for _ in range(start, end)]
        self._start = start

    def run(
        self, position: int, reorder: list[int] | None, hidden: torch.Tensor, position_ids: torch.Tensor | None
    ) -> torch.Tensor:
        batch, count, _ = hidden.shape
        ids = torch.arange(position, position + count).expand(batch, count) if position_ids is None else position_ids
        for index, seen in enumerate(self._seen):
            past = seen[:, :position] if position else torch.zeros(batch, 0, HIDDEN)
            assert past.shape[1] == position, "the cache lacks positions"
            if reorder is not None:
                past = past[reorder]
            new = (hidden + ids.unsqueeze(-1)) % MODULUS
            self._seen[index] = torch.cat([past, new], dim=1)
            total = self._seen[index].cumsum(dim=1)[:, position:] % MODULUS
            hidden = (hidden * 3 + total * 7 + self._start + index) % MODULUS
        return hidden

    @property
    def batch(self) -> int:
        return self._seen[0].shape[0]

    def page(self, number: int) -> list[torch.Tensor]:
        """What the blocks have seen at the positions of a page."""
        return [seen[:, number * PAGE : (number + 1) * PAGE] for seen in self._seen]

    def begin_with(self, pages: list[list[torch.Tensor]]) -> None:
        """Nothing but these."""
        self._seen = [torch.cat(parts, dim=1) for parts in zip(*pages, strict=True)]

    def copy(self) -> ToyCache:
        """One that goes on on its own."""
        other = ToyCache(self._start, self._start)
        other._seen = list(self._seen)
        return other


@dataclass(frozen=True)
class Page:
    """What a server remembers of one."""

    seen: list[torch.Tensor]
    output: torch.Tensor
    made: bytes
    """The name of the output."""


@dataclass
class Server:
    place: Place
    alive: bool = True
    draining: bool = False
    frozen: bool = False
    sessions: dict[str, Serving] = field(default_factory=dict)
    links: dict[int, Wiring] = field(default_factory=dict)
    pages: dict[tuple[int, int, bytes], Page] = field(default_factory=dict)
    """Remembered, by blocks and name."""


@dataclass
class Serving:
    """One session on one server."""

    server: Server
    hop: int
    machine: ServedSession
    blocks: tuple[int, int]
    cache: ToyCache
    computing: deque[Work] = field(default_factory=deque)
    wires: dict[int, Wiring] = field(default_factory=dict)
    over: bool = False
    prefix: list[bytes] = field(default_factory=list)
    came: torch.Tensor | None = None
    """All that came in, ``[1, n, hidden]``, while that is one plain sequence."""
    went: torch.Tensor | None = None

    def known(self, prefix: list[bytes]) -> list[bytes]:
        """What the pages are called where they leave these blocks, as many as are remembered."""
        pages = [self.server.pages.get((*self.blocks, name)) for name in prefix]
        return [page.made for page in itertools.takewhile(bool, pages) if page is not None]

    def begins_with(self, prefix: list[bytes]) -> int:
        """How many pages of this can be recalled."""
        self.prefix = prefix[: len(self.known(prefix))]
        self.machine.known = PAGE * len(self.prefix)
        return len(self.prefix)

    def recall(self, positions: int) -> torch.Tensor | None:
        pages = [self.server.pages.get((*self.blocks, name)) for name in self.prefix[: positions // PAGE]]
        found = [page for page in pages if page is not None]
        if len(found) < len(pages):
            return None
        self.cache.begin_with([page.seen for page in found])
        output = torch.cat([page.output for page in found], dim=1)
        self.came = None  # it is remembered already
        return output

    def remember(self, work: Work, output: torch.Tensor) -> None:
        """Name the pages that are full, if all that came is one plain sequence."""
        if work.position == 0:
            self.came = self.went = output[:, :0]
        is_plain = work.reorder is None and work.position_ids is None and output.shape[0] == 1
        if self.came is None or self.went is None or not is_plain or work.position > self.came.shape[1]:
            self.came = None
            return
        self.came = torch.cat([self.came[:, : work.position], work.hidden_states], dim=1)
        self.went = torch.cat([self.went[:, : work.position], output], dim=1)
        names, made = names_of([self.came[0]], 99), names_of([self.went[0]], 99)
        for number, (name, name_made) in enumerate(zip(names, made, strict=True)):
            output = self.went[:, number * PAGE : (number + 1) * PAGE]
            self.server.pages[(*self.blocks, name)] = Page(self.cache.page(number), output, name_made)


@dataclass
class Wiring:
    """A link stream."""

    source: Serving
    link: int
    target: Serving
    queue: deque[tuple[Message, Tensors]] = field(default_factory=deque)
    cut: bool = False


class SimulatedSwarm:
    """A client and its servers. :meth:`happen` lets one thing happen; False: nothing is left to happen."""

    def __init__(self, random: Random, places: list[Place], num_blocks: int, **options: object) -> None:
        self.random = random
        self.servers = {place.peer_id: Server(place) for place in places}
        self._tokens = iter(f"{number:032x}" for number in range(1, 10**6))
        self._new_client = lambda: RoutedSession(num_blocks, HIDDEN, lambda: next(self._tokens), **options)  # type: ignore[arg-type]
        self.client = self._new_client()
        self.num_blocks = num_blocks
        self.delivered: dict[int, torch.Tensor] = {}
        self.replaced: list[routed.Replaced] = []
        self.kinds: list[str] = []
        self.heard: list[tuple[str, Message]] = []
        """What servers were told, with their peer ids."""
        self.quarrels: list[str] = []
        """What one of them took for a breach of the protocol, although all keep to it."""
        self.dials_that_fail = 0.1
        self.no_way: set[tuple[str, str]] = set()
        """Pairs of servers of which the first cannot dial the second."""
        self.starved: str | None = None
        """What happens only when nothing else can: a message that is delayed as long as possible."""
        self._down: dict[int, deque[tuple[Message, Tensors]]] = {}  # client → server, by hop
        self._up: dict[int, deque[tuple[Message, Tensors]]] = {}  # server → client, by hop
        self._opening: dict[int, routed.OpenHop] = {}
        self._serving: dict[int, Serving] = {}
        self._broken: dict[int, str] = {}  # hops whose loss the client has yet to notice
        self._known_bad: set[str] = set()
        self._later: list[tuple[str, Callable[[], None]]] = []  # dials, searches, lost links

    # --- what happens

    def happen(self) -> bool:
        events: list[tuple[str, Callable[[], None]]] = []
        for hop, queue in self._down.items():
            serving = self._serving.get(hop)
            if queue and serving is not None and self._runs(serving):
                events.append(("to server", lambda hop=hop: self._server_hears(hop)))
        for hop, queue in self._up.items():
            if queue:
                events.append(("to client", lambda hop=hop: self._client_hears(hop)))
        for hop in self._opening:
            events.append(("open", lambda hop=hop: self._open(hop)))
        for serving in self._serving.values():
            if serving.computing and self._runs(serving):
                events.append(("compute", lambda serving=serving: self._compute(serving)))
            for wire in serving.wires.values():
                if wire.queue and not wire.cut and self._runs(wire.target):
                    events.append(("over link", lambda wire=wire: self._successor_hears(wire)))
        for hop in self._broken:
            if not self._up.get(hop):
                events.append(("client notices", lambda hop=hop: self._client_notices(hop)))
        for index in range(len(self._later)):
            events.append((self._later[index][0], lambda index=index: self._later.pop(index)[1]()))
        if not events:
            return False
        sooner = [event for event in events if event[0] != self.starved]
        kind, act = self.random.choice(sooner or events)
        self.kinds.append(kind)
        act()
        return True

    def next_user(self) -> None:
        """The client goes, and another one comes."""
        self.do(self.client.close())
        for kept in (self._down, self._up, self._opening, self._serving, self._broken):
            kept.clear()
        self._later.clear()
        self.delivered, self.replaced = {}, []
        self.client = self._new_client()

    # --- faults

    def forget(self) -> None:
        """A server needs the room of what it remembered."""
        self.random.choice(list(self.servers.values())).pages.clear()

    def kill(self, peer: str) -> None:
        """A server dies: its streams break, sooner or later noticed."""
        server = self.servers[peer]
        server.alive = False
        for serving in list(server.sessions.values()):
            self._end(serving, "it died")

    def cut_link(self) -> None:
        """Break one of the streams between servers, if there is any."""
        wires = [wire for one in self._serving.values() for wire in one.wires.values() if not wire.cut]
        if wires:
            self._cut(self.random.choice(wires), "cut")

    def drain(self, peer: str) -> None:
        server = self.servers[peer]
        server.draining = True
        for serving in (one for one in server.sessions.values() if one.hop in self._up and not one.over):
            self._up[serving.hop].append((Drain(within_s=1.0), {}))

    def fail_a_computation(self) -> None:
        busy = [one for one in self._serving.values() if one.computing and self._runs(one)]
        if busy:
            serving = self.random.choice(busy)
            serving.computing.clear()
            self._serve(serving, serving.machine.failed(ServerFault("out of memory")))

    # --- the client

    def do(self, actions: list[routed.Action]) -> None:
        for action in actions:
            match action:
                case routed.FindRoute(start, end):
                    self._later.append(("search", lambda start=start, end=end: self._search(start, end)))
                case routed.FindStandby():
                    self._later.append(("search standby", lambda action=action: self._search_standby(action)))
                case routed.OpenHop(hop):
                    self._opening[hop] = action
                    self._down[hop], self._up[hop] = deque(), deque()
                case routed.ToHop(hop, message, tensors):
                    self._down[hop].append((message, dict(tensors or {})))
                case routed.CloseHop(hop):
                    self._opening.pop(hop, None)
                    self._broken.pop(hop, None)
                    self._down.pop(hop, None)
                    self._up.pop(hop, None)
                    if hop in self._serving:
                        self._end(self._serving[hop], "closed", tell_client=False)
                case routed.Delivered(sequence, hidden_states):
                    assert sequence not in self.delivered, "delivered twice"
                    self.delivered[sequence] = hidden_states
                case routed.Replaced():
                    self.replaced.append(action)

    def _search(self, start: int, end: int) -> None:
        places, reached = [], start
        while reached < end:
            fitting = [
                one.place
                for one in self.servers.values()
                if one.place.start <= reached < one.place.end
                and not one.draining
                and one.place.peer_id not in self._known_bad
            ]
            if not fitting:
                self._known_bad = {peer for peer in self._known_bad if not self.servers[peer].alive}
                self._later.append(("search again", lambda: self._search(start, end)))
                return
            chosen = self.random.choice(fitting)
            places.append(Place(chosen.peer_id, reached, min(chosen.end, end)))
            reached = min(chosen.end, end)
        self.do(self.client.route_found(tuple(places)))

    def _search_standby(self, action: routed.FindStandby) -> None:
        fitting = [
            one.place.peer_id
            for one in self.servers.values()
            if one.place.start <= action.start and one.place.end >= action.end
            and one.place.peer_id not in action.without | self._known_bad and not one.draining
        ]  # fmt: skip
        place = Place(self.random.choice(fitting), action.start, action.end) if fitting else None
        self.do(self.client.standby_found(action.start, place))

    def _open(self, hop: int) -> None:
        action = self._opening.pop(hop)
        server = self.servers[action.place.peer_id]
        if not server.alive or server.draining:
            self._broken[hop] = "cannot be dialled"
            return
        request = Open(
            session=action.token, model="m", start=action.place.start, end=action.place.end, batch=1, max_length=1,
            standby=action.standby, is_last=action.place.end == self.num_blocks,
        )  # fmt: skip
        cache = ToyCache(action.place.start, action.place.end)
        serving = Serving(server, hop, ServedSession(request, HIDDEN), (request.start, request.end), cache)
        server.sessions[action.token] = serving
        self._serving[hop] = serving
        self._up[hop].append((Opened(dtype="float32", known=serving.begins_with(list(action.prefix))), {}))

    def _client_hears(self, hop: int) -> None:
        message, tensors = self._up[hop].popleft()
        if isinstance(message, Refusal):
            self.do(self.client.lost(hop, message.reason, 0.0))
            return
        try:
            self.do(self.client.received(hop, message, tensors))
        except ProtocolError as error:
            self.quarrels.append(f"client: {error}")
            self.do(self.client.lost(hop, str(error), 0.0))

    def _client_notices(self, hop: int) -> None:
        reason = self._broken.pop(hop)
        serving = self._serving.get(hop)
        if serving is not None and not serving.server.alive:
            self._known_bad.add(serving.server.place.peer_id)
        self.do(self.client.lost(hop, reason, 0.0))

    # --- the servers

    def _runs(self, serving: Serving) -> bool:
        return serving.server.alive and not serving.over

    def _server_hears(self, hop: int) -> None:
        serving = self._serving[hop]
        message, tensors = self._down[hop].popleft()
        self.heard.append((serving.server.place.peer_id, message))
        try:
            self._serve(serving, serving.machine.from_client(message, tensors))
        except ProtocolError as error:
            self.quarrels.append(f"server, from the client: {error}")
            self._end(serving, str(error))

    def _successor_hears(self, wire: Wiring) -> None:
        message, tensors = wire.queue.popleft()
        self.heard.append((wire.target.server.place.peer_id, message))
        try:
            self._serve(wire.target, wire.target.machine.from_predecessor(message, tensors))
        except ProtocolError as error:
            self.quarrels.append(f"server, over a link: {error}")
            self._cut(wire, str(error))

    def _compute(self, serving: Serving) -> None:
        work = serving.computing.popleft()
        output: torch.Tensor | None
        if work.recalled:
            output = serving.recall(work.recalled)
            if output is None:
                self._serve(serving, serving.machine.failed(Forgotten("some is not known any more")))
                return
        else:
            output = serving.cache.run(work.position, work.reorder, work.hidden_states, work.position_ids)
            serving.remember(work, output)
        self._serve(serving, serving.machine.computed(output, Spent()))

    def _serve(self, serving: Serving, actions: list[served.Action]) -> None:
        for action in actions:
            if serving.over:
                return
            match action:
                case served.Compute(work):
                    serving.computing.append(work)
                case served.ToClient(message, tensors):
                    if serving.hop in self._up:
                        self._up[serving.hop].append((message, _copy(tensors)))
                case served.ToSuccessor(link, message, tensors):
                    wire = serving.wires.get(link)
                    if wire is not None and not wire.cut:
                        wire.queue.append((message, _copy(tensors)))
                case served.Dial(link):
                    self._later.append(("dial", lambda link=link: self._dial(serving, link)))
                case served.HangUp(link):
                    serving.wires.pop(link, None)
                case served.End():
                    self._end(serving, "ended")

    def _dial(self, serving: Serving, link: Link) -> None:
        if not self._runs(serving):
            return
        assert link.peer_id is not None and link.session is not None
        target = self.servers[link.peer_id].sessions.get(link.session)
        way = (serving.server.place.peer_id, link.peer_id)
        if (
            target is None
            or not self._runs(target)
            or way in self.no_way
            or self.random.random() < self.dials_that_fail
        ):
            self._serve(serving, serving.machine.link_lost(link.link, "cannot be dialled"))
            return
        prefix = serving.known(serving.prefix)  # as it was when the dialling began
        fresh, accepted = target.machine.attach(), target.machine.accepted
        known = target.begins_with(prefix) if fresh else 0
        wire = Wiring(serving, link.link, target)
        serving.wires[link.link] = wire

        def answered() -> None:
            if self._runs(serving) and not wire.cut:
                self._serve(serving, serving.machine.link_opened(link.link, fresh, PAGE * known, accepted))

        self._later.append(("attached", answered))

    def _cut(self, wire: Wiring, reason: str) -> None:
        wire.cut = True

        def notice() -> None:
            if self._runs(wire.source) and wire.source.wires.get(wire.link) is wire:
                self._serve(wire.source, wire.source.machine.link_lost(wire.link, reason))

        self._later.append(("link lost", notice))

    def _end(self, serving: Serving, reason: str, *, tell_client: bool = True) -> None:
        if serving.over:
            return
        serving.over = True
        for one in self._serving.values():
            for wire in one.wires.values():
                if wire.target is serving and not wire.cut:
                    self._cut(wire, reason)
        if tell_client and serving.hop in self._up:
            self._broken[serving.hop] = reason


def _copy(tensors: Tensors | None) -> Tensors:
    return {name: tensor.clone() for name, tensor in (tensors or {}).items()}
