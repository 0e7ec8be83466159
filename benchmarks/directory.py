"""The directory of a large swarm: what looking servers up and announcing oneself cost, and how soon the dead are gone.

32 real nodes, each with its libp2p daemon, in four processes on loopback, keep the signed records of 1,000 servers of a
model of 80 blocks (16 blocks and all figures each); every record is checked by the nodes that store it, and by the
client that reads it. The servers themselves are only keys: their records come many in a message, as no machine runs
1,000 servers. *Look-ups* are what a new client does before it knows all servers, joining not counted; of several new
clients the median counts. *Announcing* is one real server's renewal, while the 1,000 records are there. *Gone after*:
processes that renew their records as servers do are killed, and a client looks again and again; the slowest counts.
Bytes are what a p2pd receives and sends, both ends' overhead included.

What grows with what: a look-up's bytes and time with the servers of the model, as a client reads all their records
(measured at a quarter, too, hence the figures per 1,000); an announcement does not, but each of the five nodes that
keep the model's records receives one from every server every four seconds: `keeper_cpu_share` is which part of a core
that takes one, measured with records that come one by one. With more nodes a search takes more steps
(their logarithm); 32 are few. Latencies of the internet are not in it: a search waits for some round trips in turn.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import psutil

from benchmarks.directory_nodes import LOOPBACK, MODEL, Crowd, NodeProcess, announcement, node_processes
from benchmarks.report import Report
from swarm.dht import RENEWAL_S, Directory
from swarm.transport.node import Node

_PROCESSES = 4
_REFRESH_S = 5.0
"""The crowd's records are stored anew before what is measured takes so long that they run out."""
_ONE_BY_ONE = 40
"""Of the crowd's records so many are also stored in messages of their own."""
_POLL_S = 0.25


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--servers", type=int, default=1000, help="announced servers of one model (1000)")
    parser.add_argument("--nodes", type=int, default=32, help="nodes of the directory (32)")
    report, options = Report.with_options(parser)
    report.finish(asyncio.run(measure(report, options.servers, options.nodes)))


async def measure(report: Report, servers: int, nodes: int, processes: int = _PROCESSES) -> dict[str, Any]:
    """The figures for so many announced servers and nodes."""
    clients, renewals = (3, 10) if report.quick else (7, 30)
    async with member([]) as (first, _):
        report.progress(f"starting {nodes} nodes in {processes} processes")
        peers = await first.addresses()
        async with node_processes(processes, nodes // processes, peers) as children:
            few = await _lookups(report, peers, max(1, servers // 4), 3)
            many = await _lookups(report, peers, servers, clients)
            announced = await _announcements(report, peers, servers, renewals, children)
        gone_s = await _gone_after_kill_s(report, peers, 3)
    growth_s = (many["first_s"] - few["first_s"]) / (servers - max(1, servers // 4)) * 1000
    per_server = many["view_bytes"] / servers
    return {
        "client_lookups_s": many["first_s"],
        "announce_s": announced["announce_s"],
        "announce_bytes": announced["announce_bytes"],
        "view_bytes": many["view_bytes"],
        "gone_after_kill_s": gone_s,
        "servers": servers,
        "nodes": nodes,
        "later_lookup_s": many["later_s"],
        "join_s": many["join_s"],
        "lookup_s_per_1000_servers": growth_s,
        "lookup_bytes_per_server": per_server,
        "announce_cpu_ms_of_all_nodes": announced["cpu_s"] * 1e3,
        "keeper_cpu_share": announced["keeper_cpu_s"] * servers / RENEWAL_S,
    }


@asynccontextmanager
async def member(peers: Sequence[str], *, client_only: bool = False) -> AsyncIterator[tuple[Node, Directory]]:
    """A node of this process that joins through `peers` and leaves at the end."""
    async with AsyncExitStack() as stack:
        node = await Node.start(listen=() if client_only else LOOPBACK, client_only=client_only)
        stack.push_async_callback(node.stop)
        directory = await Directory.join(node, peers, client_only=client_only)
        stack.push_async_callback(directory.leave)
        yield node, directory


async def _lookups(report: Report, peers: Sequence[str], servers: int, clients: int) -> dict[str, float]:
    crowd, joins, firsts, laters, sizes = Crowd(servers), list[float](), list[float](), list[float](), list[int]()
    async with member(peers) as (_, directory):
        for _ in range(clients):
            stored_s = await crowd.announce(directory)
            begun = time.perf_counter()
            async with member(peers, client_only=True) as (node, client):
                joins.append(time.perf_counter() - begun)
                received = received_bytes(node)
                firsts.append(await _timed_lookup(client, servers))
                sizes.append(received_bytes(node) - received)
                await crowd.announce(directory)
                laters.append(await _timed_lookup(client, servers))
            report.progress(
                f"{servers} servers: a first look-up {firsts[-1]:.3f} s, a later one with all records new "
                f"{laters[-1]:.3f} s, {sizes[-1]:,} bytes (joining {joins[-1]:.2f} s; storing all {stored_s:.1f} s)"
            )
    return {
        "join_s": statistics.median(joins),
        "first_s": statistics.median(firsts),
        "later_s": statistics.median(laters),
        "view_bytes": statistics.median(sizes),
    }


async def _timed_lookup(client: Directory, servers: int) -> float:
    begun = time.perf_counter()
    found = await client.servers(MODEL)
    elapsed_s = time.perf_counter() - begun
    if len(found) < servers:
        raise RuntimeError(f"a look-up found {len(found)} of {servers} servers")
    return elapsed_s


async def _announcements(
    report: Report, peers: Sequence[str], servers: int, renewals: int, children: Sequence[NodeProcess]
) -> dict[str, float]:
    crowd, times = Crowd(servers), list[float]()
    moved = cpu_s = 0.0
    async with member(peers) as (_, other), member(peers) as (node, directory):
        await directory.announce(announcement(node.peer_id))
        fresh_until = 0.0
        for _ in range(renewals):
            if time.monotonic() > fresh_until:
                await crowd.announce(other)
                fresh_until = time.monotonic() + _REFRESH_S
            before, busy_s = moved_bytes(node), _cpu_s(children)
            begun = time.perf_counter()
            if not await directory.announce(announcement(node.peer_id)):
                raise RuntimeError("nobody stored an announcement")
            times.append(time.perf_counter() - begun)
            moved += moved_bytes(node) - before
            cpu_s += _cpu_s(children) - busy_s
        busy_s = _cpu_s(children)
        await crowd.announce(other, at_once=1, members=_ONE_BY_ONE)
        keeper_cpu_s = (_cpu_s(children) - busy_s) / _ONE_BY_ONE / other.dht.num_replicas
    report.progress(f"{servers} servers: announcing takes {statistics.median(times):.3f} s, {moved / renewals:,.0f} B")
    return {
        "announce_s": statistics.median(times),
        "announce_bytes": moved / renewals,
        "cpu_s": cpu_s / renewals,
        "keeper_cpu_s": keeper_cpu_s,
    }


async def _gone_after_kill_s(report: Report, peers: Sequence[str], servers: int) -> float:
    """The longest time until one of some killed servers was gone from a client's view, in seconds."""
    async with (
        member(peers, client_only=True) as (_, client),
        node_processes(servers, 1, peers, announcing=True) as children,
    ):
        theirs = {child.peer_ids[0] for child in children}

        async def seen() -> set[str]:
            return theirs & {one.peer_id for one in await client.servers(MODEL)}

        while await seen() < theirs:  # noqa: ASYNC110 - nobody tells when a look-up will find more
            await asyncio.sleep(_POLL_S)
        killed = time.monotonic()
        for child in children:
            child.kill()
        while await seen():  # noqa: ASYNC110
            await asyncio.sleep(_POLL_S)
        gone_s = time.monotonic() - killed
    report.progress(f"{servers} killed servers were gone after {gone_s:.1f} s")
    return gone_s


def received_bytes(node: Node) -> int:
    """What a daemon has read: nearly all of it from the network."""
    return int(psutil.Process(node.daemon_pid).io_counters().read_chars)


def moved_bytes(node: Node) -> float:
    """What a daemon received from the network and sent there: it reads and writes all of that twice, once for us."""
    counters = psutil.Process(node.daemon_pid).io_counters()
    return (counters.read_chars + counters.write_chars) / 2


def _cpu_s(children: Sequence[NodeProcess]) -> float:
    """Processor time of the nodes so far, their daemons' included."""
    total = 0.0
    for child in children:
        process = psutil.Process(child.process.pid)
        for one in (process, *process.children(recursive=True)):
            times = one.cpu_times()
            total += times.user + times.system
    return total


if __name__ == "__main__":
    main()
