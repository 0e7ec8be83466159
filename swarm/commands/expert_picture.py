"""What a swarm's experts look like: who hosts which, how many hosts each has, and whether any is missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table

from swarm.dht import Announcement, ExpertAnnouncement, State
from swarm.dht.display_name import name_of
from swarm.dht.expert_announcement import experts_in


def servers_of_experts(hosts: Sequence[ExpertAnnouncement], counts: Mapping[int, int]) -> dict[int, list[int]]:
    """By block, how many servers of experts are online for each.

    Args:
        counts: experts of every block that has any.
    """
    online = [host.experts for host in hosts if host.state is State.ONLINE]
    return {
        block: [sum(expert in experts.get(block, ()) for experts in online) for expert in range(count)]
        for block, count in counts.items()
    }


def expert_table(title: str, hosts: Sequence[ExpertAnnouncement], counts: Mapping[int, int]) -> Table:
    """Who hosts what, one row each."""
    table = Table(title=title, title_justify="left")
    for name in ("server of experts", "blocks", "experts", "state", "tokens/s each", "calls now", "precision"):
        table.add_column(name, justify="right" if name in ("experts", "tokens/s each", "calls now") else "left")
    for host in hosts:
        blocks, experts = sorted(host.experts), sum(map(len, host.experts.values()))
        table.add_row(
            name_of(host),
            f"{blocks[0]}–{blocks[-1]}" if blocks[-1] > blocks[0] else str(blocks[0]),
            f"{experts:,} of {sum(counts.values()):,}",
            f"{host.state.value}, taking over others" if host.coming else host.state.value,
            f"{host.rows_per_s:,.0f}" if host.rows_per_s is not None else "",
            str(host.calls_under_way),
            host.dtype,
        )
    return table


def missing_experts(
    servers: Sequence[Announcement], hosts: Sequence[ExpertAnnouncement], counts: Mapping[int, int]
) -> dict[int, frozenset[int]]:
    """By block, the experts that some server of blocks needs, and nobody hosts."""
    hosted = servers_of_experts(hosts, counts)
    missing = {
        block: frozenset(expert for expert in experts if not hosted[block][expert])
        for block, experts in _lacking(servers, counts).items()
    }
    return {block: experts for block, experts in missing.items() if experts}


def expert_verdict(
    servers: Sequence[Announcement], hosts: Sequence[ExpertAnnouncement], counts: Mapping[int, int]
) -> str:
    """One sentence: whether all experts that are needed are there, and how many servers of experts can be lost."""
    if missing := missing_experts(servers, hosts, counts):
        total, (block, experts) = sum(map(len, missing.values())), min(missing.items())
        return (
            f"INCOMPLETE: no server is online for {total} expert{'s' if total > 1 else ''} that servers of blocks "
            f"need; of block {block}: {', '.join(map(str, sorted(experts)))}"
        )
    hosted, lacking = servers_of_experts(hosts, counts), _lacking(servers, counts)
    if not lacking:
        return "All servers of blocks have their experts themselves."
    least = min(hosted[block][expert] for block, experts in lacking.items() for expert in experts)
    survives = f"it survives the loss of any {least - 1}" if least > 1 else "the loss of one of them may break it"
    return f"Complete, too: every expert that servers of blocks lack has {least} or more servers; {survives}."


def _lacking(servers: Sequence[Announcement], counts: Mapping[int, int]) -> dict[int, frozenset[int]]:
    """By block, the experts that some server of blocks does not have itself."""
    lacking: dict[int, frozenset[int]] = {}
    for server in servers:
        for block, kept in server.kept_experts.items() if server.state is State.ONLINE else ():
            if others := frozenset(range(counts.get(block, 0))) - experts_in(bytes.fromhex(kept)):
                lacking[block] = lacking.get(block, frozenset()) | others
    return lacking
