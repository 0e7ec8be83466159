"""Real nodes of a directory, some in each of a few processes, and a crowd of servers whose announcements they keep."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import msgpack
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from swarm.dht import LEASE_S, RENEWAL_S, Announcement, Directory, State
from swarm.dht.announcement import directory_key
from swarm.dht.validation import AnnouncementValidator
from swarm.transport.daemon import die_with_parent
from swarm.transport.identity import Identity
from swarm.transport.lean_hivemind import DHTID, DHTRecord
from swarm.transport.node import Node

MODEL, BLOCKS = "d1" * 32, 80
LOOPBACK = ("/ip4/127.0.0.1/tcp/0",)
_SPAN = 16
_TRIES = 4


class Crowd:
    """Servers that are only identities: each has a record of its own, signed by itself, as large as real ones.

    Nobody could run so many processes here. What they say is stored by the nodes that would store it, which check it
    as ever; only the messages are fewer, as one carries the records of many.
    """

    def __init__(self, servers: int) -> None:
        self._identities = [Identity(Ed25519PrivateKey.generate(), Path(os.devnull)) for _ in range(servers)]
        self._key = DHTID.generate(source=directory_key(MODEL))

    async def announce(self, directory: Directory, *, at_once: int = 50, members: int | None = None) -> float:
        """Store one fresh record of everybody for one lease; returns the seconds until the last node had them.

        Args:
            at_once: so many records in one message; 50 stay well under what one may hold.
            members: only of so many.
        """
        begun = time.perf_counter()
        expires_at = time.time() + LEASE_S
        subkeys = [one.peer_id for one in self._identities[:members]]
        values = [self._signed(number, expires_at) for number in range(len(subkeys))]
        dht = directory.dht
        # Beside the key, where nothing is stored: so that those who are asked for the way send no records back.
        found = await dht.find_nearest_nodes([DHTID(int(self._key) ^ 1)], k_nearest=dht.num_replicas, exclude_self=True)
        (keepers,) = found.values()

        async def store(peer_id: object, some: slice) -> None:
            count = len(subkeys[some])
            for _ in range(_TRIES):  # a busy node may not answer in time
                stored = await dht.protocol.call_store(
                    peer_id, [self._key] * count, values[some], [expires_at] * count, subkeys[some]
                )
                if stored is not None:
                    break
            else:
                raise RuntimeError(f"{peer_id} stored none of the crowd's records")

        for begin in range(0, len(subkeys), at_once):
            async with asyncio.TaskGroup() as tasks:
                for peer_id in keepers.values():
                    tasks.create_task(store(peer_id, slice(begin, begin + at_once)))
        return time.perf_counter() - begun

    def _signed(self, number: int, expires_at: float) -> bytes:
        identity = self._identities[number]
        start = number * _SPAN % BLOCKS
        neighbours = [self._identities[(number + step) % len(self._identities)].peer_id for step in range(1, 9)]
        value = msgpack.packb(announcement(identity.peer_id, start, dict.fromkeys(neighbours, 0.0123)).pack())
        record = DHTRecord(self._key.to_bytes(), msgpack.packb(identity.peer_id), value, expires_at)
        return AnnouncementValidator(identity).sign_value(record)


def announcement(peer_id: str, start: int = 0, rtts_s: dict[str, float] | None = None) -> Announcement:
    """What a server of 16 of the 80 blocks says, with all figures that it may have."""
    return Announcement(
        peer_id=peer_id,
        model=MODEL,
        model_name="meta-llama/Llama-3.1-70B-Instruct",
        state=State.ONLINE,
        num_blocks=BLOCKS,
        start=start,
        end=start + _SPAN,
        block_digests=tuple(f"{block:016x}" for block in range(_SPAN)),
        dtype="bfloat16",
        throughput=12.345678,
        decode_steps_per_s={1: 12.345678, 4: 34.567891, 16: 78.912345},
        prefill_tokens_per_s=567.891234,
        rtts_s=rtts_s or {},
        upload_bytes_per_s=1234567.8,
        download_bytes_per_s=12345678.9,
        free_kv_tokens=65_536,
        sessions=12,
        addresses=(f"/ip4/203.0.113.5/tcp/31337/p2p/{peer_id}", f"/ip4/203.0.113.5/udp/31337/quic-v1/p2p/{peer_id}"),
        version="0.1.0",
        public_name="a volunteer",
        issued_at=time.time(),
    )


@dataclass
class NodeProcess:
    """A child process with some nodes of the directory."""

    process: subprocess.Popen[bytes]
    peer_ids: list[str]

    def kill(self) -> None:
        """SIGKILL: no farewell."""
        self.process.kill()
        self.process.wait()


@asynccontextmanager
async def node_processes(
    processes: int, nodes_each: int, initial_peers: Sequence[str], *, announcing: bool = False
) -> AsyncIterator[list[NodeProcess]]:
    """Start nodes and wait until all have joined; at the end their processes are killed.

    Args:
        announcing: the first node of each process announces itself as a server does, again and again.
    """
    arguments = [sys.executable, "-m", "benchmarks.directory_nodes", "--nodes", str(nodes_each)]
    arguments += ["--announce"] if announcing else []
    children = [
        subprocess.Popen(  # noqa: ASYNC220 - starts within milliseconds
            [*arguments, *initial_peers],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            start_new_session=True,
            preexec_fn=die_with_parent(os.getpid()),
        )
        for _ in range(processes)
    ]
    try:
        yield [NodeProcess(child, await asyncio.to_thread(_peer_ids, child)) for child in children]
    finally:
        for child in children:
            child.kill()
        for child in children:
            child.wait()


def _peer_ids(child: subprocess.Popen[bytes]) -> list[str]:
    assert child.stdout is not None
    line = child.stdout.readline()
    if not line:
        raise RuntimeError(f"a process of the directory ended with code {child.wait()} instead of joining")
    return [str(peer_id) for peer_id in json.loads(line)]


async def _serve(nodes: int, initial_peers: Sequence[str], announcing: bool) -> None:
    async with AsyncExitStack() as stack:
        joined = []
        for _ in range(nodes):
            node = await Node.start(listen=LOOPBACK)
            stack.push_async_callback(node.stop)
            directory = await Directory.join(node, initial_peers)
            stack.push_async_callback(directory.leave)
            joined.append((node, directory))
        node, directory = joined[0]
        if announcing:
            await directory.announce(announcement(node.peer_id))
        print(json.dumps([one.peer_id for one, _ in joined]), flush=True)
        while True:
            await asyncio.sleep(RENEWAL_S)
            if announcing:
                await directory.announce(announcement(node.peer_id))


def main() -> None:
    """Run nodes until killed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, default=1, help="how many")
    parser.add_argument("--announce", action="store_true", help="the first one announces itself as a server")
    parser.add_argument("initial_peers", nargs="+", help="multiaddrs of peers of the directory")
    options = parser.parse_args()
    asyncio.run(_serve(options.nodes, options.initial_peers, options.announce))


if __name__ == "__main__":
    main()
