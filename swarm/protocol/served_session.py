"""A session as its server sees it, as a state machine: messages and results in, actions out.

It has no socket, clock or source of randomness. The server feeds it what arrives from the client, from the predecessor
and from the device, and carries out the actions it returns, in order.

Links heal themselves: whoever attaches to a session that has seen nothing yet sends it the whole state first
(:class:`Replay`), or else what it has missed. What was under way when something broke is simply sent again by the
client: a step that was done already is not run twice, its result is sent on from the :class:`History` of what left
here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from swarm.errors import ProtocolError, RemoteError
from swarm.page_names import PAGE
from swarm.protocol.codec import decode_hidden_states, encode_hidden_states
from swarm.protocol.history import History
from swarm.protocol.messages import (
    MAX_BATCH,
    MAX_HOPS,
    MAX_POSITIONS,
    MAX_STEP_POSITIONS,
    Close,
    HopTime,
    Link,
    Linked,
    LinkLost,
    Message,
    Open,
    Output,
    Promote,
    Recall,
    Refusal,
    Replay,
    Replayed,
    Step,
    TakeOver,
)
from swarm.protocol.served_actions import (
    NOTHING_SPENT,
    Action,
    Compute,
    Dial,
    End,
    HangUp,
    Spent,
    ToClient,
    ToSuccessor,
    Work,
)
from swarm.protocol.tensors import dtype_name

_REMEMBERED_STEPS = 64
"""More than a client has under way at once."""
_HIDDEN_STATES = ("hidden_states", "scales")
_TENSORS = {*_HIDDEN_STATES, "position_ids", "mask"}
_MAX_WAITING = 4096
"""Steps in the queue of one session: a client keeps a few under way, a predecessor that replays sends many."""
_MAX_WAITING_POSITIONS = 1 << 18
"""And positions, over all sequences: more than a replay has, and a bound on the memory that the queue takes."""


@dataclass
class _Successor:
    link: int
    through_client: bool
    open: bool
    fresh: bool
    """It is being told the session's state."""
    known: int = 0
    """So many positions that come of this session's prefix it can recall."""
    link_s: float | None = None


class ServedSession:
    """One session on one server.

    Attributes:
        batch: sequences that the cache will hold after the work that was accepted.
        position: positions that it will hold.
        known: positions of the session's prefix that can be recalled: whoever asked was told so.
        standby: nothing is sent on.
        degraded: experts were left out of what was computed; every result is marked so.
    """

    def __init__(self, request: Open, hidden_size: int) -> None:
        self._request, self._hidden_size = request, hidden_size
        self.batch, self.position, self.known = request.batch, 0, 0
        self.standby = request.standby
        self.degraded = False
        self._fresh = True
        self._accepted = self._done = 0  # sequence numbers
        self._waiting: deque[Work] = deque()
        self._running: Work | None = None
        self._waiting_positions = 0  # over all sequences
        # Steps (and their positions) that were computed lately, or that came again during a replay:
        self._computed: deque[tuple[Step, int]] = deque(maxlen=_REMEMBERED_STEPS)
        self._repeated: deque[tuple[Step, int]] = deque(maxlen=_REMEMBERED_STEPS)
        self._withheld: deque[tuple[Step, int]] = deque(maxlen=_REMEMBERED_STEPS)  # while on standby
        self._history = History(request.max_length)
        self._recalled = 0  # so many positions of it, the first ones, are what comes of the prefix
        self._discard_running = False
        self._replaying = False
        self._settled = False  # and the client knows that this server has the session's state
        self._replayed_sequence = 0
        self._highest_link = 0
        self._successor = _Successor(link=0, through_client=True, open=True, fresh=False)
        self._standby_successor: _Successor | None = None

    @property
    def accepted(self) -> int:
        """The last step that it has, or is being told in a replay."""
        return self._accepted

    @property
    def computed_positions(self) -> int:
        """As far as it has got; what was accepted may go further."""
        return len(self._history)

    def attach(self) -> bool:
        """A predecessor attaches; returns whether it must send the session's state first: also if another one is doing
        that, which may have died."""
        return self._fresh or self._replaying

    def from_client(self, message: Message, tensors: dict[str, torch.Tensor]) -> list[Action]:
        """Take a message from the session stream.

        Raises:
            ProtocolError: the client broke the protocol: close the stream.
        """
        match message:
            case Link():
                return self._link(message)
            case Promote():
                return self._promote(message)
            case TakeOver():
                return self._take_over(message)
            case Close():
                return [End()]
            case _:
                return self.from_predecessor(message, tensors)

    def from_predecessor(self, message: Message, tensors: dict[str, torch.Tensor]) -> list[Action]:
        """Take a message from a link stream. Raises as :meth:`from_client`."""
        match message:
            case Step():
                return self._step(message, tensors)
            case Replay():
                return self._replay(message, tensors)
            case Recall():
                return self._recall(message)
            case _:
                raise ProtocolError(f"unexpected message {message.type!r} in a session")

    def computed(self, output: torch.Tensor, spent: Spent) -> list[Action]:
        """The running work is done; `output` is ``[batch, n, hidden]`` on the CPU."""
        work, self._running = self._running, None
        assert work is not None
        if self._discard_running:
            self._discard_running = False
            return self._next()
        self._history.truncate(work.position)
        self._recalled = min(self._recalled, work.position)
        if work.reorder is not None:
            self._history.reorder(torch.tensor(work.reorder))
            self._recalled = 0
        self._history.append(output, work.position_ids, work.mask)
        actions: list[Action] = []
        match work.source:
            case Step() as step:
                self._done = step.sequence
                self._computed.append((step, output.shape[1]))
                if self.standby and not self._settled:  # from the first step on, without a replay
                    self._settled = True
                    actions.append(ToClient(Replayed(sequence=step.sequence)))
                actions += self._send_on(step, output.shape[1], spent, output)
            case Replay() as part:
                actions += self._replay_on(part.sequence, part.position, output.shape[1], last=part.last)
            case Recall() as part:
                self._recalled = part.positions
                actions += self._replay_on(part.sequence, 0, part.positions, last=part.last)
        return actions + self._next()

    def failed(self, error: RemoteError) -> list[Action]:
        """The running work failed: the state of its cache is unknown, so the session is over."""
        return [*self.refuse(error), End()]

    @staticmethod
    def refuse(error: RemoteError, retry_after_s: float | None = None) -> list[Action]:
        """Tell the client why not."""
        return [ToClient(Refusal(code=error.code, reason=str(error)[:2000], retry_after_s=retry_after_s))]

    def link_opened(self, link: int, fresh: bool, known: int = 0, accepted: int | None = None) -> list[Action]:
        """A link that was dialled stands.

        Args:
            fresh: the successor knows nothing yet, …
            known: … but can recall so many positions of what comes of this session's prefix.
            accepted: the last step that the successor has from others; None: it does not say.
        """
        successor = self._find(link)
        if successor is None:
            return [HangUp(link)]
        successor.open, successor.fresh, successor.known = True, fresh, known
        actions: list[Action] = []
        if fresh:
            actions += self._replay_to(successor)
        elif accepted is not None and not self.standby:
            actions += self._bring_up_to_date(successor, accepted)
        return [*actions, ToClient(Linked(link=link))]

    def _bring_up_to_date(self, successor: _Successor, accepted: int) -> list[Action]:
        """Tell a successor, which has everything up to a step from others, what was computed while nothing led there:
        step by step if that is possible, and everything once more if not."""
        if accepted >= (self._replayed_sequence if self._replaying else self._done):
            return []
        missing = [(step, count) for step, count in self._computed if step.sequence > accepted]
        is_all = not self._replaying and len(missing) == self._done - accepted
        if not is_all or any(step.reorder is not None for step, _ in missing[1:]):
            # (The history does not hold what came of a step if sequences have changed places since.)
            return list(self._replay_to(successor))
        return [action for step, count in missing for action in self._results(step, count, [successor])]

    def link_lost(self, link: int, reason: str) -> list[Action]:
        """A link failed. What comes meanwhile is kept in the history, and sent when the client says where to."""
        successor = self._find(link)
        if successor is None:
            return []
        if successor is self._standby_successor:
            self._standby_successor = None
        else:
            successor.open = False
        return [ToClient(LinkLost(link=link, reason=reason[:2000]))]

    def link_measured(self, link: int, one_way_s: float | None) -> None:
        """How long the way to a successor takes."""
        successor = self._find(link)
        if successor is not None:
            successor.link_s = one_way_s

    def _link(self, link: Link) -> list[Action]:
        if link.link <= self._highest_link:
            raise ProtocolError(f"link {link.link} was asked for after link {self._highest_link}")
        through_client = link.peer_id is None
        if through_client == (link.session is not None) or (through_client and link.standby):
            raise ProtocolError("a link needs both a peer and its session, or neither and no standby")
        self._highest_link = link.link
        new = _Successor(link.link, through_client, open=through_client, fresh=link.fresh and through_client)
        old = self._standby_successor if link.standby else self._successor
        if link.standby:
            self._standby_successor = new
        else:
            self._successor = new
        actions: list[Action] = [HangUp(old.link)] if old is not None and not old.through_client else []
        if not through_client:
            return [*actions, Dial(link)]
        if new.fresh:
            actions += self._replay_to(new)
        return [*actions, ToClient(Linked(link=link.link))]

    def _promote(self, message: Promote) -> list[Action]:
        standby = self._standby_successor
        if standby is None or standby.link != message.link:
            return []  # it was lost, and the client is being told so
        old, self._successor, self._standby_successor = self._successor, standby, None
        return [] if old.through_client else [HangUp(old.link)]

    def _take_over(self, message: TakeOver) -> list[Action]:
        self.standby = False
        actions: list[Action] = []
        withheld = list(self._withheld)
        self._withheld.clear()
        for step, count in withheld:
            if step.sequence > message.delivered:
                actions += self._send_on(step, count)
        return actions

    def _step(self, step: Step, tensors: dict[str, torch.Tensor]) -> list[Action]:
        work = self._validated(step, step.reorder, tensors)
        batch, count, _ = work.hidden_states.shape
        if step.hops and step.hops[-1].end != self._request.start:
            raise ProtocolError(f"a step came to block {self._request.start} from block {step.hops[-1].end}")
        if len(step.hops) >= MAX_HOPS:
            raise ProtocolError(f"a step has passed {MAX_HOPS} servers already")
        if not self._fresh and step.sequence <= self._accepted:
            if step.sequence <= self._done and not self._replaying:
                return self._send_on(step, count) if batch == self._history.batch else []
            if step.sequence <= self._replayed_sequence and self._replaying:
                self._repeated.append((step, count))
            return []  # it is under way, and its result will be sent on
        if not self._fresh and step.sequence != self._accepted + 1:
            raise ProtocolError(f"step {step.sequence} was sent after step {self._accepted}")
        if step.position > self.position:
            raise ProtocolError(f"a step begins at position {step.position}; the cache ends at {self.position}")
        rows = self.batch if step.reorder is None else len(step.reorder)
        if batch != rows and step.position > 0:
            raise ProtocolError(f"a step carries {batch} sequences; the session has {rows}")
        if step.reorder is not None and (step.position == 0 or not all(0 <= row < self.batch for row in step.reorder)):
            raise ProtocolError(f"a step reorders rows that do not exist (there are {self.batch})")
        actions = self._accept(work)
        self._accepted = step.sequence
        return actions

    def _replay(self, part: Replay, tensors: dict[str, torch.Tensor]) -> list[Action]:
        work = self._validated(part, None, tensors)
        if part.position == 0 and not self._fresh and (self._replaying or part.sequence > self._accepted):
            self._begin_anew()  # whoever was telling this may have died; or has not got as far
        elif self._is_told_already(part, part.position):
            return []
        belongs = self._fresh or (self._replaying and part.sequence == self._replayed_sequence)
        if not belongs or part.position != self.position:
            raise ProtocolError(f"a replay from position {part.position} came to a session at {self.position}")
        if self.position and work.hidden_states.shape[0] != self.batch:
            raise ProtocolError(
                f"a replay carries {work.hidden_states.shape[0]} sequences; the session has {self.batch}"
            )
        if self._fresh:
            self._replaying, self._accepted, self._replayed_sequence = True, part.sequence, part.sequence
        return self._accept(work)

    def _begin_anew(self) -> None:
        """Drop what waits and what is here. Steps that have not run are answered after the replay that comes."""
        for work in (self._running, *self._waiting):
            if work is not None and isinstance(work.source, Step):
                self._repeated.append((work.source, work.count))
        self._waiting.clear()
        self._waiting_positions = 0
        self._computed.clear()
        self._history.truncate(0)
        self._discard_running = self._running is not None
        self._fresh, self._replaying, self.position = True, False, 0
        for successor in self._successors():
            successor.fresh = successor.link > 0  # it may have missed what comes now; or it passes it over

    def _is_told_already(self, part: Replay | Recall, position: int) -> bool:
        """Whether others have told this, or are telling it: several may have attached before the first said a word."""
        if self._fresh or part.sequence > self._accepted:
            return False
        return not (self._replaying and part.sequence == self._replayed_sequence and position >= self.position)

    def _recall(self, part: Recall) -> list[Action]:
        if self._replaying:
            self._begin_anew()
        elif self._is_told_already(part, 0):
            return []
        if not self._fresh or part.positions > self.known:
            raise ProtocolError(f"{part.positions} positions are to be recalled; {self.known} are known")
        self._replaying, self._accepted, self._replayed_sequence = True, part.sequence, part.sequence
        return self._accept(Work(0, None, torch.empty(1, 0, self._hidden_size), None, None, part))

    def _validated(self, message: Step | Replay, reorder: list[int] | None, tensors: dict[str, torch.Tensor]) -> Work:
        hidden_states = decode_hidden_states(tensors, self._hidden_size)
        batch, count, _ = hidden_states.shape
        if batch == 0 or count == 0 or batch > MAX_BATCH or batch * count > MAX_STEP_POSITIONS:
            raise ProtocolError(
                f"a message carries {batch} sequences of {count} positions; 1 to {MAX_STEP_POSITIONS} may go together"
            )
        if not tensors.keys() <= _TENSORS:
            raise ProtocolError(f"a message carries unknown tensors: {', '.join(sorted(tensors.keys() - _TENSORS))!a}")
        for name, dtype in (("position_ids", torch.int64), ("mask", torch.uint8)):
            if name in tensors and (tuple(tensors[name].shape) != (batch, count) or tensors[name].dtype != dtype):
                raise ProtocolError(f"{name} must be [{batch}, {count}] {dtype_name(dtype)}")
        ids = tensors.get("position_ids")
        if ids is not None and not 0 <= int(ids.min()) <= int(ids.max()) < MAX_POSITIONS:
            raise ProtocolError(f"position_ids must be at least 0 and less than {MAX_POSITIONS}")
        return Work(
            message.position, reorder, hidden_states, tensors.get("position_ids"), tensors.get("mask"), message
        )  # fmt: skip

    def _accept(self, work: Work) -> list[Action]:
        if len(self._waiting) >= _MAX_WAITING:
            raise ProtocolError(f"more than {_MAX_WAITING} steps are waiting in this session")
        batch, count = work.hidden_states.shape[0], work.count
        if self._waiting_positions + batch * count > _MAX_WAITING_POSITIONS:
            raise ProtocolError(f"more than {_MAX_WAITING_POSITIONS} positions are waiting in this session")
        self._fresh = False
        self.batch, self.position = batch, work.position + count
        self._waiting.append(work)
        self._waiting_positions += batch * count
        return self._next()

    def _next(self) -> list[Action]:
        if self._running is not None or not self._waiting:
            return []
        self._running = self._waiting.popleft()
        self._waiting_positions -= self._running.hidden_states.shape[0] * self._running.count
        return [Compute(self._running)]

    def _send_on(
        self, step: Step, count: int, spent: Spent = NOTHING_SPENT, output: torch.Tensor | None = None
    ) -> list[Action]:
        """Send a step's result on, which is in the history; a standby keeps it in mind."""
        if self.standby:
            self._withheld.append((step, count))
            return []
        return self._results(step, count, self._successors(), spent, output)

    def _results(
        self,
        step: Step,
        count: int,
        successors: Sequence[_Successor],
        spent: Spent = NOTHING_SPENT,
        output: torch.Tensor | None = None,
    ) -> list[Action]:
        """A step's result, which is in the history, to those of `successors` to whom a link is open.

        Args:
            spent, output: on computing it just now, and what came of it.
        """
        begin, end = step.position, step.position + count
        if end > len(self._history):
            return []  # it was rolled back meanwhile: nobody waits for it
        if self._request.is_last and step.wanted is not None:
            begin = max(begin, end - step.wanted)
            output = output[:, begin - step.position :] if output is not None else None
        actions: list[Action] = []
        for successor in successors:
            if not successor.open:
                continue
            successor.fresh = False
            hops = [*step.hops, self._time(successor, spent)]
            tensors = self._encoded(begin, end, output)
            if successor.through_client:
                answer = Output(sequence=step.sequence, hops=hops, tensors=[])
                actions.append(ToClient(answer, {name: tensors[name] for name in tensors if name in _HIDDEN_STATES}))
            else:
                on = step.model_copy(update={"hops": hops, "tensors": []})
                actions.append(ToSuccessor(successor.link, on, tensors))
        return actions

    def _time(self, successor: _Successor, spent: Spent) -> HopTime:
        request = self._request
        return HopTime(
            start=request.start,
            end=request.end,
            queue_s=spent.queue_s,
            compute_s=spent.compute_s,
            experts_s=spent.experts_s,
            together=spent.together,
            link_s=None if successor.through_client else successor.link_s or 0.0,
            codec=request.codec,
            degraded=self.degraded,
        )

    def _replay_on(self, sequence: int, begin: int, count: int, *, last: bool) -> list[Action]:
        """Part of a replay has been computed, or recalled: pass it on to whoever is fresh, too."""
        actions: list[Action] = []
        for successor in self._successors():
            if successor.open and successor.fresh:
                actions += self._parts(successor, sequence, begin, begin + count, last=last)
                successor.fresh = not last
        if last:
            self._replaying, self._done, self._settled = False, sequence, True
            actions.append(ToClient(Replayed(sequence=sequence)))
            repeated = list(self._repeated)
            self._repeated.clear()
            for step, positions in repeated:
                if step.sequence <= sequence:
                    actions += self._send_on(step, positions)
        return actions

    def _replay_to(self, successor: _Successor) -> Iterator[Action]:
        """Everything so far; if this server is being told itself, the rest follows as it comes."""
        successor.fresh = self._replaying or self._fresh
        if len(self._history):
            sequence = self._replayed_sequence if self._replaying else self._done
            yield from self._parts(successor, sequence, 0, len(self._history), last=not self._replaying)

    def _parts(self, successor: _Successor, sequence: int, begin: int, end: int, *, last: bool) -> Iterator[Action]:
        known = min(successor.known, self._recalled, end) // PAGE * PAGE if begin == 0 else 0
        if known:
            recall = Recall(sequence=sequence, positions=known, last=last and known == end)
            yield ToSuccessor(successor.link, recall, {})
        each = max(1, MAX_STEP_POSITIONS // self._history.batch)
        for first in range(begin + known, end, each):
            until = min(first + each, end)
            part = Replay(
                sequence=sequence,
                position=first,
                last=last and until == end,
                link=successor.link if successor.through_client else 0,
                tensors=[],
            )
            tensors = self._encoded(first, until)
            if successor.through_client:
                yield ToClient(part, tensors)
            else:
                yield ToSuccessor(successor.link, part, tensors)

    def _encoded(self, begin: int, end: int, at_hand: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        tensors = self._history.between(begin, end, at_hand)
        return {**tensors, **encode_hidden_states(tensors["hidden_states"], self._request.codec)}

    def _successors(self) -> list[_Successor]:
        return [one for one in (self._successor, self._standby_successor) if one is not None]

    def _find(self, link: int) -> _Successor | None:
        return next((one for one in self._successors() if one.link == link and not one.through_client), None)
