"""The dashboard as a person and a script see it: real processes, a real browser, real deaths."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import obey_ctrl_c
from hypothesis import HealthCheck, Phase, given, settings
from warm_start import WarmLoopback

from swarm.commands.local_swarm import LocalPeer, LocalSwarm

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed on this machine")
NOTICED_WITHIN_S = 15.0
MOST_BYTES = 300 * 1024**2


class Program:
    """A child process that tells its URL as JSON."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=obey_ctrl_c,
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.process.communicate()[1]
        self.url: str = json.loads(line)["url"]

    def get(self, path: str) -> bytes:
        with urllib.request.urlopen(self.url + path, timeout=10) as answer:
            body: bytes = answer.read()
        return body

    def json(self, path: str) -> Any:
        return json.loads(self.get(path))

    def until(self, path: str, condition: Any, within_s: float = 30.0) -> Any:
        deadline = time.monotonic() + within_s
        while not condition(found := self.json(path)):
            assert time.monotonic() < deadline, found
            time.sleep(0.1)
        return found

    def end(self) -> tuple[int, str]:
        """Ctrl-C; its code, and what it said last."""
        self.process.send_signal(signal.SIGINT)
        _, said = self.process.communicate(timeout=30)
        return self.process.returncode, said

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate()


def health(*arguments: str) -> Program:
    return Program("swarm.commands.main", "health", "--port", "0", "--json", *arguments)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()


class Visitor:
    """A page, and everything that its console complains of."""

    def __init__(self, browser: Any, width: int = 1180, scheme: str = "light") -> None:
        self._context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 900})
        self.page = self._context.new_page()
        self.complaints: list[str] = []
        self.page.on(
            "console",
            lambda message: self.complaints.append(message.text) if message.type in ("error", "warning") else None,
        )
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))

    def violations(self) -> list[str]:
        """What axe finds that is serious."""
        from axe_playwright_python.sync_playwright import Axe

        found = Axe().run(self.page).response["violations"]
        return [f"{one['id']}: {one['nodes'][0]['html']}" for one in found if one["impact"] in ("serious", "critical")]

    def close(self) -> None:
        self._context.close()


@pytest.fixture(scope="module")
def servers(swarm: LocalSwarm) -> list[LocalPeer]:
    """Three: two with a half each, one with the whole."""
    options = ("--threads", "1", "--public-name", "Ada's garage")
    return swarm.start_servers("smollm2", ["0:15", "15:30", "0:30"], *options)


@needs_browser
def test_a_killed_server_turns_red_and_its_model_degraded_without_a_reload(
    swarm: LocalSwarm, servers: list[LocalPeer], browser: Any, tmp_path: Path
) -> None:
    dashboard = health("--initial-peers", *swarm.initial_peers, "--history", str(tmp_path / "history.sqlite"))
    try:
        state = dashboard.until(
            "api/v1/state",
            lambda one: one["totals"]["servers"]["online"] == 3 and all(it["latency_ms"] for it in one["servers"]),
        )
        (model,) = state["models"]
        assert (model["name"], model["health"], model["survives"]) == ("smollm2", "healthy", 1)
        assert model["copies"] == [2] * 30
        assert {one["id"] for one in state["servers"]} == {peer.peer_id for peer in servers}
        assert {one["name"] for one in state["servers"]} == {"Ada's garage"}
        assert b"127.0.0.1" not in dashboard.get("api/v1/state") and b"/ip4/" not in dashboard.get("api/v1/state")
        assert b'swarm_model_survivable_deaths{model="' + model["id"].encode() in dashboard.get("metrics")
        assert b"smollm2: healthy" in dashboard.get("badge/smollm2.svg")

        first, map_ = Visitor(browser), Visitor(browser, scheme="dark")
        first.page.goto(dashboard.url)
        first.page.wait_for_selector(".model[data-health=healthy]")
        map_.page.goto(f"{dashboard.url}#/models/{model['id']}")
        map_.page.wait_for_selector("tbody tr:nth-child(3)")
        assert map_.page.locator("tbody .state.online").count() == 3
        assert first.page.locator("h1").inner_text() == "smollm2 is healthy."
        for visitor in (first, map_):
            visitor.page.evaluate("window.notReloaded = true")

        killed_at = time.monotonic()
        servers[0].kill()
        first.page.wait_for_selector(".model[data-health=degraded]", timeout=1000 * NOTICED_WITHIN_S)
        map_.page.wait_for_selector("tbody .state.dead", timeout=1000 * NOTICED_WITHIN_S)
        assert time.monotonic() - killed_at < NOTICED_WITHIN_S
        assert first.page.locator("h1").inner_text() == "smollm2 is degraded."
        assert "Ada's garage died; blocks 0–14 have 1 server left of 2." in first.page.locator(".lede").inner_text()
        for visitor in (first, map_):
            assert visitor.page.evaluate("window.notReloaded") is True

        _every_page_is_accessible(dashboard, model["id"], servers[0].peer_id, browser)
        first.page.keyboard.press("Tab")
        assert first.page.evaluate("document.activeElement.textContent") == "Skip to the content"
        first.page.locator(".model h3 a").focus()
        first.page.keyboard.press("Enter")
        first.page.wait_for_selector("canvas.blocks")

        servers[2].process.terminate()
        found = dashboard.until("api/v1/overview", lambda one: one["models"][0]["health"] == "broken")
        assert found["models"][0]["reason"] == "No server is online for blocks 0–14: Ada's garage died."
        first.page.wait_for_selector(".lede .broken")
        kinds = [one["kind"] for one in found["incidents"]]
        assert kinds.index("model_broken") < kinds.index("server_left") < kinds.index("server_died")
        assert first.complaints == map_.complaints == []
        first.close()
        map_.close()

        detail = dashboard.until(f"api/v1/servers/{servers[0].peer_id}", lambda one: one["block_hours"] > 0)
        assert detail["hosts"][0]["condition"] == "dead" and 0 < detail["uptime"] <= 1
        past = dashboard.json("api/v1/history?hours=1")["models"][0]["samples"][-1]
        assert past["servers"] > 0 and past["healthy"] + past["degraded"] + past["broken"] == pytest.approx(1, abs=0.01)
        maps = Path(f"/proc/{dashboard.process.pid}/maps")
        assert not maps.exists() or "torch" not in maps.read_text(), "a dashboard has nothing to compute"
        code, said = dashboard.end()
        assert code == 0 and said.endswith("Left the swarm.\n") and "Traceback" not in said
    finally:
        dashboard.kill()


def _every_page_is_accessible(dashboard: Program, model: str, server: str, browser: Any) -> None:
    """By axe, wide and narrow, light and dark; nothing sticks out of a phone's screen."""
    for width, scheme in ((1180, "light"), (390, "dark")):
        visitor = Visitor(browser, width, scheme)
        for path in ("", f"#/models/{model}", f"#/servers/{server}", "#/incidents", "#/history", "#/contributors"):
            visitor.page.goto(dashboard.url + path)
            visitor.page.wait_for_selector("#content[data-sequence] h1")
            assert visitor.page.evaluate("document.documentElement.scrollWidth") <= width, path
            assert visitor.violations() == [], path
        assert visitor.complaints == []
        visitor.close()


@pytest.fixture(scope="module")
def large() -> Iterator[Program]:
    """1,000 servers of each of 5 models of 80 blocks, looked at by the real code every two seconds."""
    program = Program("tests.synthetic_swarm", "--servers", "1000", "--models", "5", "--blocks", "80")
    program.until("api/v1/overview", lambda one: one["totals"]["servers"]["online"] == 5000)
    yield program
    program.end()


@needs_browser
def test_a_thousand_servers_of_five_models_are_shown_at_once_in_little_memory(large: Program, browser: Any) -> None:
    for path in ("", "api/v1/overview"):
        first_bytes_s = []
        for _ in range(15):
            begun = time.monotonic()
            with urllib.request.urlopen(large.url + path, timeout=10) as answer:
                answer.read(1)
                first_bytes_s.append(time.monotonic() - begun)
            time.sleep(0.05)
        assert sorted(first_bytes_s)[7] < 0.2, f"{path}: {first_bytes_s}"
    visitor = Visitor(browser)
    begun = time.monotonic()
    visitor.page.goto(large.url)
    visitor.page.wait_for_selector(".model canvas")
    usable_s = time.monotonic() - begun
    visitor.page.locator(".model h3 a").first.click()
    visitor.page.wait_for_selector("canvas.blocks")
    drawn = "(() => { const c = document.querySelector('canvas.blocks'); return c.width * c.height; })()"
    visitor.page.wait_for_function(f"{drawn} > 100000")
    assert usable_s < 5
    assert visitor.page.evaluate("document.querySelectorAll('*').length") < 5000
    assert visitor.complaints == []
    visitor.close()
    assert large.json("api/v1/state")["totals"]["servers"]["online"] == 5000
    assert psutil.Process(large.process.pid).memory_info().rss < MOST_BYTES


def test_answers_are_as_the_api_says_whatever_is_asked(large: Program) -> None:
    import schemathesis

    schema = schemathesis.openapi.from_url(f"{large.url}openapi.json").exclude(path="/api/v1/events")
    tried = set()
    for result in schema.get_all_operations():
        operation = result.ok()
        tried.add(operation.path)

        @given(case=operation.as_strategy())
        @settings(
            max_examples=6, deadline=None, database=None, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        def ask(case: Any) -> None:
            case.call_and_validate()

        ask()
    assert {"/api/v1/state", "/api/v1/models", "/api/v1/servers/{id}", "/api/v1/history"} <= tried


def test_a_model_whose_name_has_several_lines_has_no_badge_as_the_api_says(large: Program) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        large.get("badge/one%0Atwo.svg")
    documented = large.json("openapi.json")["paths"]["/badge/{model}.svg"]["get"]["responses"]["404"]["content"]
    assert refused.value.code == 404
    assert refused.value.headers["Content-Type"] in documented


def test_an_answer_is_sent_once_to_whoever_has_it_and_compressed(large: Program) -> None:
    request = urllib.request.Request(f"{large.url}api/v1/models", headers={"Accept-Encoding": "gzip"})
    with urllib.request.urlopen(request) as answer:
        etag = answer.headers["ETag"]
        assert answer.headers["Content-Encoding"] == "gzip"
    with pytest.raises(urllib.error.HTTPError) as not_modified:
        while True:  # unless the swarm was looked at meanwhile
            request.add_header("If-None-Match", etag)
            with urllib.request.urlopen(request) as answer:
                assert answer.headers["ETag"] != etag
                etag = answer.headers["ETag"]
    assert not_modified.value.code == 304


def test_events_come_with_every_look(large: Program) -> None:
    with urllib.request.urlopen(f"{large.url}api/v1/events", timeout=20) as stream:
        sequences = []
        while len(sequences) < 3:
            line = stream.readline()
            if line.startswith(b"data: "):
                sequences.append(json.loads(line[6:])["sequence"])
    assert sequences == sorted(set(sequences))


def test_it_starts_without_a_bootstrap_says_so_and_joins_when_there_is_one(tmp_path: Path) -> None:
    def bootstrap(port: int) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "swarm.commands.main", "bootstrap", "--host", "127.0.0.1", "--port", str(port)]
            + ["--private-network", "--identity", str(tmp_path / "bootstrap.key"), "--json"],
            stdout=subprocess.PIPE,
            text=True,
        )

    first = bootstrap(0)
    assert first.stdout is not None
    (address,) = json.loads(first.stdout.readline())["addresses"]
    first.kill()
    first.wait()
    dashboard = health("--initial-peers", address, "--history", str(tmp_path / "history.sqlite"))
    try:
        found = dashboard.until("api/v1/overview", lambda one: one["connection"]["note"].startswith("No initial peer"))
        assert found["connection"]["connected"] is False and found["models"] == []
        second = bootstrap(int(address.split("/")[4]))
        try:
            found = dashboard.until("api/v1/overview", lambda one: one["connection"]["connected"])
            assert found["headline"] == "Nobody hosts a model here yet."
        finally:
            second.kill()
            second.wait()
        assert dashboard.end()[0] == 0
    finally:
        dashboard.kill()


def test_a_port_that_is_taken_a_bad_address_and_a_bad_history_are_clear_errors(
    warm: WarmLoopback, large: Program, tmp_path: Path
) -> None:
    port = large.url.rstrip("/").rpartition(":")[2]
    nobody = "/ip4/127.0.0.1/tcp/9/p2p/12D3KooWRE8mzAbLiPHb17uqHkoab9NUSjfeswJvYjvTuAVikvKg"
    (tmp_path / "letter.txt").write_text("Dear Ada, " * 1000)
    peers, history = ["--initial-peers", nobody], str(tmp_path / "letter.txt")
    for options, complaint in (
        ([*peers, "--port", port], f"Cannot listen on 127.0.0.1 port {port}: Address already in use"),
        (["--initial-peers", "nonsense"], "'nonsense' is not a peer's address"),
        ([*peers, "--port", "0", "--history", history], "The history cannot be kept in"),
    ):
        result = warm.run("swarm.commands.main", "health", *options, timeout_s=60)
        assert result.returncode == 1
        assert result.stderr.startswith(f"error: {complaint}"), result.stderr
        assert "Traceback" not in result.stderr
