"""The process that is all the links of a laboratory: it carries packets between namespaces, each when it is due.

It is told what to do by JSON lines on stdin, and answers each with a line. When its laboratory ends, in whatever
way, it removes the namespaces. Run by `tests.netlab.laboratory` as ``python -m tests.netlab.relay``.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import heapq
import itertools
import json
import os
import select
import sys
import time
from random import Random
from typing import Any

from tests.netlab import bursts, namespaces, tun
from tests.netlab.links import Link, Wire

_PR_SET_TIMERSLACK = 29
_READS_PER_TURN = 32
_PASSAGE_S = 0.0001  # what a frame needs to get here and to leave again, whatever its link; measured
_LONG_SLEEP_S = 0.001
_WAKE_EARLY_S = 0.0002  # what staying awake may cost a frame, in processor time


class Relay:
    """The hosts' devices, the wires between them, and the frames that are under way."""

    def __init__(self, hosts: dict[str, tuple[str, str]], link: Link, seed: int) -> None:
        """`hosts`: name → (namespace, address); `link` is the link between any two."""
        self._devices: dict[int, dict[bytes, Wire]] = {}
        """What each device may send to."""
        self._wires: dict[tuple[str, str], Wire] = {}
        self._descriptors: dict[Wire, int] = {}
        self._under_way: list[tuple[float, int, Wire, bytes]] = []
        self._numbers = itertools.count()
        self._awake_until_s = 0.0
        addresses = {name: bytes(map(int, address.split("."))) for name, (_, address) in hosts.items()}
        opened = {}
        for name, (namespace, _) in hosts.items():
            with namespaces.inside(namespace):
                opened[name] = tun.open_tun()
        for source in hosts:
            self._devices[opened[source]] = {}
            for target in hosts:
                if target != source:
                    wire = Wire(link, Random(f"{seed} {source} {target}"))
                    self._wires[source, target] = wire
                    self._devices[opened[source]][addresses[target]] = wire
                    self._descriptors[wire] = opened[target]

    def set_wire(self, source: str, target: str, link: Link, is_cut: bool) -> None:
        """Change a link. What is under way on a link that is cut is lost."""
        wire = self._wires[source, target]
        wire.link, wire.is_cut = link, is_cut
        if is_cut:
            self._under_way = [entry for entry in self._under_way if entry[2] is not wire]
            heapq.heapify(self._under_way)

    def run(self, control: Control) -> None:
        """Carry packets until the laboratory ends."""
        descriptors = [*self._devices, *control.descriptors]
        while True:
            wait_s = self._deliver()
            readable, _, _ = select.select(descriptors, [], [], wait_s)
            for descriptor in readable:
                if descriptor in self._devices:
                    self._take(descriptor)
                elif not control.obey(self, descriptor):
                    return

    def _take(self, device: int) -> None:
        routes = self._devices[device]
        with contextlib.suppress(BlockingIOError):
            for _ in range(_READS_PER_TURN):
                frame = os.read(device, tun.MAX_FRAME_BYTES)
                target = bursts.destination(frame)
                wire = routes.get(target) if target else None
                if wire is not None and not wire.is_cut:
                    self._send(wire, frame)

    def _send(self, wire: Wire, frame: bytes) -> None:
        packets, size_bytes = bursts.packets_and_size(frame)
        arrival_s = wire.arrival_s(size_bytes, time.monotonic())
        if arrival_s is not None:
            arrival_s -= _PASSAGE_S
            lost = wire.lost(packets)
            for rest in bursts.without(frame, lost) if lost else [frame]:
                heapq.heappush(self._under_way, (arrival_s, next(self._numbers), wire, rest))

    def _deliver(self) -> float | None:
        """Hand over what is due. Returns the seconds to wait for the next frame, None if there is none."""
        under_way = self._under_way
        for _ in range(_READS_PER_TURN):
            if not under_way:
                return None
            due_s, _, wire, frame = under_way[0]
            wait_s = due_s - time.monotonic()
            if wait_s > 0:
                return self._sleep_s(due_s, wait_s)
            heapq.heappop(under_way)
            with contextlib.suppress(OSError):  # a device that takes no packet loses it
                os.write(self._descriptors[wire], frame)
        return 0.0

    def _sleep_s(self, due_s: float, wait_s: float) -> float:
        """After a long sleep a processor comes late and slow, so it is woken early, and stays awake until `due_s`.

        In a stream of frames there are no long sleeps, and no time is spent on staying awake.
        """
        if wait_s > _LONG_SLEEP_S:
            self._awake_until_s = due_s
        return max(0.0, wait_s - _WAKE_EARLY_S) if due_s <= self._awake_until_s else wait_s


class Control:
    """The laboratory's orders, and whether it still lives."""

    def __init__(self, owner: int) -> None:
        self._orders = sys.stdin.fileno()
        self._owner = os.pidfd_open(owner)  # a fork of the owner may keep our stdin open after it
        self._rest = b""
        self.descriptors = (self._orders, self._owner)

    def obey(self, relay: Relay, descriptor: int) -> bool:
        """Do what came; False if the laboratory has ended."""
        data = b"" if descriptor == self._owner else os.read(self._orders, 65536)
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            for source, target, link, is_cut in json.loads(line):
                relay.set_wire(source, target, Link(**link), is_cut)
            answer()
        return bool(data)


def answer() -> None:
    """Tell the laboratory that its last order is done."""
    print(flush=True)


def main() -> None:
    """Carry packets until stdin or the owner ends, then remove the namespaces."""
    settings: dict[str, Any] = json.loads(sys.argv[1])
    hosts = {name: (namespace, address) for name, (namespace, address) in settings["hosts"].items()}
    try:
        control = Control(settings["owner"])
        relay = Relay(hosts, Link(**settings["link"]), settings["seed"])
        _be_punctual()
        answer()
        relay.run(control)
    finally:
        namespaces.remove_namespaces([namespace for namespace, _ in hosts.values()], spare=[settings["owner"]])


def _be_punctual() -> None:
    gc.disable()  # no object here is part of a cycle
    ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1)  # ns; the default would make every wait 50 µs longer
    with contextlib.suppress(OSError):  # a container may forbid it; then packets are late when all cores are busy
        os.sched_setscheduler(0, os.SCHED_RR | os.SCHED_RESET_ON_FORK, os.sched_param(1))


if __name__ == "__main__":
    main()
