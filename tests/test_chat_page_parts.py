"""The chat page's modules, imported in a real browser: event streams, Markdown, and that no model's words ever run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import new_page, start_browser
from playwright.sync_api import Page, Route

_PAGE = Path(__file__).parent.parent / "swarm" / "api" / "page"
_ORIGIN = "http://page.invalid"


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    """An empty page that can import the modules; there is no server: the browser gets the files from here."""

    def answer(route: Route) -> None:
        name = route.request.url.removeprefix(f"{_ORIGIN}/")
        if name:
            route.fulfill(path=_PAGE / name)
        else:
            route.fulfill(content_type="text/html", body="<!doctype html><title>Empty</title><body></body>")

    with start_browser() as browser, new_page(browser) as watched:
        watched.page.route(f"{_ORIGIN}/**", answer)
        watched.page.goto(f"{_ORIGIN}/")
        yield watched.page
        assert watched.errors == []


def _spans(page: Page, text: str) -> Any:
    return page.evaluate("async (text) => (await import('/markdown_spans.js')).parseSpans(text)", text)


def _blocks(page: Page, text: str) -> Any:
    blocks = page.evaluate("async (text) => (await import('/markdown_blocks.js')).parseBlocks(text)", text)
    return _without_lines(blocks)


def _without_lines(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_lines(one) for one in value]
    if isinstance(value, dict):
        return {name: _without_lines(one) for name, one in value.items() if name not in ("from", "to")}
    return value


def _paragraph(text: str) -> dict[str, str]:
    return {"kind": "paragraph", "text": text}


def _rendered(page: Page, text: str) -> str:
    """The HTML of what is shown."""
    return str(
        page.evaluate(
            """async (text) => {
                const root = document.createElement("div");
                new (await import("/markdown_view.js")).MarkdownView(root).show(text);
                document.body.replaceChildren(root);
                return root.innerHTML;
            }""",
            text,
        )
    )


def test_event_streams_cut_anywhere_give_the_same_events(page: Page) -> None:
    stream = (
        "\ufeffdata: {\"a\": 1}\n\n: keep-alive\n\ndata:no space\r\ndata:  two\r\n\r\nevent: done\rdata: x\r\r"
        "id: 3\nretry: 5\n\nunknown\ndata\n\ndata: the end is missing"
    )  # fmt: skip
    seen = page.evaluate(
        """async (stream) => {
            const { EventStreamParser } = await import("/event_stream.js");
            const all = [];
            for (let first = 0; first <= stream.length; first += 1) {
                for (const second of [first + 1, first + 7, stream.length]) {
                    const parser = new EventStreamParser();
                    const pieces = [stream.slice(0, first), stream.slice(first, second), stream.slice(second)];
                    all.push(JSON.stringify(pieces.flatMap((piece) => parser.push(piece))));
                }
            }
            return [...new Set(all)].map((one) => JSON.parse(one));
        }""",
        stream,
    )
    assert len(seen) == 1, "it depends on where the stream is cut"
    assert [(event["type"], event["data"], event["comment"]) for event in seen[0]] == [
        ("message", '{"a": 1}', False),
        ("", "keep-alive", True),
        ("message", "no space\n two", False),
        ("done", "x", False),
        ("message", "", False),
    ]


def test_blocks(page: Page) -> None:
    assert _blocks(page, "# One #\n\ntext\nmore\n## Two") == [
        {"kind": "heading", "level": 1, "text": "One"},
        _paragraph("text\nmore"),
        {"kind": "heading", "level": 2, "text": "Two"},
    ]
    code = {"kind": "code", "language": "py", "text": "a = 1\n\n    # b\n```", "closed": True}
    assert _blocks(page, "````py\na = 1\n\n    # b\n```\n````") == [code]
    assert _blocks(page, "```\nit still str") == [
        {"kind": "code", "language": "", "text": "it still str", "closed": False}
    ]
    assert _blocks(page, "> a\n> > b\n\n---") == [
        {"kind": "quote", "blocks": [_paragraph("a"), {"kind": "quote", "blocks": [_paragraph("b")]}]},
        {"kind": "rule"},
    ]
    nested = {"kind": "list", "ordered": False, "start": 1, "items": [[_paragraph("b")], [_paragraph("c")]]}
    assert _blocks(page, "3. a\n   - b\n   - c\n\n   again\n4. d\n\nend") == [
        {
            "kind": "list",
            "ordered": True,
            "start": 3,
            "items": [[_paragraph("a"), nested, _paragraph("again")], [_paragraph("d")]],
        },
        _paragraph("end"),
    ]
    fenced = {"kind": "code", "language": "", "text": "x\n  y", "closed": True}
    assert _blocks(page, "- a\n  ```\n  x\n    y\n  ```\n- b")[0]["items"] == [
        [_paragraph("a"), fenced],
        [_paragraph("b")],
    ]
    assert _blocks(page, "| a | b |\n|:-:|--:|\n| 1 \\| 2 | `x|y` | 3 |\n| only |\n\nend") == [
        {
            "kind": "table",
            "aligns": ["center", "right"],
            "header": ["a", "b"],
            "rows": [["1 | 2", "`x|y`"], ["only", ""]],
        },
        _paragraph("end"),
    ]
    assert _blocks(page, "In\n1998. It was so | so") == [_paragraph("In\n1998. It was so | so")]


def test_spans(page: Page) -> None:
    def strong(*spans: Any) -> Any:
        return {"kind": "strong", "spans": list(spans)}

    def em(*spans: Any) -> Any:
        return {"kind": "em", "spans": list(spans)}

    def link(url: str, *spans: Any) -> Any:
        return {"kind": "link", "url": url, "spans": list(spans)}

    cases: dict[str, list[Any]] = {
        "**bold *both* bold** and _em_": [strong("bold ", em("both"), " bold"), " and ", em("em")],
        "***all***": [strong(em("all"))],
        "`a * b` and ``c ` d``": [{"kind": "code", "text": "a * b"}, " and ", {"kind": "code", "text": "c ` d"}],
        "snake_case_name, 2 * 3 * 4, 5*": ["snake_case_name, 2 * 3 * 4, 5*"],
        "\\*not\\* ~~gone~~": ["*not* ", {"kind": "del", "spans": ["gone"]}],
        "one\ntwo": ["one", {"kind": "break"}, "two"],
        "[a **b**](https://x.org/(c) \"t\")": [link("https://x.org/(c)", "a ", strong("b"))],
        "see https://x.org/a_b_(c), or": ["see ", link("https://x.org/a_b_(c)", "https://x.org/a_b_(c)"), ", or"],
        "(http://y.org).": ["(", link("http://y.org", "http://y.org"), ")."],
        "<https://x.org> <b>": [link("https://x.org", "https://x.org"), " <b>"],
        "![alt](https://x.org/i.png)": [link("https://x.org/i.png", "alt")],
        "**unfinished and `too": ["**unfinished and `too"],
    }  # fmt: skip
    for text, expected in cases.items():
        assert _spans(page, text) == expected, text


def test_what_models_write_never_becomes_html_of_their_own(page: Page) -> None:
    hostile = (
        "<script>window.bad = 1</script> <img src=x onerror='window.bad = 2'>\n\n"
        "[a](javascript:window.bad=3) [b]( JaVaScRiPt:alert(1)) [c](data:text/html,x) <javascript:alert(1)> "
        "[d](https://ok.org/\"onclick=\"window.bad=4) [e](vbscript:x) ![f](x)\n\n"
        "```<b onload=x>\n</code></pre><script>window.bad = 5</script>\n```\n\n| <i>a</i> |\n|---|\n| <svg onload=x> |"
    )  # fmt: skip
    _rendered(page, hostile)
    found = page.evaluate(
        """() => ({
            bad: window.bad ?? null,
            tags: [...document.body.querySelectorAll("*")].map((one) => one.localName),
            links: [...document.links].map((one) => [one.protocol, one.rel]),
            handlers: [...document.body.querySelectorAll("*")].flatMap((one) => one.getAttributeNames())
                .filter((name) => name.startsWith("on")),
        })"""
    )
    assert found["bad"] is None
    assert not {"script", "img", "svg", "i", "b", "iframe"} & set(found["tags"])
    assert all(protocol in ("http:", "https:", "mailto:") and "noopener" in rel for protocol, rel in found["links"])
    assert found["handlers"] == []


def test_markdown_becomes_elements(page: Page) -> None:
    assert _rendered(page, "# T\n- a\n- *b*") == '<h3 class="level-1">T</h3><ul><li>a</li><li><em>b</em></li></ul>'
    assert '<th class="align-right">n</th>' in _rendered(page, "| n |\n| -: |\n| 1 |")
    _rendered(page, "```js\nlet a = '<b>';\n```")
    assert page.locator("pre code").text_content() == "let a = '<b>';"
    page.get_by_role("button", name="Copy").click()
    page.get_by_role("button", name="Copied").wait_for()
    # This origin is none that browsers trust with their clipboard: it was copied the old way.
    page.evaluate("() => document.body.append(document.createElement('textarea'))")
    page.locator("textarea").press("Control+v")
    assert page.locator("textarea").input_value() == "let a = '<b>';"


def test_a_growing_answer_keeps_what_has_not_changed(page: Page) -> None:
    kept = page.evaluate(
        """async () => {
            const root = document.createElement("div");
            const view = new (await import("/markdown_view.js")).MarkdownView(root);
            view.show("first\\n\\nsecond");
            const [first, second] = root.children;
            view.show("first\\n\\nsecond, longer\\n\\nthird");
            return [root.children[0] === first, root.children[1] === second, root.textContent];
        }"""
    )
    assert kept == [True, False, "firstsecond, longerthird"]


@pytest.mark.parametrize(
    "piece",
    ["[", "*", "**a ", "_", "`", "`` ` ", "> ", "- ", "[a](", "![", "<", "~~x", "| ", "1. ", "\\", "http://", "#"],
)
def test_no_text_takes_long(page: Page, piece: str) -> None:
    seconds = page.evaluate(
        """async ([text, lines]) => {
            const { MarkdownView } = await import("/markdown_view.js");
            const begun = performance.now();
            for (const one of [text, lines]) new MarkdownView(document.createElement("div")).show(one);
            return (performance.now() - begun) / 1000;
        }""",
        [piece * (20_000 // len(piece)), f"{piece}\n" * (20_000 // len(piece))],
    )
    assert seconds < 5, "a frame of the page must not take seconds"
