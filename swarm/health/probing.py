"""Dial servers: whose turn it is, how long a round trip takes, and whether nobody listens there any more.

The lightest thing that a server answers to strangers is a ping of the DHT; servers of experts answer it as well.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import Iterable, Sequence

from swarm.dht import RENEWAL_S, Directory
from swarm.errors import PeerUnreachable
from swarm.health.observation import Probe
from swarm.health.swarm_state import ServerRecord
from swarm.transport.node import Node

AT_ONCE = 32
"""Probes under way."""
MOST_PER_S = 50.0
"""Of many servers each is dialled less often."""
INTERVAL_S = 3.0
"""Of few."""
_OVERDUE_S = RENEWAL_S + 1.5
"""Who has not renewed its announcement for so long is dialled first: it may have died."""
_OVERDUE_INTERVAL_S = 2.0
_TIMEOUT_S = 2.0
_TCP_ADDRESS = re.compile(r"/ip[46]/([0-9a-fA-F.:]+)/tcp/(\d{1,5})(?:/p2p/\w+)?")


def due(records: Iterable[ServerRecord], now: float, most: int) -> list[ServerRecord]:
    """Whom to dial now, the most urgent first; one record of every peer. Pure.

    Args:
        now: Unix time.
    """
    present = {one.announcement.peer_id: one for one in records if one.condition.is_present}
    interval_s = max(INTERVAL_S, len(present) / MOST_PER_S)
    urgent: list[tuple[bool, float, ServerRecord]] = []
    for one in present.values():
        is_overdue = now - one.renewed_at > _OVERDUE_S
        probed_at = one.probe.at if one.probe is not None else 0.0
        if now - probed_at >= (_OVERDUE_INTERVAL_S if is_overdue else interval_s):
            urgent.append((not is_overdue, probed_at, one))
    urgent.sort(key=lambda entry: entry[:2])
    return [one for _, _, one in urgent[:most]]


async def probe(node: Node, directory: Directory, record: ServerRecord) -> Probe:
    """Dial a server; takes a few seconds at most."""
    said = record.announcement
    rtt_s: float | None = None
    with contextlib.suppress(PeerUnreachable, TimeoutError):
        await node.connect(said.peer_id, said.addresses, timeout_s=_TIMEOUT_S)
        async with asyncio.timeout(_TIMEOUT_S):
            rtt_s = await directory.ping(said.peer_id)
    refused = rtt_s is None and record.answered and await _nobody_listens(tcp_endpoints(said.addresses))
    return Probe(time.time(), said.issued_at, rtt_s, refused)


def tcp_endpoints(addresses: Sequence[str]) -> list[tuple[str, int]]:
    """Host and port of those multiaddrs that lead straight to a TCP port. Pure."""
    found = (_TCP_ADDRESS.fullmatch(address) for address in addresses)
    return [(match[1], int(match[2])) for match in found if match is not None]


async def _nobody_listens(endpoints: Sequence[tuple[str, int]]) -> bool:
    """Whether there are TCP ports and every one of them refuses. The daemon cannot be asked: it does not dial an
    address again for a while after it failed, and does not say why it failed."""
    return bool(endpoints) and all(await asyncio.gather(*(_refuses(*endpoint) for endpoint in endpoints)))


async def _refuses(host: str, port: int) -> bool:
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            _, writer = await asyncio.open_connection(host, port)
    except ConnectionRefusedError:
        return True
    except (OSError, TimeoutError, ValueError, OverflowError):
        return False
    writer.close()
    return False
