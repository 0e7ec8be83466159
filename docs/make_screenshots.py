"""Take the pictures in docs/screenshots: ``python docs/make_screenshots.py`` (needs Playwright and a Chromium).

A function for every picture; each serves the real application before a swarm that is made up.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from playwright.sync_api import Browser, Page, sync_playwright

from swarm.dht import ModelListing
from swarm.dht.expert_announcement import heat_of
from swarm.health.app import health_app
from swarm.health.board import Board
from swarm.health.chronicle import Chronicle
from swarm.health.history import History, Sample
from swarm.health.verdicts import Health
from swarm.http_server import listening_socket
from tests.synthetic_swarm import SyntheticSwarm, digest, hosts_of, peer_id, span

OUTPUT = Path(__file__).parent / "screenshots"
LLAMA, QWEN, MIXTRAL, SMOL = "meta-llama/Llama-3.1-70B", "Qwen/Qwen3-32B", "mistralai/Mixtral-8x7B", "smollm2"
NAMES = ("tidewater", "Lena M.", "", "umbrella-lab", "", "quiet rack", "hxr", "", "Studio Ostkreuz", "northwind", "")


def health_overview(browser: Browser) -> None:
    """One model broken, one degraded, two healthy; light."""
    with _dashboard() as url, _page(browser, "light", 1180, 900) as page:
        page.goto(url)
        page.wait_for_selector(".model")
        _take(page, "health-overview.png")


def health_block_map(browser: Browser) -> None:
    """A model whose servers died; dark."""
    with _dashboard() as url, _page(browser, "dark", 1180, 900) as page:
        page.goto(f"{url}#/models/{digest(QWEN)}")
        page.wait_for_selector("canvas.blocks")
        page.wait_for_timeout(500)
        _take(page, "health-block-map.png")


def health_experts(browser: Browser) -> None:
    """A mixture of experts: who hosts which, and which are asked for; on a phone."""
    with _dashboard() as url, _page(browser, "light", 420, 1180) as page:
        page.goto(f"{url}#/models/{digest(MIXTRAL)}")
        page.wait_for_selector("canvas.demand")
        page.wait_for_timeout(500)
        page.get_by_text("Servers by experts").scroll_into_view_if_needed()
        _take(page, "health-experts.png")


PICTURES: tuple[Callable[[Browser], None], ...] = (health_overview, health_block_map, health_experts)


@contextlib.contextmanager
def _dashboard() -> Iterator[str]:
    """A dashboard before a small swarm of four models; its URL."""
    import uvicorn

    with tempfile.TemporaryDirectory() as directory:
        board, history = Board(), History(Path(directory) / "history.sqlite")
        _remember(history)
        swarm = SyntheticSwarm(Chronicle(board, history, {}), _announcements())
        swarm.listings = (
            ModelListing(
                peer_id=peer_id(1), model=digest(MIXTRAL), model_name=MIXTRAL, num_blocks=32,
                experts=((0, 32, 8),), issued_at=time.time(),
            ),
        )  # fmt: skip
        now = time.time()
        for ago in range(2400, 90, -12):
            swarm.look(now - ago)
        swarm.dead = [14]
        swarm.look(now - 80)
        swarm.dead = [14, 31, 32]
        for ago in range(40, 0, -12):
            swarm.look(now - ago)
        swarm.look(now - 1)
        with listening_socket("127.0.0.1", 0) as listening:
            server = uvicorn.Server(uvicorn.Config(health_app(board, history), lifespan="off", log_level="error"))
            thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listening])))
            thread.start()
            try:
                yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
            finally:
                board.close()
                server.should_exit = True
                thread.join()
                history.close()


def _announcements() -> list:
    def name(number: int) -> str:
        return NAMES[number % len(NAMES)]

    llama = [
        span(
            number,
            LLAMA,
            80,
            start,
            start + 20,
            public_name=name(number),
            throughput=9.5 + number % 5,
            sessions=number % 3,
        )
        for number, start in enumerate([0, 0, 20, 20, 20, 40, 40, 60, 60, 0, 40, 60])
    ]
    qwen = [
        span(
            number,
            QWEN,
            64,
            start,
            end,
            public_name=name(number + 3),
            dtype="bfloat16",
            quantization="int8" if number % 4 else "",
        )
        for number, (start, end) in enumerate(
            [(0, 16), (16, 32), (0, 16), (32, 48), (48, 64), (16, 32), (32, 48), (0, 32), (48, 64), (32, 40), (40, 48)],
            12,
        )
    ]
    smol = [
        span(number, SMOL, 30, start, start + 15, public_name=name(number))
        for number, start in ((31, 0), (32, 0), (33, 15), (34, 15))
    ]
    every = {block: range(8) for block in range(32)}
    mixtral = [
        span(40, MIXTRAL, 32, 0, 32, kept_experts={block: "" for block in range(32)}, public_name=name(4)),
        span(41, MIXTRAL, 32, 0, 32, kept_experts={block: "" for block in range(32)}, public_name=name(1)),
        *(
            hosts_of(
                42 + number,
                MIXTRAL,
                hosted := {block: sorted((one + number) % 8 for one in range(5)) for block in every},
                heats={block: _heats(block, those) for block, those in hosted.items()},
                public_name=name(number),
            )
            for number in range(8)
        ),
    ]
    return [*llama, *qwen, *smol, *mixtral]


def _heats(block: int, experts: Iterable[int]) -> bytes:
    """A few experts of every block are chosen far more often than others."""
    ranks = random.Random(block).sample(range(8), 8)
    return bytes(heat_of(20_000 / (1 + ranks[expert]) ** 1.3) for expert in experts)


def _remember(history: History) -> None:
    """A month in which something happened."""
    dice, now = random.Random(7), time.time()
    for model, name in ((digest(one), one) for one in (LLAMA, QWEN, MIXTRAL, SMOL)):
        samples = []
        for hour in range(29 * 24, 1, -1):
            shaken = dice.random() < 0.02
            health = Health.DEGRADED if shaken else Health.HEALTHY
            servers = 10 + (29 * 24 - hour) // 200 - shaken
            samples.append(
                Sample.of(model, name, now - 3600 * hour, 3600.0, health, 1, servers, 20.0 + servers, servers // 2)
            )
        history.add(samples, [], [])


@contextlib.contextmanager
def _page(browser: Browser, scheme: str, width: int, height: int) -> Iterator[Page]:
    context = browser.new_context(
        color_scheme=scheme, viewport={"width": width, "height": height}, device_scale_factor=1
    )
    yield context.new_page()
    context.close()


def _take(page: Page, name: str) -> None:
    OUTPUT.mkdir(exist_ok=True)
    page.screenshot(path=OUTPUT / name, full_page=False)
    print(OUTPUT / name, (OUTPUT / name).stat().st_size // 1024, "KB")


if __name__ == "__main__":
    with sync_playwright() as playwright:
        chromium = shutil.which("chromium") or shutil.which("google-chrome")
        launched = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for picture in PICTURES:
            picture(launched)
        launched.close()
