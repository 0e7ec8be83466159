// A Markdown text as DOM nodes, built one by one; what a model writes never becomes HTML.

import { copyButton } from "./clipboard.js";
import { element } from "./elements.js";
import { parseBlocks } from "./markdown_blocks.js";
import { parseSpans } from "./markdown_spans.js";

const HEADINGS_BELOW = 2; // the page's own headings are h1 and h2

/** Shows a text that grows: blocks that have not changed keep their nodes, and so the reader's selection. */
export class MarkdownView {
  #root;
  #shown = [];

  constructor(root) {
    this.#root = root;
  }

  /** Show this text instead of the last one. */
  show(text) {
    const blocks = parseBlocks(text).map((block) => ({ block, key: JSON.stringify({ ...block, from: 0, to: 0 }) }));
    let same = 0;
    while (same < blocks.length && blocks[same].key === this.#shown[same]?.key) same += 1;
    for (const { node } of this.#shown.splice(same)) node.remove();
    for (const { block, key } of blocks.slice(same)) {
      const node = blockNode(block);
      this.#root.append(node);
      this.#shown.push({ key, node });
    }
  }
}

function blockNode(block) {
  switch (block.kind) {
    case "heading":
      return element(`h${Math.min(6, block.level + HEADINGS_BELOW)}`, { class: `level-${block.level}` }, ...inline(block.text));
    case "code":
      return codeNode(block);
    case "rule":
      return element("hr");
    case "quote":
      return element("blockquote", {}, ...block.blocks.map(blockNode));
    case "list":
      return listNode(block);
    case "table":
      return tableNode(block);
    default:
      return element("p", {}, ...inline(block.text));
  }
}

function codeNode({ language, text }) {
  const head = element("div", { class: "code-head" }, element("span", {}, language || "text"), copyButton("Copy", () => text));
  const code = element("pre", { tabindex: "0" }, element("code", {}, text));
  return element("div", { class: "code" }, head, code);
}

function listNode({ ordered, start, items }) {
  const rows = items.map((blocks) => {
    // A single paragraph needs no paragraph around it: lists are tight.
    const [first, ...rest] = blocks;
    if (first?.kind === "paragraph") return element("li", {}, ...inline(first.text), ...rest.map(blockNode));
    return element("li", {}, ...blocks.map(blockNode));
  });
  return ordered ? element("ol", { start: start === 1 ? null : String(start) }, ...rows) : element("ul", {}, ...rows);
}

function tableNode({ aligns, header, rows }) {
  const cell = (tag, text, column) => element(tag, { class: `align-${aligns[column]}` }, ...inline(text));
  const head = element("thead", {}, element("tr", {}, ...header.map((text, column) => cell("th", text, column))));
  const body = element("tbody", {}, ...rows.map((row) => element("tr", {}, ...row.map((text, column) => cell("td", text, column)))));
  return element("div", { class: "table", tabindex: "0", role: "group", "aria-label": "Table" }, element("table", {}, head, body));
}

function inline(text) {
  return parseSpans(text).map(spanNode);
}

function spanNode(span) {
  if (typeof span === "string") return document.createTextNode(span);
  if (span.kind === "break") return element("br");
  if (span.kind === "code") return element("code", {}, span.text);
  const inner = span.spans.map(spanNode);
  if (span.kind !== "link") return element(span.kind, {}, ...inner);
  return element("a", { href: span.url, target: "_blank", rel: "noopener noreferrer nofollow" }, ...inner);
}
