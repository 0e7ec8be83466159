"""A session as its client sees it, as a state machine: what to run and what servers say in, actions out.

It has no socket, clock or source of randomness (tokens are given to it). The client submits steps, reports what
becomes of the actions, and hands in every message; the machine keeps a chain of servers over all blocks, repairs it
when one is lost, and sends again what was under way. It never waits: what is to be done next follows from the state
(:meth:`RoutedSession._advance`), whatever order things happen in.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto

import torch

from swarm.errors import ProtocolError
from swarm.page_names import PAGE, names_of
from swarm.protocol.codec import decode_hidden_states, encode_hidden_states
from swarm.protocol.history import History
from swarm.protocol.messages import (
    MAX_PREFIX,
    MAX_STEP_POSITIONS,
    Drain,
    Link,
    Linked,
    LinkLost,
    Message,
    Opened,
    Output,
    Promote,
    Recall,
    Replay,
    Replayed,
    Step,
    TakeOver,
)
from swarm.protocol.routed_actions import (
    Action,
    CloseHop,
    Delivered,
    FindRoute,
    FindStandby,
    OpenHop,
    Place,
    Replaced,
    ToHop,
)
from swarm.protocol.tensors import DTYPES


class _LinkState(Enum):
    WAITING = auto()
    STANDING = auto()


@dataclass(eq=False)
class _Link:
    number: int
    to: int
    """The successor's hop."""
    through_client: bool = False
    state: _LinkState = _LinkState.WAITING
    told: bool = False
    """The successor was fresh, and would be told everything over this link."""


@dataclass(eq=False)
class _Hop:
    number: int
    place: Place
    token: str
    opened: bool = False
    dtype: torch.dtype = torch.float32
    prefix: tuple[bytes, ...] = ()
    """What it was asked whether it knows: names of what the step `names_step` and those after it begin with."""
    names_step: int = 0
    known: int = 0
    """So many positions of that it can recall."""
    recalls: int = 0
    """So many of the session's first positions it need not be told."""
    fresh: bool = True
    """It has not been told, or been made sure to be told, the session's state."""
    settled: bool = False
    """A replay to it has ended, or a step has passed it: it knows all that was delivered."""
    told: int = 0
    """The last step that this client sent to it, alone or in a replay."""
    draining: bool = False
    link: _Link | None = None
    standby_link: _Link | None = None
    standby: _Hop | None = None

    @property
    def can_take_over(self) -> bool:
        """(a standby) it is up to date, but for steps that are on their way to it."""
        return self.opened and self.settled


@dataclass(frozen=True)
class _Sent:
    step: Step
    tensors: dict[str, torch.Tensor]
    """As the first server is to get them, not yet encoded."""


@dataclass
class _Vacancy:
    place: Place
    reason: str
    lost_at: float | None
    by_standby: bool
    was_open: bool


class RoutedSession:
    """One session over a chain of servers for blocks ``[0, num_blocks)``."""

    def __init__(
        self,
        num_blocks: int,
        hidden_size: int,
        new_token: Callable[[], str],
        *,
        chain: bool = True,
        standbys: bool = False,
        codec: str | None = None,
        dtype: torch.dtype = torch.float32,
        window: int = 8,
    ) -> None:
        """
        Args:
            new_token: a fresh random session token, 32 hexadecimal digits.
            chain: let servers send to one another; if not, everything passes through the client.
            standbys: keep a second server of every span up to date.
            dtype: the precision in which servers are expected to take hidden states.
            window: steps under way at once.
        """
        self._num_blocks, self._hidden_size, self._new_token = num_blocks, hidden_size, new_token
        self._chain, self._standbys, self._codec, self._window = chain, standbys, codec, window
        self._dtype = dtype
        self._history = History()  # after the last step that was delivered
        self._sequence = self._delivered = 0
        self._waiting: deque[_Sent] = deque()  # not sent yet
        self._under_way: deque[_Sent] = deque()
        self._delivered_lately: deque[_Sent] = deque(maxlen=window)  # servers that are new may not have had them
        self._send_again = False
        self._hops: list[_Hop] = []
        self._vacancies: list[_Vacancy] = []
        self._searching = False
        self._searching_standby: set[int] = set()
        self._relayed: set[tuple[str, str]] = set()  # pairs of servers between which no link stands
        self._next_hop = self._next_link = 1

    # --- what the client wants

    def submit(
        self,
        position: int,
        reorder: list[int] | None,
        hidden_states: torch.Tensor,
        position_ids: torch.Tensor | None,
        mask: torch.Tensor | None,
        wanted: int | None = None,
    ) -> tuple[int, list[Action]]:
        """Run ``[batch, n, hidden]`` from `position` on; returns its sequence number and what to do.

        Args:
            wanted: only the last so many positions are to be delivered.
        """
        self._sequence += 1
        if not self._busy():
            self._history.truncate(position)
        tensors = {"hidden_states": hidden_states}
        if position_ids is not None:
            tensors["position_ids"] = position_ids
        if mask is not None:
            tensors["mask"] = mask
        step = Step(sequence=self._sequence, position=position, reorder=reorder, wanted=wanted, tensors=[])
        self._waiting.append(_Sent(step, tensors))
        return self._sequence, self._advance()

    def abort(self) -> list[Action]:
        """Give up what is under way. What the servers have done of it is unknown, so they are left.

        What was delivered stays, but for what the first step that is given up had rolled back.
        """
        self._waiting.clear()
        self._under_way.clear()
        self._sequence = self._delivered
        return self.close()

    def close(self) -> list[Action]:
        """Leave all servers; the next step begins by looking for others and telling them everything."""
        actions: list[Action] = [CloseHop(hop.number) for hop in self._everyone()]
        self._hops, self._vacancies, self._send_again, self._searching = [], [], True, False
        self._searching_standby.clear()
        return actions

    def send_again(self) -> list[Action]:
        """Repeat what is under way; harmless, and a cure if something got lost."""
        self._send_again = True
        return self._advance()

    def look_for_standbys(self) -> list[Action]:
        """Time to look again for standbys that are missing."""
        self._searching_standby.clear()
        return self._advance()

    # --- what becomes of it

    def route_found(self, places: tuple[Place, ...]) -> list[Action]:
        """The answer to :class:`FindRoute`, however long it took."""
        self._searching = False
        actions: list[Action] = []
        for place in places:
            if any(place.start < hop.place.end and hop.place.start < place.end for hop in self._hops):
                continue
            hop = self._new_hop(place)
            self._hops.append(hop)
            if place.start == 0 and self._waiting:
                hop.prefix, hop.names_step = self._prefix(), self._waiting[0].step.sequence
            actions.append(OpenHop(hop.number, place, hop.token, standby=False, prefix=hop.prefix))
        self._hops.sort(key=lambda hop: hop.place.start)
        return actions + self._advance()

    def standby_found(self, start: int, place: Place | None) -> list[Action]:
        """The answer to :class:`FindStandby` for the hop that begins at `start`."""
        hop = self._at(start)
        if hop is None or hop.standby is not None or place is None or place.end != hop.place.end:
            return []
        if place.peer_id in self._peers():
            return []  # the chain has changed since we asked
        hop.standby = self._new_hop(place)
        return [OpenHop(hop.standby.number, place, hop.standby.token, standby=True)]

    def received(self, number: int, message: Message, tensors: dict[str, torch.Tensor]) -> list[Action]:
        """A server says something.

        Raises:
            ProtocolError: not this: the server is to be given up (:meth:`lost`).
        """
        hop = self._hop(number)
        if hop is None:
            return []
        match message:
            case Opened(dtype=dtype, known=known):
                if dtype not in DTYPES or not DTYPES[dtype].is_floating_point:
                    raise ProtocolError(f"the server asks for hidden states as {dtype!r}")
                hop.opened, hop.dtype = True, DTYPES[dtype]
                hop.known = PAGE * min(known, len(hop.prefix)) if hop.dtype is self._dtype else 0
            case Linked(link=link):
                for one in (hop.link, hop.standby_link):
                    if one is not None and one.number == link:
                        one.state = _LinkState.STANDING
            case LinkLost(link=link):
                return self._link_lost(hop, link)
            case Output():
                return self._output(hop, message, tensors)
            case Replay():
                return self._relay_replay(hop, message, tensors)
            case Replayed():
                hop.settled = True
            case Drain():
                hop.draining = True
            case _:
                raise ProtocolError(f"unexpected message {message.type!r} from a server")
        return self._advance()

    def lost(self, number: int, reason: str, now: float) -> list[Action]:
        """A server failed, refused, or hung up."""
        hop = self._hop(number)
        if hop is None:
            return []
        actions: list[Action] = [CloseHop(number)]
        for primary in self._hops:
            if primary.standby is hop:
                primary.standby = None
                self._searching_standby.add(primary.number)  # not at once
                return actions + self._advance()
        if not hop.opened and not self._history and not any(vacancy.was_open for vacancy in self._vacancies):
            # It did not let the session in, and nobody knows anything yet: rather another route than a patched one.
            return self.close() + self._advance()
        return actions + self._vacate(hop, reason, now) + self._advance()

    @property
    def length(self) -> int:
        """Positions that were delivered and not rolled back."""
        return len(self._history)

    @property
    def is_recovering(self) -> bool:
        """A server was lost, and its blocks are not served again yet."""
        return bool(self._vacancies)

    @property
    def is_left(self) -> bool:
        """A server of it is leaving: it will be followed when nothing is under way."""
        return any(hop.draining for hop in self._hops)

    @property
    def hops(self) -> dict[int, Place]:
        """The servers in use now, by the numbers of their hops."""
        return {hop.number: hop.place for hop in self._hops}

    @property
    def places(self) -> tuple[Place, ...]:
        """The servers in use now."""
        return tuple(hop.place for hop in self._hops)

    @property
    def standbys(self) -> tuple[Place, ...]:
        """The servers that could take over at once."""
        return tuple(hop.standby.place for hop in self._hops if hop.standby is not None and hop.standby.can_take_over)

    @property
    def relayed(self) -> tuple[int, ...]:
        """The block boundaries at which hidden states pass through the client."""
        return tuple(
            hop.place.end for hop in self._hops[:-1] if hop.link is not None and hop.link.through_client
        )  # fmt: skip

    # --- the machine

    def _advance(self) -> list[Action]:
        """Do whatever can be done now."""
        gap = self._gap()
        if gap is not None:
            if self._searching or not self._busy():
                return []
            self._searching = True
            return [FindRoute(*gap)]
        actions = self._hand_over()
        if not all(hop.opened for hop in self._hops):
            return actions
        actions += self._link_up()
        if not all(hop.opened for hop in self._hops):
            return actions
        actions += self._feed_standbys()
        if any(hop.link is not None and hop.link.state is _LinkState.WAITING for hop in self._hops):
            return actions
        actions += self._replaced()
        if self._send_again:
            self._send_again = False
            for sent in self._under_way:
                actions += self._send(self._hops[0], sent)
        while self._waiting and len(self._under_way) < self._window and not self._rolls_back(self._waiting[0]):
            sent = self._waiting.popleft()
            self._under_way.append(sent)
            actions += self._send(self._hops[0], sent)
        return actions

    def _rolls_back(self, sent: _Sent) -> bool:
        """Whether something that is under way is not to be kept. It comes first all the same: if it had to be sent
        again, servers that have rolled it back would have no result of it."""
        if not self._under_way:
            return False
        last = self._under_way[-1]
        return sent.step.position < last.step.position + last.tensors["hidden_states"].shape[1]

    def _link_up(self) -> list[Action]:
        """Bring the first server up to date, and have every other told by the one before it."""
        actions: list[Action] = []
        head = self._hops[0]
        if head.fresh:
            actions += [*self._skip_known(head), *self._replay_to(head)]
        for hop, successor in zip(list(self._hops), [*self._hops[1:], None], strict=True):
            for one in (hop, hop.standby):
                if one is None or not one.opened:
                    continue
                if successor is None:
                    one.link = None
                elif not (hop.opened and successor.opened and hop in self._hops):
                    return actions  # one has just been opened again
                elif one is hop.standby and not successor.settled:
                    continue  # leave it to the primary to tell it everything
                elif one.link is None or one.link.to != successor.number:
                    actions += self._link(one, successor)
        return actions

    def _link(self, hop: _Hop, successor: _Hop) -> list[Action]:
        """Tell a server, or its standby ahead of time, whom to send to."""
        if hop.standby_link is not None and hop.standby_link.to == successor.number:
            hop.link, hop.standby_link = hop.standby_link, None
            return [ToHop(hop.number, Promote(link=hop.link.number))]
        ahead = not any(hop is one for one in self._hops)
        through_client = not self._chain or (hop.place.peer_id, successor.place.peer_id) in self._relayed
        if through_client and not successor.fresh and not successor.settled and not ahead:
            # It may have been told a part of the session by somebody else: nobody but itself knows.
            return [CloseHop(successor.number), *self._reopen(successor)]
        hop.link = _Link(self._new_link(), successor.number, through_client, told=successor.fresh)
        if through_client:
            link = Link(link=hop.link.number, fresh=successor.fresh and not ahead)
        else:
            link = _dial(hop.link.number, successor, standby=False)
        if not ahead:
            successor.fresh = False
        return [ToHop(hop.number, link)]

    def _reopen(self, hop: _Hop) -> list[Action]:
        """The same server, from the beginning."""
        again = self._new_hop(hop.place)
        again.standby, again.draining = hop.standby, hop.draining
        self._hops[self._hops.index(hop)] = again
        self._send_again = True
        return [OpenHop(again.number, again.place, again.token, standby=False)]

    def _feed_standbys(self) -> list[Action]:
        """Ask for standbys that are wanted, and have those that are open told what their primaries are told."""
        actions: list[Action] = []
        for before, hop in zip([None, *self._hops], self._hops, strict=False):
            standby = hop.standby
            if standby is None:
                if (self._standbys or hop.draining) and hop.number not in self._searching_standby:
                    self._searching_standby.add(hop.number)
                    leaving = hop.place.peer_id if hop.draining else None
                    actions.append(FindStandby(hop.number, hop.place.start, hop.place.end, self._peers(), leaving))
            elif not standby.opened:
                continue
            elif before is None:
                if standby.fresh:
                    actions += self._replay_to(standby)
                    actions += [self._tell(standby, sent) for sent in self._under_way]
            elif before.standby_link is None or before.standby_link.to != standby.number:
                if before.link is not None and before.link.through_client:
                    continue  # a standby is only fed by a server
                before.standby_link = _Link(self._new_link(), standby.number)
                actions.append(ToHop(before.number, _dial(before.standby_link.number, standby, standby=True)))
                standby.fresh = False
        return actions

    def _prefix(self) -> tuple[bytes, ...]:
        """Names of the pages that a session begins with of which nothing was told to anybody yet."""
        if self._history or self._under_way or self._codec is not None:
            return ()
        first: list[torch.Tensor] = []
        for sent in self._waiting:
            if not self._can_be_named(sent, sum(map(len, first))):
                break
            first.append(sent.tensors["hidden_states"][0].to(self._dtype))
        return tuple(names_of(first, MAX_PREFIX))

    @staticmethod
    def _can_be_named(sent: _Sent, position: int) -> bool:
        """Whether a step is one plain sequence that goes on from `position`."""
        is_plain = sent.tensors.keys() == {"hidden_states"} and sent.tensors["hidden_states"].shape[0] == 1
        return is_plain and sent.step.reorder is None and sent.step.position == position

    def _skip_known(self, head: _Hop) -> list[Action]:
        """Count as delivered what the first server can recall, of the positions of which nothing is wanted."""
        if not head.known or self._history or self._under_way or not self._waiting:
            return []
        if self._waiting[0].step.sequence != head.names_step:
            return []
        room = 0
        for sent in self._waiting:
            if not self._can_be_named(sent, room):
                break
            count, wanted = sent.tensors["hidden_states"].shape[1], sent.step.wanted
            room += count - (count if wanted is None else min(wanted, count))
            if wanted != 0:
                break
        head.recalls = min(head.known, room) // PAGE * PAGE
        actions: list[Action] = []
        while (left := head.recalls - len(self._history)) > 0:
            sent = self._waiting.popleft()
            states = sent.tensors["hidden_states"]
            self._history.append(states[:, :left])
            if left < states.shape[1]:
                step = sent.step.model_copy(update={"position": head.recalls})
                self._waiting.appendleft(_Sent(step, {"hidden_states": states[:, left:]}))
            else:
                self._delivered = sent.step.sequence
                actions.append(Delivered(sent.step.sequence, states[:, :0], ()))
        return actions

    def _replay_to(self, hop: _Hop) -> list[Action]:
        """Tell a server that is first in the chain all that was delivered."""
        hop.fresh, hop.told = False, self._delivered
        length = len(self._history)
        if not length:
            hop.settled = True
            return []
        if hop.recalls:
            recall = Recall(sequence=self._delivered, positions=hop.recalls, last=hop.recalls == length)
            actions: list[Action] = [ToHop(hop.number, recall)]
        else:
            actions = []
        each = max(1, MAX_STEP_POSITIONS // self._history.batch)
        for begin in range(hop.recalls, length, each):
            end = min(begin + each, length)
            part = Replay(sequence=self._delivered, position=begin, last=end == length, tensors=[])
            tensors = self._history.between(begin, end)
            actions.append(ToHop(hop.number, part, self._as_it_travels(hop, tensors)))
        return actions

    def _send(self, hop: _Hop, sent: _Sent) -> list[Action]:
        """Send a step to a server, and to its standby."""
        actions: list[Action] = [self._tell(hop, sent)]
        if hop.standby is not None and hop.standby.opened and not hop.standby.fresh:
            actions.append(self._tell(hop.standby, sent))
        return actions

    def _tell(self, hop: _Hop, sent: _Sent) -> ToHop:
        hop.told = max(hop.told, sent.step.sequence)
        return ToHop(hop.number, sent.step, self._as_it_travels(hop, sent.tensors))

    def _as_it_travels(self, hop: _Hop, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        hidden_states = tensors["hidden_states"]
        return {**tensors, **encode_hidden_states(hidden_states.to(hop.dtype), self._codec)}

    def _output(self, hop: _Hop, output: Output, tensors: dict[str, torch.Tensor]) -> list[Action]:
        is_last = hop.place.end == self._num_blocks
        expected = self._under_way if is_last else (*self._delivered_lately, *self._under_way)
        sent = next((one for one in expected if one.step.sequence == output.sequence), None)
        if sent is None:
            return []  # it came twice
        hidden_states = decode_hidden_states(tensors, self._hidden_size)
        batch, count, _ = sent.tensors["hidden_states"].shape
        if is_last and sent.step.wanted is not None:
            count = min(count, sent.step.wanted)
        if hidden_states.shape[:2] != (batch, count):
            raise ProtocolError("an output has another shape than its step")
        if not is_last:
            return self._relay(hop, sent, output, tensors)
        if sent is not self._under_way[0]:
            return []  # the one before it was told to a new last server in a replay: both are sent again
        self._delivered_lately.append(self._under_way.popleft())
        self._delivered = output.sequence
        for one in self._hops:
            one.settled = True
        self._history.truncate(sent.step.position)
        if sent.step.reorder is not None:
            self._history.reorder(torch.tensor(sent.step.reorder))
        self._history.append(sent.tensors["hidden_states"], sent.tensors.get("position_ids"), sent.tensors.get("mask"))
        delivered = Delivered(output.sequence, hidden_states, tuple(output.hops))
        return [delivered, *self._catch_up(sent), *self._advance()]

    def _catch_up(self, sent: _Sent) -> list[Action]:
        """Send a step that has just been delivered to a new first server, too, if it passed the one before that."""
        head = self._at(0)
        firsts = [head, head.standby] if head is not None else []
        behind = [one for one in firsts if one is not None and one.opened and not one.fresh]
        return [self._tell(one, sent) for one in behind if one.told < sent.step.sequence]

    def _relay(self, hop: _Hop, sent: _Sent, output: Output, tensors: dict[str, torch.Tensor]) -> list[Action]:
        """Hand the output of one server to the next."""
        link, successor = hop.link, self._at(hop.place.end)
        if successor is None or link is None or link.to != successor.number or link.state is _LinkState.WAITING:
            return []  # it is sent again when the successor knows what came before
        if sent.step.sequence > max(successor.told, self._delivered) + 1:
            return []  # likewise: one before it was lost on the way
        successor.told = max(successor.told, sent.step.sequence)
        step = sent.step.model_copy(update={"hops": output.hops})
        computed = {name: tensor for name, tensor in tensors.items() if name in ("hidden_states", "scales")}
        return [ToHop(successor.number, step, {**sent.tensors, **computed})]

    def _relay_replay(self, hop: _Hop, part: Replay, tensors: dict[str, torch.Tensor]) -> list[Action]:
        link, successor = hop.link, self._at(hop.place.end)
        if successor is None or link is None or link.number != part.link or link.to != successor.number:
            return []  # it is for another one, which was lost
        decode_hidden_states(tensors, self._hidden_size)  # so that the successor is not blamed for it
        if not {"hidden_states", "scales", "position_ids", "mask"}.issuperset(tensors):
            raise ProtocolError("a replay carries tensors that do not belong there")
        return [ToHop(successor.number, part.model_copy(update={"link": 0, "tensors": []}), tensors)]

    def _link_lost(self, hop: _Hop, number: int) -> list[Action]:
        if hop.standby_link is not None and hop.standby_link.number == number:
            standby, hop.standby_link = self._hop(hop.standby_link.to), None
            for primary in self._hops:
                if standby is not None and primary.standby is standby:
                    primary.standby = None
                    self._searching_standby.add(primary.number)
                    return [CloseHop(standby.number), *self._advance()]
            return self._advance()
        if hop.link is None or hop.link.number != number:
            return []
        link, hop.link = hop.link, None
        successor = self._hop(link.to)
        if successor is not None:
            self._relayed.add((hop.place.peer_id, successor.place.peer_id))
            if link.state is _LinkState.WAITING:  # nothing passed over it
                successor.fresh = link.told
        self._send_again = True
        return self._advance()

    def _vacate(self, hop: _Hop, reason: str, now: float | None) -> list[Action]:
        """Take a server out of the chain; its standby, if there is one, steps in as far as it has got."""
        standby = hop.standby if hop.standby is not None and hop.standby.opened else None
        actions: list[Action] = []
        if hop.standby is not None and standby is None:
            actions.append(CloseHop(hop.standby.number))
        if standby is not None:
            actions.append(ToHop(standby.number, TakeOver(delivered=self._delivered)))
        place = self._hops.index(hop)
        self._hops[place : place + 1] = [standby] if standby is not None else []
        self._vacancies.append(_Vacancy(hop.place, reason, now, standby is not None, hop.opened))
        self._send_again = True
        return actions

    def _hand_over(self) -> list[Action]:
        """Between steps, let those who leave be followed by standbys that are up to date."""
        actions: list[Action] = []
        if not self._under_way:
            for hop in list(self._hops):
                if hop.draining and hop.standby is not None and hop.standby.can_take_over:
                    actions += [*self._vacate(hop, "it is leaving", None), CloseHop(hop.number)]
        return actions

    def _replaced(self) -> list[Action]:
        vacancies, self._vacancies = self._vacancies, []
        return [Replaced(one.place, one.reason, one.lost_at, one.by_standby) for one in vacancies if one.was_open]

    def _gap(self) -> tuple[int, int] | None:
        reached = 0
        for hop in self._hops:
            if hop.place.start > reached:
                return reached, hop.place.start
            reached = hop.place.end
        return (reached, self._num_blocks) if reached < self._num_blocks else None

    def _busy(self) -> bool:
        return bool(self._waiting or self._under_way)

    def _everyone(self) -> list[_Hop]:
        return [one for hop in self._hops for one in (hop, hop.standby) if one is not None]

    def _hop(self, number: int) -> _Hop | None:
        return next((hop for hop in self._everyone() if hop.number == number), None)

    def _at(self, start: int) -> _Hop | None:
        return next((hop for hop in self._hops if hop.place.start == start), None)

    def _peers(self) -> frozenset[str]:
        return frozenset(hop.place.peer_id for hop in self._everyone())

    def _new_hop(self, place: Place) -> _Hop:
        self._next_hop += 1
        return _Hop(self._next_hop - 1, place, self._new_token())

    def _new_link(self) -> int:
        self._next_link += 1
        return self._next_link - 1


def _dial(number: int, successor: _Hop, *, standby: bool) -> Link:
    place = successor.place
    return Link(
        link=number,
        peer_id=place.peer_id,
        addresses=list(place.addresses),
        session=successor.token,
        standby=standby,
    )
