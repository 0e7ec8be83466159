"""What a model is, by what its servers say: strangers may contradict each other, and most of them are believed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

from swarm.dht import Announcement, ModelListing

_Fact = TypeVar("_Fact", bound=Hashable)


@dataclass(frozen=True)
class ModelFacts:
    """One model."""

    digest: str
    name: str
    num_blocks: int
    experts: Mapping[int, int] = field(default_factory=dict)
    """Routed experts by block, as far as servers have said: of blocks whose experts are not all with them."""
    last_hosted: float | None = None
    """Unix time at which somebody was there who hosts it, last."""


def agreed_facts(
    known: Mapping[str, ModelFacts],
    asked_for: Mapping[str, ModelFacts],
    spans: Iterable[Announcement],
    listings: Iterable[ModelListing],
) -> dict[str, ModelFacts]:
    """The facts of every model that anybody speaks of, by digest. Those asked for are known better than by hearsay."""
    blocks: dict[str, Counter[int]] = {}
    names: dict[str, Counter[str]] = {}
    experts: dict[str, Counter[tuple[tuple[int, int, int], ...]]] = {}
    everybody: list[Announcement | ModelListing] = [*spans, *listings]
    for one in everybody:
        blocks.setdefault(one.model, Counter())[one.num_blocks] += 1
        if name := shown_model_name(one.model_name):
            names.setdefault(one.model, Counter())[name] += 1
        if isinstance(one, ModelListing) and one.experts:
            experts.setdefault(one.model, Counter())[one.experts] += 1
    facts = {**known, **{digest: asked_for[digest] for digest in asked_for.keys() - known.keys()}}
    for digest, votes in blocks.items():
        one_known = facts.get(digest)
        if digest in asked_for:
            continue
        name = _most(names.get(digest, Counter())) or (one_known.name if one_known else digest[:12])
        runs = _most(experts.get(digest, Counter()))
        counts = {block: count for start, end, count in runs or () for block in range(start, end)}
        found = ModelFacts(digest, name, _most(votes) or 1, counts or (one_known.experts if one_known else {}))
        facts[digest] = replace(found, last_hosted=one_known.last_hosted if one_known else None)
    return facts


def shown_model_name(name: str) -> str:
    """What a stranger calls a model, fit to be shown: of a path on the stranger's machine only its end."""
    parts = "".join(letter if letter.isprintable() else " " for letter in name).split("/")
    is_hub_id = len(parts) == 2 and all(parts) and parts[0].strip(".~")
    return "/".join(parts) if is_hub_id else next((part for part in reversed(parts) if part), "")


def _most(votes: Counter[_Fact]) -> _Fact | None:
    """What most say; of equals what comes first in order, so that it does not change from look to look."""
    return min(votes, key=lambda fact: (-votes[fact], str(fact))) if votes else None
