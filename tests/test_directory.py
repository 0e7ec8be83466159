"""The directory with many servers in it, kept by real nodes in other processes; `benchmarks.directory` made small."""

from __future__ import annotations

import time

import pytest

from benchmarks.directory import member, moved_bytes
from benchmarks.directory_nodes import MODEL, Crowd, announcement, node_processes

SERVERS = 150
NODES = 6


@pytest.mark.quiet
async def test_a_new_client_finds_everybody_and_announcing_does_not_carry_their_records() -> None:
    crowd = Crowd(SERVERS)
    async with member([]) as (first, _):
        peers = await first.addresses()
        async with (
            node_processes(2, NODES // 2, peers),
            member(peers) as (node, directory),
            member(peers, client_only=True) as (_, client),
        ):
            await crowd.announce(directory)
            before = moved_bytes(node)
            assert await directory.announce(announcement(node.peer_id))
            announced_bytes = moved_bytes(node) - before
            begun = time.monotonic()
            found = await client.servers(MODEL)
            looked_up_s = time.monotonic() - begun
    assert len({one.peer_id for one in found}) == SERVERS + 1
    assert node.peer_id in {one.peer_id for one in found}
    records_bytes = sum(len(one.pack()) for one in found)
    assert announced_bytes < records_bytes / 3, "a node sent records along that nobody had asked for"
    assert looked_up_s < 3
