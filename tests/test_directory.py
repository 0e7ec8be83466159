"""The directory with many servers in it, kept by real nodes in other processes; `benchmarks.directory` made small."""

from __future__ import annotations

import time
from contextlib import AsyncExitStack

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


async def test_who_keeps_a_record_is_looked_up_once_for_some_renewals_and_again_when_some_have_gone() -> None:
    async with AsyncExitStack() as stack:
        peers = await (await stack.enter_async_context(member([])))[0].addresses()
        node, directory = await stack.enter_async_context(member(peers))
        mortals = AsyncExitStack()
        for those in (stack, mortals):
            for _ in range(3):
                await those.enter_async_context(member(peers))
        client = (await stack.enter_async_context(member(peers, client_only=True)))[1]

        async def announced() -> float:
            """Announce, and see that others know; returns how many bytes were moved for it."""
            before, said = moved_bytes(node), announcement(node.peer_id)
            assert await directory.announce(said)
            moved = moved_bytes(node) - before
            (seen,) = await client.servers(MODEL)
            assert seen.issued_at == said.issued_at
            return moved

        with_lookup, without = await announced(), await announced()
        assert without < with_lookup / 1.5
        await mortals.aclose()
        assert max([await announced() for _ in range(3)]) > 1.5 * without
