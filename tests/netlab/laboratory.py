"""The laboratory: hosts, the links between them, and the faults that a test brings about."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.netlab import namespaces, process_trees
from tests.netlab.links import Link
from tests.netlab.process_trees import Process
from tests.netlab.tun import DEVICE

_REPOSITORY = Path(__file__).parents[2]
_NETWORK = "10.77.0"
_MTU_BYTES = 1500
_RELAY_END_TIMEOUT_S = 10.0
_numbers = itertools.count()


def netlab_available() -> str | None:
    """Why there can be no laboratory on this machine; None if there can be one."""
    if not sys.platform.startswith("linux"):
        return "network namespaces need Linux"
    if os.geteuid() != 0:
        return "network namespaces need root"
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        return "there is no usable /dev/net/tun"
    if shutil.which("ip") is None:
        return "iproute2's `ip` is not installed"
    return None


@dataclasses.dataclass(frozen=True)
class Host:
    """A network namespace with an address of its own."""

    name: str
    address: str
    """IPv4; all hosts of a laboratory reach each other, and nothing else."""
    namespace: str
    """As ``ip netns`` calls it."""

    def start(self, arguments: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """``subprocess.Popen(arguments, **options)`` on this host; its ``pid`` is the program's own."""
        enter = namespaces.entrance(self.namespace)
        prepare: Callable[[], None] | None = options.pop("preexec_fn", None)

        def enter_and_prepare() -> None:
            enter()
            if prepare is not None:
                prepare()

        return subprocess.Popen(arguments, preexec_fn=enter_and_prepare, **options)


class Laboratory:
    """Hosts and links; a context manager, at whose end every process on a host is killed.

    Links are symmetric unless told otherwise. Changes of links hold when the method returns. If the process that
    opened the laboratory dies, the relay removes the namespaces; should that be killed too, the next laboratory on
    this machine does.
    """

    def __init__(self, hosts: Iterable[str], link: Link | None = None, *, seed: int = 0) -> None:
        """Make the hosts; `link` is the link between any two. `seed` decides which packets are lost.

        Raises:
            RuntimeError: this machine cannot do it, with the reason.
        """
        reason = netlab_available()
        if reason is not None:
            raise RuntimeError(f"No laboratory on this machine: {reason}.")
        number = next(_numbers)
        self._hosts: dict[str, Host] = {}
        for index, name in enumerate(hosts):
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
                raise ValueError(f"{name!r} cannot name a host: use letters, digits, - and _.")
            self._hosts[name] = Host(name, f"{_NETWORK}.{index + 1}", namespaces.namespace_name(number, name))
        self._links = dict.fromkeys(itertools.permutations(self._hosts, 2), link or Link())
        self._cut: set[tuple[str, str]] = set()
        self._cut_off: set[str] = set()
        self._relay: subprocess.Popen[str] | None = None
        namespaces.sweep()
        try:
            for host in self._hosts.values():
                namespaces.add_namespace(host.namespace)
            self._relay = self._start_relay(link or Link(), seed)
            for host in self._hosts.values():
                _set_up(host)
        except BaseException:
            self.close()
            raise

    @property
    def relay_pid(self) -> int:
        """The process that carries the packets."""
        assert self._relay is not None
        return self._relay.pid

    def host(self, name: str) -> Host:
        """Raises KeyError if there is none of this name."""
        return self._hosts[name]

    def inside(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Make the calling thread a part of a host, for the time of the ``with`` block.

        Processes, threads and sockets that it makes meanwhile are on the host too, and stay there: a client opened
        inside goes on speaking from there. Threads that ran before are not moved.
        """
        return namespaces.inside(self.host(name).namespace)

    def set_link(self, source: str, target: str, link: Link, *, one_way: bool = False) -> None:
        """Change the link between two hosts. Packets under way keep their time."""
        pairs = self._pairs(source, target, one_way)
        self._links.update(dict.fromkeys(pairs, link))
        self._tell(pairs)

    def cut(self, source: str, target: str, *, one_way: bool = False) -> None:
        """From now on packets between two hosts vanish, those under way included; nobody is told."""
        pairs = self._pairs(source, target, one_way)
        self._cut.update(pairs)
        self._tell(pairs)

    def heal(self, source: str, target: str, *, one_way: bool = False) -> None:
        """Undo :meth:`cut`."""
        pairs = self._pairs(source, target, one_way)
        self._cut.difference_update(pairs)
        self._tell(pairs)

    def cut_off(self, name: str) -> None:
        """From now on packets between a host and all others vanish."""
        self._cut_off.add(self.host(name).name)
        self._tell([pair for pair in self._links if name in pair])

    def rejoin(self, name: str) -> None:
        """Undo :meth:`cut_off`; links that were cut one by one stay so."""
        self._cut_off.discard(self.host(name).name)
        self._tell([pair for pair in self._links if name in pair])

    def freeze(self, process: Process) -> None:
        """Stop a process and its descendants, as if the machine had hung; its kernel still answers."""
        process_trees.freeze(process)

    def thaw(self, process: Process) -> None:
        """Let a process and its descendants go on."""
        process_trees.thaw(process)

    def kill(self, process: Process) -> None:
        """SIGKILL to a process and its descendants."""
        process_trees.kill(process)

    def close(self) -> None:
        """Kill all processes on the hosts, end the relay and remove the namespaces. May be called twice."""
        namespaces.remove_namespaces([host.namespace for host in self._hosts.values()])
        if self._relay is not None:
            with self._relay:  # closes its stdin, which ends it
                with contextlib.suppress(OSError):
                    self._relay.stdin.close()  # type: ignore[union-attr]
                try:
                    self._relay.wait(_RELAY_END_TIMEOUT_S)
                except subprocess.TimeoutExpired:
                    self._relay.kill()

    def __enter__(self) -> Laboratory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _pairs(self, source: str, target: str, one_way: bool) -> list[tuple[str, str]]:
        pairs = [(source, target)] if one_way else [(source, target), (target, source)]
        for pair in pairs:
            if pair not in self._links:
                raise KeyError(f"There is no link from {pair[0]!r} to {pair[1]!r}.")
        return pairs

    def _tell(self, pairs: Iterable[tuple[str, str]]) -> None:
        orders = []
        for source, target in pairs:
            is_cut = (source, target) in self._cut or source in self._cut_off or target in self._cut_off
            orders.append((source, target, dataclasses.asdict(self._links[source, target]), is_cut))
        assert self._relay is not None
        assert self._relay.stdin is not None
        self._relay.stdin.write(json.dumps(orders) + "\n")
        self._relay.stdin.flush()
        self._await_relay(self._relay)

    def _start_relay(self, link: Link, seed: int) -> subprocess.Popen[str]:
        settings = {
            "hosts": {host.name: (host.namespace, host.address) for host in self._hosts.values()},
            "link": dataclasses.asdict(link),
            "seed": seed,
            "owner": os.getpid(),
        }
        relay = subprocess.Popen(
            [sys.executable, "-m", "tests.netlab.relay", json.dumps(settings)],
            cwd=_REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C ends the laboratory's process; the relay cleans up after that
        )
        self._await_relay(relay)
        return relay

    def _await_relay(self, relay: subprocess.Popen[str]) -> None:
        assert relay.stdout is not None
        if not relay.stdout.readline():
            raise RuntimeError(f"The relay of the laboratory ended with code {relay.wait()}; see stderr.")


def _set_up(host: Host) -> None:
    """Give the host's device its address. TCP's congestion control stays the one that this machine is set to."""
    lines = (
        f"link set dev {DEVICE} mtu {_MTU_BYTES} txqueuelen 5000 addrgenmode none up",
        f"address add {host.address}/24 dev {DEVICE}",
    )
    namespaces.ip("-n", host.namespace, "-batch", "-", lines="\n".join(lines))
