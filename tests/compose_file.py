"""``docker/compose.yaml`` without Docker: its services as processes of this machine, each on an address of loopback."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from swarm.transport.daemon import die_with_parent

DOCKER = Path(__file__).parent.parent / "docker"
_STOP_TIMEOUT_S = 25.0


def read_compose_file(variables: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The file as Compose sees it: variables (given, or their defaults) and YAML's merges carried out."""

    def value(match: re.Match[str]) -> str:
        return (variables or {}).get(match["name"], match["default"])

    text = re.sub(r"\$\{(?P<name>\w+):-(?P<default>[^}]*)\}", value, (DOCKER / "compose.yaml").read_text())
    return dict(yaml.safe_load(text))


@dataclass
class Container:
    """What stands in for one: a process with an address and volumes of its own."""

    service: str
    address: str
    environment: dict[str, str]
    process: subprocess.Popen[bytes]
    log: Path

    def is_healthy(self) -> bool:
        """By the image's own health check."""
        check = [sys.executable, str(DOCKER / "healthy.py")]
        return subprocess.run(check, env=self.environment, stderr=subprocess.DEVNULL, timeout=10).returncode == 0

    def wait_until_healthy(self, until: float) -> None:
        """Fails at the monotonic time `until`, or if it ends; with its log."""
        while not self.is_healthy():
            assert self.process.poll() is None, f"{self.service} ended:\n{self.log.read_text()}"
            assert time.monotonic() < until, f"{self.service} does not become healthy:\n{self.log.read_text()}"
            time.sleep(0.2)


@dataclass
class ComposedSwarm:
    """Every service of the file, with names, ports and paths of this machine put for those of containers.

    Args:
        root: where volumes and logs go.
        ports: what is put for each port of the file.
        volumes: directories of volumes that are not to begin empty.
    """

    compose: Mapping[str, Any]
    root: Path
    ports: Mapping[int, int]
    volumes: Mapping[str, Path]
    containers: list[Container] = field(default_factory=list)

    def start(self, services: Sequence[str], healthy_within_s: float) -> None:
        """In the order in which services wait for each other, as ``docker compose up`` does."""
        until, left = time.monotonic() + healthy_within_s, list(services)
        while left:
            ready = [name for name in left if not set(self._waits_for(name)) & set(left)]
            assert ready, f"these wait for each other: {left}"
            for name in ready:
                for dependency in self._waits_for(name):
                    self.one(dependency).wait_until_healthy(until)
                for _ in range(self.compose["services"][name].get("deploy", {}).get("replicas", 1)):
                    self.containers.append(self._started(name))
                left.remove(name)
        for container in self.containers:
            container.wait_until_healthy(until)

    def one(self, service: str) -> Container:
        """The first container of a service."""
        return next(container for container in self.containers if container.service == service)

    def stop(self) -> dict[str, set[int]]:
        """SIGTERM to all at once; the exit codes by service. What does not end is killed, and has code -9."""
        for container in self.containers:
            container.process.send_signal(signal.SIGTERM)
        until = time.monotonic() + _STOP_TIMEOUT_S
        codes: dict[str, set[int]] = {}
        for container in self.containers:
            with contextlib.suppress(subprocess.TimeoutExpired):
                container.process.wait(max(0.1, until - time.monotonic()))
            container.process.kill()
            codes.setdefault(container.service, set()).add(container.process.wait())
        self.containers.clear()
        return codes

    def __enter__(self) -> ComposedSwarm:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _waits_for(self, name: str) -> list[str]:
        return list(self.compose["services"][name].get("depends_on", {}))

    def _started(self, name: str) -> Container:
        service, number = self.compose["services"][name], len(self.containers)
        # The first is called by name, which here has to be `localhost`.
        address = "127.0.0.1" if not number else f"127.0.0.{number + 30}"
        directories = {}
        for mount in service["volumes"]:
            volume, path = mount.split(":")[:2]
            directories[path] = self.volumes.get(volume, self.root / volume)
            directories[path].mkdir(exist_ok=True)
        here = {
            **{path: str(directory) for path, directory in directories.items()},
            **{str(port): str(substitute) for port, substitute in self.ports.items()},
            "0.0.0.0": address,
            "127.0.0.1": address,
            f"/dns4/{name}": "/dns4/localhost",
        }
        image = {"SWARM_HEALTH": "tcp://127.0.0.1:31337", "SWARM_HOME": "/var/lib/swarm"}
        environment = {
            variable: _replaced(value, here) for variable, value in {**image, **service["environment"]}.items()
        } | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "HOME": "/proc/self/fdinfo",  # nothing can be written there, as in a container that is read-only
        }
        log = self.root / f"{name}-{number}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                ["sh", str(DOCKER / "entrypoint.sh"), *(_replaced(part, here) for part in service["command"])],
                env=environment,
                cwd=self.root,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=die_with_parent(os.getpid()),
            )
        return Container(name, address, environment, process, log)


def _replaced(text: str, substitutes: Mapping[str, str]) -> str:
    pattern = "|".join(re.escape(old) for old in sorted(substitutes, key=len, reverse=True))
    return re.sub(pattern, lambda match: substitutes[match[0]], text)
