"""What a swarm looks like: tables of its servers, a strip of its blocks, and what has changed since the last look."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from swarm.commands.speeds import megabits, milliseconds
from swarm.dht import Announcement, State
from swarm.dht.display_name import name_of
from swarm.number_runs import runs, runs_text

_BATCHES = (4, 16)
"""The numbers of sessions for which speeds are shown, besides one."""
_STRIP_BLOCKS = 60
"""So many blocks in a line."""
_COLOURS = {0: "bold red", 1: "yellow"}
_RIGHT = ("steps/s", "free KV", "sessions", "seen")


def servers_of_blocks(servers: Sequence[Announcement], num_blocks: int) -> list[int]:
    """How many servers are online for every block."""
    online = [server for server in servers if server.state is State.ONLINE]
    return [sum(server.hosts(block) for server in online) for block in range(num_blocks)]


def server_table(title: str, servers: Sequence[Announcement], num_blocks: int) -> Table:
    """Who hosts what, one row each."""
    table = Table(title=title, title_justify="left")
    for name in ("server", "blocks", "", "state", "steps/s", "free KV", "sessions", "precision", "seen"):
        table.add_column(name, justify="right" if name in _RIGHT else "left")
    for server in servers:
        table.add_row(
            name_of(server),
            _hosted(server),
            _bar(server.start, server.end, num_blocks),
            server.state.value,
            f"{server.throughput:.1f}",
            f"{server.free_kv_tokens:,}",
            str(server.sessions),
            server.precision,
            f"{max(0.0, time.time() - server.issued_at):.0f} s ago",
        )
    return table


def speed_table(servers: Sequence[Announcement]) -> Table:
    """How fast each server is by its own measurement, one row each; nothing where it does not say."""
    table = Table(title="As each server measured itself: steps/s by sessions at once, network", title_justify="left")
    table.add_column("server")
    for name in ("1 session", *(f"{batch} sessions" for batch in _BATCHES), "prompt tokens/s"):
        table.add_column(name, justify="right")
    for name in ("nearest", "sends", "receives"):
        table.add_column(name, justify="right")
    for server in servers:
        decode = server.decode_steps_per_s
        table.add_row(
            name_of(server),
            f"{server.throughput:.1f}",
            *(f"{decode[batch]:.1f}" if batch in decode else "" for batch in _BATCHES),
            f"{server.prefill_tokens_per_s:.0f}" if server.prefill_tokens_per_s is not None else "",
            milliseconds(min(server.rtts_s.values())) if server.rtts_s else "",
            megabits(server.upload_bytes_per_s) if server.upload_bytes_per_s is not None else "",
            megabits(server.download_bytes_per_s) if server.download_bytes_per_s is not None else "",
        )
    return table


def coverage_strip(servers_of_block: Sequence[int]) -> Text:
    """How many servers every block has, a digit each (``+``: ten or more)."""
    strip = Text()
    for first in range(0, len(servers_of_block), _STRIP_BLOCKS):
        line = servers_of_block[first : first + _STRIP_BLOCKS]
        strip.append(f"{first:>6}  ")
        for count in line:
            strip.append("+" if count > 9 else str(count), style=_COLOURS.get(count, "green"))
        strip.append("\n")
    strip.rstrip()
    return strip


def verdict(servers_of_block: Sequence[int]) -> str:
    """One sentence: whether the model can be used, and how many servers it can lose."""
    missing = [block for block, count in enumerate(servers_of_block) if count == 0]
    if missing:
        which = runs_text(runs(missing))
        return f"INCOMPLETE: no server is online for {len(missing)} of {len(servers_of_block)} blocks: {which}"
    least = min(servers_of_block)
    survives = "the loss of any one server breaks it" if least == 1 else f"it survives the loss of any {least - 1}"
    return f"Complete: every block has {least} or more servers; {survives}."


def changes(before: Sequence[Announcement], after: Sequence[Announcement]) -> list[str]:
    """What has happened between two looks, a sentence each: who came, moved, changed state, or is gone."""
    known, now = {one.peer_id: one for one in before}, {one.peer_id: one for one in after}
    lines = []
    for peer_id, server in now.items():
        blocks, old = f"blocks {server.start}–{server.end - 1}", known.get(peer_id)
        if old is None:
            lines.append(f"{name_of(server)} has come: {blocks}, {server.state.value}")
        elif old.in_memory == server.in_memory and (old.start, old.end) != (server.start, server.end):
            lines.append(f"{name_of(server)} hosts blocks {_hosted(server)}")
        elif (old.start, old.end) != (server.start, server.end):
            lines.append(f"{name_of(server)} moves from blocks {old.start}–{old.end - 1} to {blocks}")
        elif old.state is not server.state:
            lines.append(f"{name_of(server)} is {server.state.value}: {blocks}")
    gone = [one for peer_id, one in known.items() if peer_id not in now]
    return lines + [f"{name_of(one)} is gone: blocks {one.start}–{one.end - 1}" for one in gone]


def moves_between(before: Sequence[Announcement], after: Sequence[Announcement]) -> int:
    """How many servers have loaded other blocks than at the last look, or are loading them."""
    spans = {one.peer_id: one.in_memory for one in before}
    return sum(spans.get(one.peer_id, one.in_memory) != one.in_memory for one in after)


def _hosted(server: Announcement) -> str:
    """``0–9``, or ``0–9 of 0–19`` if more is in memory."""
    text = f"{server.start}–{server.end - 1}"
    return f"{text} of {server.loaded[0]}–{server.loaded[1] - 1}" if server.loaded else text


def _bar(start: int, end: int, num_blocks: int, width: int = 24) -> str:
    """A picture of a span within the model."""
    return "".join(
        "█" if start < (cell + 1) * num_blocks / width and end > cell * num_blocks / width else "·"
        for cell in range(width)
    )
