"""What routing decides on: the servers as announced, and the links as measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

_SLOWEST_BLOCK_S = 1e6
"""Slow, not impossible: what is finite can be added up and compared."""
_UNKNOWN_BLOCK_S = 1.0
_PREFILL_PER_STEP = 8.0
"""Positions of a prompt that are reckoned to take as long as a decode step, where prefill was not measured."""


@dataclass(frozen=True)
class HostedSpan:
    """What routing needs to know of one server."""

    peer_id: str
    start: int
    end: int
    steps_per_s: float
    """Decode steps per second through its whole span; 0 if unknown."""
    decode_steps_per_s: Mapping[int, float] = field(default_factory=dict)
    """The same by how many sequences are at work, all of theirs counted."""
    prefill_tokens_per_s: float | None = None
    """Positions of one prompt per second, through its whole span."""
    sessions: int = 0
    """Of others. All are reckoned to be at work, as nobody says which are."""
    rtts_s: Mapping[str, float] = field(default_factory=dict)
    """Seconds of a round trip to other servers, by peer id, as it measured them."""
    upload_bytes_per_s: float | None = None
    download_bytes_per_s: float | None = None
    delay_s: float = 0.0
    """What choosing it is expected to cost beyond that, once a session: failures, waiting for room."""

    @property
    def block_s(self) -> float:
        """Seconds per step and block with nobody else at work."""
        return self.block_step_s(1)

    @property
    def capacity(self) -> float:
        """The most decode steps per second through its whole span, of all its sessions together."""
        return max(self.steps_per_s if self.steps_per_s > 0 else 0.0, *self.decode_steps_per_s.values(), 0.0)

    def block_step_s(self, rows: float) -> float:
        """Seconds per block until each of `rows` sequences at work has gone a step.

        Between sizes of batch that were measured the time is interpolated, beyond them it grows with the batch.
        """
        measured = {size: rate for size, rate in self.decode_steps_per_s.items() if rate > 0}
        if self.steps_per_s > 0:
            measured.setdefault(1, self.steps_per_s)
        if not measured:
            return min(_UNKNOWN_BLOCK_S * rows, _SLOWEST_BLOCK_S)
        sizes = sorted(measured)
        after = next((size for size in sizes if size >= rows), None)
        before = max((size for size in sizes if size <= rows), default=None)
        if before is None:
            step_s = sizes[0] / measured[sizes[0]]
        elif after is None or after == before:
            step_s = rows / measured[before]
        else:
            share = (rows - before) / (after - before)
            step_s = (1 - share) * before / measured[before] + share * after / measured[after]
        return min(step_s / (self.end - self.start), _SLOWEST_BLOCK_S)

    def block_prefill_s(self, positions: float) -> float:
        """Seconds per block for so many positions of a prompt, sharing the device with the sessions there are."""
        rate, others = self.prefill_tokens_per_s, 1 + self.sessions
        if rate is not None and rate > 0:
            return min(positions * others / rate / (self.end - self.start), _SLOWEST_BLOCK_S)
        return min(positions * others * self.block_s / _PREFILL_PER_STEP, _SLOWEST_BLOCK_S)


@dataclass(frozen=True)
class Leg:
    """Blocks ``[start, end)``, to be run by one server."""

    peer_id: str
    start: int
    end: int


@dataclass(frozen=True)
class ClientLinks:
    """The client's own network, as far as it knows it."""

    rtts_s: Mapping[str, float] = field(default_factory=dict)
    """Seconds of a round trip to servers, by peer id."""
    upload_bytes_per_s: float | None = None
    download_bytes_per_s: float | None = None
    doubts_s: Mapping[str, float] = field(default_factory=dict)
    """By how much each of these round trips may be off, in seconds: what measurements on a busy machine cannot tell."""


def with_estimates(links: ClientLinks, spans: Iterable[HostedSpan]) -> ClientLinks:
    """`links` with a guess for each server that was not measured, if a measured one knows its way to it.

    By the triangle, a server that is `x` from one that is `y` from here is between ``|x - y|`` and ``x + y`` away; the
    larger of both lies between, and the nearest of those that were measured says most. A guess is as doubtful as what
    it rests on.
    """
    servers = list(spans)
    guesses: dict[str, tuple[float, float]] = {}
    for span in servers:
        near = links.rtts_s.get(span.peer_id)
        if near is None:
            continue
        for other, rtt_s in span.rtts_s.items():
            if other not in links.rtts_s:
                guess = (max(near, rtt_s), links.doubts_s.get(span.peer_id, 0.0))
                guesses[other] = min(guesses.get(other, guess), guess)
    for span in servers:
        if span.peer_id not in links.rtts_s:
            for other, rtt_s in span.rtts_s.items():
                if other in links.rtts_s:
                    guess = (max(links.rtts_s[other], rtt_s), links.doubts_s.get(other, 0.0))
                    guesses[span.peer_id] = min(guesses.get(span.peer_id, guess), guess)
    return replace(
        links,
        rtts_s={**{peer_id: rtt_s for peer_id, (rtt_s, _) in guesses.items()}, **links.rtts_s},
        doubts_s={**{peer_id: doubt_s for peer_id, (_, doubt_s) in guesses.items()}, **links.doubts_s},
    )
