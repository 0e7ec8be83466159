"""The chat page in a real browser, before a real gateway and a real swarm."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from browser import PHONE, WIDE, Watched, new_page, start_browser
from conftest import QUESTION, SmolLM2
from live_gateway import LiveGateway, start_gateway
from playwright.sync_api import Browser, Page, expect
from warm_start import WarmLoopback

from swarm.commands.local_swarm import LocalSwarm

_KEY = "sk-page-12345"
_TOKENS = 16
_OTHER_QUESTION = "Name a river in Europe."
_LONG_QUESTION = "Tell me a very long story about a ship."


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with start_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def gateway(
    browser: Browser, swarm: LocalSwarm, warm: WarmLoopback, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveGateway]:
    keys = tmp_path_factory.mktemp("keys") / "keys.toml"
    keys.write_text(f'[page]\nkey = "{_KEY}"\n')
    swarm.start_servers("smollm2", ["0:10", "10:20", "20:30"], "--threads", "1")
    with start_gateway(swarm, warm, "smollm2", "--api-keys", str(keys)) as gateway:
        yield gateway


def _set(page: Page, **settings: Any) -> None:
    """Fill in the settings dialog and save it."""
    page.get_by_role("button", name="Settings").click()
    dialog = page.get_by_role("dialog", name="Settings")
    labels = {"temperature": "Temperature", "tokens": "Longest answer", "key": "API key", "system": "System prompt"}
    for name, value in settings.items():
        dialog.get_by_label(labels[name]).fill(str(value))
    dialog.get_by_role("button", name="Save").click()
    expect(dialog).to_be_hidden()


def _open(watched: Watched, gateway: LiveGateway, tokens: int = _TOKENS) -> Page:
    """The page as somebody who has a key sees it; answers are greedy, and have so many tokens at most."""
    page = watched.page
    settings = f'{{"apiKey": "{_KEY}", "temperature": 0, "maxTokens": {tokens}}}'
    page.add_init_script(f"if (!localStorage['swarm-settings']) localStorage['swarm-settings'] = '{settings}'")
    page.goto(gateway.url)
    expect(page.get_by_role("combobox", name="Model")).to_have_value("smollm2")
    return page


def _ask(page: Page, question: str) -> None:
    page.get_by_label("Your question").fill(question)
    page.get_by_label("Your question").press("Enter")


def _answered(page: Page, expected: str, count: int = 1) -> None:
    """Wait for the end of the last of so many answers; it says what is expected."""
    expect(page.get_by_role("button", name="Stop")).to_be_hidden()
    expect(page.locator(".answer-text")).to_have_count(count)
    said = page.locator(".answer-text").last.inner_text()
    assert _words(said) == _words(expected)


def _words(text: str) -> list[str]:
    """Markdown's marks and the numbers of lists are no text on the page."""
    return re.findall(r"\w+", re.sub(r"^ *\d+[.)] ", "", text, flags=re.MULTILINE))


def _greedy(smollm2: SmolLM2, *contents: str) -> str:
    inputs = smollm2.chat(*contents)
    ids = smollm2.whole.generate(**inputs, do_sample=False, max_new_tokens=_TOKENS)
    return str(smollm2.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def test_a_conversation(browser: Browser, gateway: LiveGateway, smollm2: SmolLM2) -> None:
    first, other = _greedy(smollm2, QUESTION), _greedy(smollm2, _OTHER_QUESTION)
    with new_page(browser, WIDE) as watched:
        page = _open(watched, gateway)
        expect(page.get_by_text("The servers of the route can read what you write.")).to_be_visible()
        expect(page.get_by_role("heading", name="Ask the swarm.")).to_be_visible()
        assert watched.serious_findings() == []

        # It streams; the route is shown; what is copied is what the model wrote.
        question = page.get_by_label("Your question")
        expect(question).to_be_focused()
        question.press_sequentially("Write three")
        question.press("Shift+Enter")
        assert question.input_value() == "Write three\n"
        _ask(page, QUESTION)
        _answered(page, first)
        expect(page.locator(".answer .figures")).to_contain_text(f"{_TOKENS} tokens")
        hops = page.get_by_role("list", name="Servers of the route").get_by_role("listitem")
        expect(hops).to_have_count(3)
        for hop, blocks in enumerate(("blocks 0–9", "blocks 10–19", "blocks 20–29")):
            expect(hops.nth(hop)).to_contain_text(blocks)
            expect(hops.nth(hop)).to_contain_text(re.compile(r"\d ms"))
        page.locator(".answer").get_by_role("button", name="Copy").click()
        page.get_by_role("button", name="Copied").wait_for()
        assert page.evaluate("() => navigator.clipboard.readText()") == first
        assert watched.serious_findings() == []

        # It is there after a reload; the same question gets another answer, and so does another question.
        page.reload()
        _answered(page, first)
        page.get_by_role("button", name="Answer again").click()
        expect(page.locator(".answer.running")).to_be_visible()
        _answered(page, first)
        _ask(page, _OTHER_QUESTION)
        _answered(page, _greedy(smollm2, QUESTION, first, _OTHER_QUESTION), count=2)
        page.locator(".question").first.hover()
        page.get_by_role("button", name="Edit and ask again").first.click()
        page.get_by_role("textbox", name="Your question").first.fill(_OTHER_QUESTION)
        page.get_by_role("button", name="Ask again", exact=True).click()
        _answered(page, other)
        expect(page.locator(".question-text")).to_have_text([_OTHER_QUESTION])

        # Several chats: a shortcut begins one, they have names, and a deletion can be undone.
        page.keyboard.press("Control+Shift+O")
        expect(page.get_by_role("heading", name="Ask the swarm.")).to_be_visible()
        expect(question).to_be_focused()
        _ask(page, QUESTION)
        _answered(page, first)
        chats = page.get_by_role("navigation", name="Chats")
        expect(chats.get_by_role("link")).to_have_text([QUESTION, _OTHER_QUESTION])
        chats.get_by_role("button", name=f"Rename {QUESTION}").click()
        chats.get_by_label("Name of the chat").fill("The sea")
        chats.get_by_label("Name of the chat").press("Enter")
        expect(page.get_by_role("heading", level=1)).to_have_text("The sea")
        chats.get_by_role("link", name=_OTHER_QUESTION).click()
        expect(page.locator(".question-text")).to_have_text([_OTHER_QUESTION])
        chats.get_by_role("button", name=f"Delete {_OTHER_QUESTION}").click()
        expect(chats.get_by_role("link")).to_have_text(["The sea"])
        page.get_by_role("button", name="Undo").click()
        expect(chats.get_by_role("link")).to_have_count(2)
        expect(page.locator(".question-text")).to_have_text([_OTHER_QUESTION])
        page.reload()
        expect(chats.get_by_role("link")).to_have_text(["The sea", _OTHER_QUESTION])
        _answered(page, other)
        assert watched.errors == []


def test_stopping_frees_the_swarm_and_a_death_is_shown(
    browser: Browser, gateway: LiveGateway, swarm: LocalSwarm
) -> None:
    with new_page(browser, WIDE) as watched:
        page = _open(watched, gateway, tokens=400)
        _ask(page, _LONG_QUESTION)
        expect(page.locator(".answer-text")).to_have_text(re.compile(r"\w+ \w+ \w+ \w+"))
        page.keyboard.press("Escape")
        expect(page.locator(".answer .figures")).to_contain_text("stopped")
        assert gateway.idle_within_s(5), "the gateway goes on for nobody"
        stopped = page.locator(".answer-text").inner_text()
        page.reload()
        expect(page.locator(".answer-text")).to_have_text(stopped, use_inner_text=True)

        # The answer that is being made is kept by its chat, whatever is looked at meanwhile.
        page.get_by_role("button", name="Answer again").click()
        expect(page.locator(".answer-text")).to_have_text(re.compile(r"\w+ \w+ \w+ \w+"))
        swarm.start_server("smollm2", "--blocks", "20:30", "--threads", "1")
        victim = swarm.servers[2]
        expect(page.get_by_role("button", name="Stop")).to_be_visible()
        page.keyboard.press("Control+Shift+O")
        expect(page.get_by_role("heading", name="Ask the swarm.")).to_be_visible()
        page.get_by_role("link", name=_LONG_QUESTION).click()
        victim.kill()
        expect(page.locator("#route")).to_contain_text("another took over")
        hops = page.get_by_role("list", name="Servers of the route").get_by_role("listitem")
        expect(hops.nth(2)).to_contain_text("took over")
        length = len(page.locator(".answer-text").inner_text())
        expect(page.locator(".answer-text")).to_have_text(re.compile(rf"[\s\S]{{{length + 40},}}"))
        page.get_by_role("button", name="Stop").click()
        expect(page.locator(".answer .figures")).to_contain_text("1 recovery")
        assert watched.errors == []


def test_on_a_phone_in_the_dark(browser: Browser, gateway: LiveGateway, smollm2: SmolLM2) -> None:
    with new_page(browser, PHONE, "dark") as watched:
        page = _open(watched, gateway)
        _ask(page, QUESTION)
        _answered(page, _greedy(smollm2, QUESTION))
        assert not watched.is_wider_than_its_window()
        assert watched.serious_findings() == []
        chats = page.get_by_role("navigation", name="Chats")
        expect(chats).to_be_hidden()
        page.get_by_role("button", name="Chats", exact=True).tap()
        expect(chats.get_by_role("link")).to_have_text([QUESTION])
        assert watched.serious_findings() == []
        page.keyboard.press("Escape")
        expect(chats).to_be_hidden()
        expect(page.get_by_role("button", name="Chats", exact=True)).to_be_focused()
        page.get_by_role("button", name="Chats", exact=True).tap()
        chats.get_by_role("button", name="Settings").tap()
        expect(page.get_by_role("dialog", name="Settings")).to_be_visible()
        assert not watched.is_wider_than_its_window()
        assert watched.errors == []


def test_what_fails_is_said_and_can_be_tried_again(browser: Browser, gateway: LiveGateway, smollm2: SmolLM2) -> None:
    with new_page(browser, WIDE) as watched:
        page = watched.page
        page.goto(gateway.url)
        page.get_by_text("This gateway asks for an API key.").wait_for()
        page.get_by_role("button", name="Enter it").click()
        expect(page.get_by_label("API key")).to_be_focused()
        page.keyboard.press("Escape")
        _set(page, key=_KEY, temperature=0, tokens=_TOKENS, system="Answer in English.")
        expect(page.get_by_role("combobox", name="Model")).to_have_value("smollm2")

        page.context.set_offline(True)
        _ask(page, QUESTION)
        expect(page.get_by_role("alert")).to_contain_text("The gateway cannot be reached.")
        page.context.set_offline(False)
        page.get_by_role("button", name="Try again").click()
        inputs = smollm2.tokenizer.apply_chat_template(
            [{"role": "system", "content": "Answer in English."}, {"role": "user", "content": QUESTION}],
            add_generation_prompt=True, return_tensors="pt", return_dict=True,
        )  # fmt: skip
        ids = smollm2.whole.generate(**inputs, do_sample=False, max_new_tokens=_TOKENS)
        length = inputs["input_ids"].shape[1]
        _answered(page, str(smollm2.tokenizer.decode(ids[0, length:], skip_special_tokens=True)))

        _set(page, key="sk-wrong-123")
        page.get_by_text("This gateway asks for an API key.").wait_for()
        expect(page.get_by_role("combobox", name="Model")).to_be_disabled()
        expect(page.locator(".answer-text")).to_have_count(1)
