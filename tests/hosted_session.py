"""A served session whose work is done on demand, for tests of its machine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from swarm.protocol.messages import HopTime, Link, Message, Open, Output, Recall, Replay, Step
from swarm.protocol.served_actions import Action, Compute, Spent, ToClient, ToSuccessor, Work
from swarm.protocol.served_session import ServedSession

HIDDEN = 4
TOKEN, OTHER = "0" * 32, "1" * 32
OPEN = Open(session=TOKEN, model="ab" * 32, start=2, end=4, batch=2, max_length=100)
TO_PEER = Link(link=1, peer_id="12D3KooWsuccessor", session=OTHER)
BEFORE = HopTime(start=0, end=2, queue_s=0.0, compute_s=1.0)


def states(batch: int, count: int) -> torch.Tensor:
    return torch.rand(batch, count, HIDDEN)


def run(work: Work) -> torch.Tensor:
    """What our servers compute, or recall."""
    if work.recalled:
        return torch.arange(work.recalled * HIDDEN).reshape(1, work.recalled, HIDDEN).float()
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

    def recall(self, sequence: int, positions: int, *, last: bool = True) -> list[Action]:
        """A predecessor says what the session begins with, which is known here."""
        return self.forward(Recall(sequence=sequence, positions=positions, last=last)) + self.compute_all()

    def link(
        self,
        number: int = 1,
        *,
        fresh: bool = False,
        standby: bool = False,
        known: int = 0,
        accepted: int | None = None,
    ) -> list[Action]:
        """A link to a peer is asked for and stands."""
        self.tell(TO_PEER.model_copy(update={"link": number, "standby": standby}))
        return self.do(self.session.link_opened(number, fresh, known, accepted))


def outputs(actions: list[Action]) -> list[ToClient]:
    return [one for one in actions if isinstance(one, ToClient) and isinstance(one.message, Output)]


def onward(actions: list[Action]) -> list[ToSuccessor]:
    return [one for one in actions if isinstance(one, ToSuccessor)]


def to_client(actions: list[Action]) -> list[Message]:
    return [one.message for one in actions if isinstance(one, ToClient)]
