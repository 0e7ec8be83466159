"""Judge a model: healthy, degraded or broken, and say why in a sentence. Pure.

- **broken**: some block has no server that takes part, or none that can get all of its experts. Who joins is no server
  yet, who died or left is none any more; one that drains or cannot be reached from here is still one.
- **degraded**: it is not broken, and
  - a server died less than 10 minutes ago, has not come back, and some block (or expert) that it hosted has fewer
    servers now than it had before; or
  - some block has only servers that drain or cannot be reached from here; or
  - some server lacks an expert that nobody hosts.
- **healthy**: else. A model with a single server for every block is healthy; that it survives no death is a figure of
  its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from swarm.dht import Announcement, ExpertAnnouncement
from swarm.health.coverage import Coverage, coverage_of, throughput_bound
from swarm.health.model_facts import ModelFacts
from swarm.health.swarm_state import DEATH_MEMORY_S, Condition, ServerRecord, fewest_copies
from swarm.number_runs import runs, runs_text

_SHOWN_RUNS = 4
_SHOWN_NAMES = 2


class Health(StrEnum):
    """Of a model; the greater :attr:`severity`, the worse."""

    HEALTHY = "healthy"
    DEGRADED = "degraded"
    BROKEN = "broken"

    @property
    def severity(self) -> int:
        return list(Health).index(self)


@dataclass(frozen=True)
class Verdict:
    """What is to be said of one model."""

    health: Health
    reason: str
    """A sentence."""
    coverage: Coverage
    """By servers that are online and answer."""
    bound_steps_per_s: float
    """:func:`throughput_bound` of these."""
    sessions: int
    """Under way, as the busiest block's servers count them: a session passes through one server of every block."""


def judge(facts: ModelFacts, records: Iterable[ServerRecord], now: float) -> Verdict:
    """Judge a model by its servers."""
    records = list(records)
    firm = _coverage(facts, records, {Condition.ONLINE})
    any_ = _coverage(facts, records, {Condition.ONLINE, Condition.DRAINING, Condition.UNREACHABLE})
    online = _spans(records, {Condition.ONLINE, Condition.DRAINING, Condition.UNREACHABLE})
    health, reason = _health(facts, records, firm, any_, now)
    return Verdict(
        health,
        reason,
        firm,
        throughput_bound(facts.num_blocks, _spans(records, {Condition.ONLINE})),
        _sessions(facts.num_blocks, online),
    )


def open_deaths(records: Iterable[ServerRecord], now: float) -> list[ServerRecord]:
    """Servers that died lately, whose place nobody has taken, the latest first."""
    records = list(records)
    dead = [one for one in records if one.condition is Condition.DEAD and now - one.since < DEATH_MEMORY_S]
    unreplaced = [one for one in dead if fewest_copies(one.announcement, records) < one.copies_before]
    return sorted(unreplaced, key=lambda one: -one.since)


def _health(
    facts: ModelFacts, records: Sequence[ServerRecord], firm: Coverage, any_: Coverage, now: float
) -> tuple[Health, str]:
    if any_.uncovered:
        return Health.BROKEN, _uncovered_sentence(facts, records, any_)
    if any_.stuck:
        return Health.BROKEN, f"Nobody hosts {_experts_sentence(any_)}, and no other server can stand in."
    if deaths := open_deaths(records, now):
        return Health.DEGRADED, _death_sentence(deaths, records)
    if firm.uncovered:
        which = _servers_of(firm.uncovered, records)
        draining = all(one.condition is Condition.DRAINING for one in which)
        what = "are leaving" if draining else "are leaving or cannot be reached from here"
        if all(one.condition is Condition.UNREACHABLE for one in which):
            what = "cannot be reached from here"
        return Health.DEGRADED, f"All servers of {name_blocks(firm.uncovered)} {what}."
    if any_.missing_experts:
        return Health.DEGRADED, f"Nobody hosts {_experts_sentence(any_)}; some servers cannot work without."
    if firm.stuck:
        return Health.DEGRADED, f"The hosts of experts of {name_blocks(firm.stuck)} are leaving or cannot be reached."
    copies = int(firm.copies.min())
    if firm.survives is not None and firm.survives + 1 < copies:
        return Health.HEALTHY, f"Every block has at least {_servers(copies)}, every expert {firm.survives + 1}."
    return Health.HEALTHY, f"Every block has at least {_servers(copies)}."


def _uncovered_sentence(facts: ModelFacts, records: Sequence[ServerRecord], any_: Coverage) -> str:
    blocks = any_.uncovered
    what = "any block" if len(blocks) == facts.num_blocks else name_blocks(blocks)
    sentence = f"No server is online for {what}"
    dead = [one for one in _servers_of(blocks, records) if one.condition is Condition.DEAD]
    if dead:
        sentence += f": {_names(dead)} died"
    joining = _spans(records, {Condition.JOINING})
    loading = [block for block in blocks if any(one.hosts(block) for one in joining)]
    if len(loading) == len(blocks):
        sentence += "; a server is loading them" if len(blocks) > 1 else "; a server is loading it"
    return f"{sentence}."


def _death_sentence(deaths: Sequence[ServerRecord], records: Sequence[ServerRecord]) -> str:
    worst = min(deaths, key=lambda one: fewest_copies(one.announcement, records))
    left = fewest_copies(worst.announcement, records)
    hosted = worst.announcement
    if isinstance(hosted, Announcement):
        what = name_blocks(range(hosted.start, hosted.end))
    else:
        what = f"some of its experts of {name_blocks(sorted(hosted.bitmaps))}"
    verb = "has" if what.startswith("block ") else "have"
    return f"{_names(deaths)} died; {what} {verb} {_servers(left)} left of {worst.copies_before}."


def name_blocks(blocks: Sequence[int]) -> str:
    """For people: ``blocks 0–3, 7 and 9 more``."""
    spans = runs(blocks)
    shown = runs_text(spans[:_SHOWN_RUNS])
    more = sum(last - first + 1 for first, last in spans[_SHOWN_RUNS:])
    return f"block{'s' if len(blocks) > 1 else ''} {shown}" + (f" and {more} more" if more else "")


def _experts_sentence(coverage: Coverage) -> str:
    block, experts = min(coverage.missing_experts.items())
    numbers = sorted(experts)
    shown = ", ".join(map(str, numbers[:_SHOWN_RUNS]))
    more = f" and {len(numbers) - _SHOWN_RUNS} more" if len(numbers) > _SHOWN_RUNS else ""
    elsewhere = len(coverage.missing_experts) - 1
    others = f" (and some of {elsewhere} other block{'s' if elsewhere > 1 else ''})" if elsewhere else ""
    return f"expert{'s' if len(numbers) > 1 else ''} {shown}{more} of block {block}{others}"


def _names(records: Sequence[ServerRecord]) -> str:
    names = [one.name for one in records[:_SHOWN_NAMES]]
    more = len(records) - len(names)
    return ", ".join(names[:-1] + [f"{names[-1]} and {more} more"]) if more else " and ".join(names)


def _servers(count: int) -> str:
    return "no server" if count == 0 else f"{count} server{'s' if count > 1 else ''}"


def _servers_of(blocks: Sequence[int], records: Iterable[ServerRecord]) -> list[ServerRecord]:
    """Servers, dead ones included, that host or hosted any of these blocks."""
    wanted = set(blocks)
    found = []
    for one in records:
        hosted = one.announcement
        if (
            isinstance(hosted, Announcement)
            and one.condition not in (Condition.LEFT, Condition.JOINING)
            and not wanted.isdisjoint(range(hosted.start, hosted.end))
        ):
            found.append(one)
    return found


def _coverage(facts: ModelFacts, records: Sequence[ServerRecord], conditions: set[Condition]) -> Coverage:
    hosts = [
        one.announcement
        for one in records
        if one.condition in conditions and isinstance(one.announcement, ExpertAnnouncement)
    ]
    return coverage_of(facts.num_blocks, facts.experts, _spans(records, conditions), hosts)


def _spans(records: Iterable[ServerRecord], conditions: set[Condition]) -> list[Announcement]:
    return [
        one.announcement
        for one in records
        if one.condition in conditions and isinstance(one.announcement, Announcement)
    ]


def _sessions(num_blocks: int, spans: Sequence[Announcement]) -> int:
    changes = np.zeros(num_blocks + 1, np.int64)
    np.add.at(changes, [one.start for one in spans], [one.sessions for one in spans])
    np.add.at(changes, [one.end for one in spans], [-one.sessions for one in spans])
    return int(np.cumsum(changes).max(initial=0))
