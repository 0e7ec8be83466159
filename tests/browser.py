"""A real browser for tests of pages, and what every page owes: no errors in its console, nothing serious by axe."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, sync_playwright

WIDE, PHONE = (1280, 840), (390, 844)
_PATIENCE_MS = 30_000


@contextlib.contextmanager
def start_browser() -> Iterator[Browser]:
    """Chromium without a window. Skips the test where there is none."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@dataclass
class Watched:
    """A page whose console is listened to."""

    page: Page
    errors: list[str] = field(default_factory=list)
    """What its console said in red, and exceptions that nobody caught."""

    def serious_findings(self) -> list[str]:
        """Of axe: what would keep people from using the page."""
        return [
            f"{found['id']}: {found['help']} at {[node['target'] for node in found['nodes']]}"
            for found in Axe().run(self.page).response["violations"]
            if found["impact"] in ("serious", "critical")
        ]

    def is_wider_than_its_window(self) -> bool:
        """Whether one has to scroll sideways."""
        # Not of `innerWidth`: on a phone that grows with what is too wide.
        root = "document.documentElement"
        return bool(self.page.evaluate(f"() => {root}.scrollWidth > {root}.clientWidth"))


@contextlib.contextmanager
def new_page(browser: Browser, size: tuple[int, int] = WIDE, scheme: str = "light") -> Iterator[Watched]:
    """A page of a visitor who has never been here."""
    width, height = size
    options: dict[str, Any] = {"viewport": {"width": width, "height": height}, "color_scheme": scheme}
    if size == PHONE:
        options |= {"has_touch": True, "is_mobile": True}
    context = browser.new_context(**options)
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    context.set_default_timeout(_PATIENCE_MS)
    watched = Watched(context.new_page())
    watched.page.on("console", lambda message: watched.errors.append(message.text) if message.type == "error" else None)
    watched.page.on("pageerror", lambda error: watched.errors.append(str(error)))
    yield watched
    context.close()
