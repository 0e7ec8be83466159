"""Which experts the owner of a server wants it to host: ``3:0-15,4:0-15``, ``*:0-3``, ``all``, ``none``, ``auto``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from swarm.models.experts import ExpertTensors
from swarm.number_runs import runs, runs_text

_PART = re.compile(r"(?P<block>\d+|\*):(?P<first>\d+)(?:-(?P<last>\d+))?", re.ASCII)


@dataclass(frozen=True)
class WantedExperts:
    """What was asked for."""

    parts: tuple[tuple[int | None, int, int], ...]
    """(block, or None for every block; first expert; last expert)"""
    everything: bool = False
    as_many_as_fit: bool = False
    """Which, is seen when it joins."""

    @classmethod
    def parse(cls, text: str) -> WantedExperts:
        """Raises ValueError, with a sentence, for what is not a choice."""
        if text in ("all", "none", "auto"):
            return cls((), everything=text == "all", as_many_as_fit=text == "auto")
        parts: list[tuple[int | None, int, int]] = []
        for part in text.split(","):
            found = _PART.fullmatch(part.strip())
            first = int(found["first"]) if found else 0
            last = int(found["last"] or first) if found else -1
            if found is None or last < first:
                raise ValueError(
                    f"{text!r} names no experts; write BLOCK:FIRST-LAST, as in 3:0-15,4:0-15 (*:0-3 for every block), "
                    "or all, none, or auto"
                )
            parts.append((None if found["block"] == "*" else int(found["block"]), first, last))
        return cls(tuple(parts))

    def hosted(self, tables: Mapping[int, ExpertTensors], model: str) -> dict[int, frozenset[int]]:
        """By block; blocks without any are left out. For `as_many_as_fit`, none is certain.

        Raises:
            ValueError: the model does not have them.
        """
        if not tables:
            raise ValueError(f"{model} has no routed experts: its blocks are hosted whole, with --blocks")
        if self.everything:
            return {block: frozenset(range(table.count)) for block, table in tables.items()}
        hosted: dict[int, frozenset[int]] = {}
        for block, first, last in self.parts:
            if block is not None and block not in tables:
                these = runs_text(runs(sorted(tables)))
                raise ValueError(f"block {block} of {model} has no routed experts; these have: {these}")
            for one in tables if block is None else (block,):
                if last >= tables[one].count:
                    raise ValueError(f"block {one} of {model} has experts 0 to {tables[one].count - 1}, not {last}")
                hosted[one] = hosted.get(one, frozenset()) | frozenset(range(first, last + 1))
        return hosted


def describe(hosted: Mapping[int, frozenset[int]]) -> str:
    """For people: ``blocks 0–11: experts 0–3``, and so on."""
    lines: list[str] = []
    alike: dict[frozenset[int], list[int]] = {}
    for block, experts in sorted(hosted.items()):
        alike.setdefault(experts, []).append(block)
    for experts, blocks in alike.items():
        what = f"{'block' if len(blocks) == 1 else 'blocks'} {runs_text(runs(blocks))}"
        lines.append(f"{what}: {'expert' if len(experts) == 1 else 'experts'} {runs_text(runs(sorted(experts)))}")
    return "; ".join(lines)
