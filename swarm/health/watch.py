"""Watch a swarm for as long as one likes: join, look every few seconds, dial servers; whatever fails is tried again."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

from swarm.dht import Announcement, Directory, ExpertAnnouncement, ModelListing
from swarm.errors import BootstrapFailed, DaemonDied, SwarmError
from swarm.health.chronicle import Chronicle
from swarm.health.observation import Observation, Probe
from swarm.health.probing import AT_ONCE, due, probe
from swarm.transport.node import Node

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 2.0
LISTINGS_EVERY_S = 10.0
RETRY_S = 3.0
MAX_MODELS = 100
"""Of those that are listed, the ones with most servers are watched."""
_LOOKUPS_AT_ONCE = 8
_PROBE_EVERY_S = 0.5
_UNREACHED = "No initial peer answers. The dashboard goes on trying."
_BLIND = "The dashboard has lost sight of the swarm: no peer answers. What is shown is as it was last seen."


class Watch:
    """Looks at one swarm and tells `chronicle`."""

    def __init__(self, initial_peers: Sequence[str], chronicle: Chronicle, only: Collection[str] = ()) -> None:
        """
        Args:
            only: digests of the models to watch; none: all that servers list.
        """
        self._initial_peers, self._chronicle, self._only = initial_peers, chronicle, tuple(only)
        self._probes: dict[str, Probe] = {}
        self._listings: list[ModelListing] = []
        self._listed_at = float("-inf")
        self._look_now = asyncio.Event()

    async def run(self) -> None:
        """Watch for ever."""
        while True:
            try:
                await self._watch()
            except DaemonDied:
                logger.warning("p2pd, the network daemon, has died; starting it again")
                self._chronicle.tell(_UNREACHED)
            except SwarmError as error:
                logger.warning("%s", error)
                self._chronicle.tell(_UNREACHED)
            await asyncio.sleep(RETRY_S)

    async def _watch(self) -> None:
        """Watch until the daemon dies."""
        node = await Node.start(client_only=True)
        try:
            directory = await self._join(node)
            try:
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(self._keep_looking(directory))
                    tasks.create_task(self._keep_probing(node, directory))
                    tasks.create_task(self._stay_joined(directory))
                    tasks.create_task(node.fail_with_daemon())
            except BaseExceptionGroup as group:
                raise group.exceptions[0] from group
            finally:
                await directory.leave()
        finally:
            await node.stop()

    async def _join(self, node: Node) -> Directory:
        while True:
            try:
                return await Directory.join(node, self._initial_peers, client_only=True)
            except BootstrapFailed as error:
                logger.info("%s", error)
                self._chronicle.tell(_UNREACHED)
                await asyncio.sleep(RETRY_S)

    async def _keep_looking(self, directory: Directory) -> None:
        while True:
            begun = time.monotonic()
            self._look_now.clear()
            seen = await self._look(directory)
            await asyncio.to_thread(self._chronicle.take_in, seen, _BLIND if seen.is_blind else "")
            took_s = time.monotonic() - begun
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(LOOK_EVERY_S - took_s, took_s)):
                    await self._look_now.wait()

    async def _look(self, directory: Directory) -> Observation:
        if time.monotonic() - self._listed_at >= LISTINGS_EVERY_S and not self._only:
            self._listings = await directory.models()
            self._listed_at = time.monotonic()
        limit = asyncio.Semaphore(_LOOKUPS_AT_ONCE)

        async def spans(model: str) -> list[Announcement]:
            async with limit:
                return await directory.servers(model, departed=True)

        async def experts(model: str) -> list[ExpertAnnouncement]:
            async with limit:
                return await directory.experts(model, departed=True)

        models = self._models()
        found_spans = await asyncio.gather(*map(spans, models))
        found_experts = await asyncio.gather(*map(experts, models))
        return Observation(
            at=time.time(),
            spans=tuple(one for found in found_spans for one in found),
            experts=tuple(one for found in found_experts for one in found),
            listings=tuple(self._listings),
            probes=dict(self._probes),
            is_blind=directory.is_alone(),
        )

    def _models(self) -> list[str]:
        """Digests of the models to look for: also of those that were hosted a while ago."""
        if self._only:
            return list(self._only)
        listed = Counter(one.model for one in self._listings)
        known: Mapping[str, object] = self._chronicle.state.models
        digests = sorted(listed.keys() | known.keys(), key=lambda digest: (-listed[digest], digest))
        return digests[:MAX_MODELS]

    async def _keep_probing(self, node: Node, directory: Directory) -> None:
        under_way: dict[asyncio.Task[Probe], str] = {}
        try:
            while True:
                known = {one.announcement.peer_id: one for one in self._chronicle.state.servers.values()}
                self._probes = {peer_id: one for peer_id, one in self._probes.items() if peer_id in known}
                busy = set(under_way.values())
                turn = due(self._chronicle.state.servers.values(), time.time(), 2 * AT_ONCE)
                for record in turn:
                    peer_id = record.announcement.peer_id
                    latest = self._probes.get(peer_id)
                    if peer_id in busy or len(under_way) >= AT_ONCE or (latest and latest != record.probe):
                        continue  # at it, or not yet taken in
                    under_way[asyncio.create_task(probe(node, directory, record))] = peer_id
                if not under_way:
                    await asyncio.sleep(_PROBE_EVERY_S)
                    continue
                done, _ = await asyncio.wait(under_way, timeout=_PROBE_EVERY_S, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    found = task.result()
                    self._probes[under_way.pop(task)] = found
                    if found.refused:
                        self._look_now.set()
                if done:
                    await asyncio.sleep(0.05)
        finally:
            for task in under_way:
                task.cancel()
            await asyncio.gather(*under_way, return_exceptions=True)

    async def _stay_joined(self, directory: Directory) -> None:
        while True:
            await asyncio.sleep(RETRY_S)
            if directory.is_alone():
                with contextlib.suppress(BootstrapFailed):
                    await directory.rejoin(self._initial_peers)
