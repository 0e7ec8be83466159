// The blocks of a Markdown text (headings, lists, code, quotes, tables, paragraphs), as values. No DOM here.
//
// After CommonMark and GitHub's tables, as far as language models write them. HTML is text like any other. Every
// text has blocks, also one that is cut off anywhere, as it is while it streams.

const MOST_NESTED = 12;

const FENCE = /^( {0,3})(`{3,}|~{3,})\s*([^\s`]*)[^`]*$/;
const HEADING = /^ {0,3}(#{1,6})(?:\s+(.*?))?(?:\s+#+)?\s*$/;
const RULE = /^ {0,3}([-*_])(?:\s*\1){2,}\s*$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)(?:([-*+])|(\d{1,9})[.)])(?:( +)|$)(.*)$/;
const DELIMITER_CELL = /^\s*(:?)-+(:?)\s*$/;

/**
 * Blocks of a text: {kind, from, to, …}, lines [from, to), and by kind
 * heading {level, text}, code {language, text, closed}, rule {}, quote {blocks}, paragraph {text},
 * list {ordered, start, items: [blocks]}, table {aligns, header: [text], rows: [[text]]}.
 */
export function parseBlocks(text) {
  return blocksOf(text.replace(/\r\n?/g, "\n").replace(/\t/g, "    ").split("\n"), 0);
}

function blocksOf(lines, depth) {
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    if (!lines[at].trim()) {
      at += 1;
      continue;
    }
    const block = blockAt(lines, at, depth);
    blocks.push({ ...block, from: at });
    at = block.to;
  }
  return blocks;
}

function blockAt(lines, at, depth) {
  const line = lines[at];
  let match;
  if ((match = FENCE.exec(line))) return codeAt(lines, at, match);
  if ((match = HEADING.exec(line))) return { kind: "heading", level: match[1].length, text: match[2] ?? "", to: at + 1 };
  if (RULE.test(line)) return { kind: "rule", to: at + 1 };
  if (depth < MOST_NESTED) {
    if (QUOTE.test(line)) return quoteAt(lines, at, depth);
    if (ITEM.test(line)) return listAt(lines, at, depth);
  }
  return tableAt(lines, at) ?? paragraphAt(lines, at, depth);
}

function codeAt(lines, at, [, indent, fence, language]) {
  const code = [];
  for (let next = at + 1; next < lines.length; next += 1) {
    const line = lines[next].trim();
    if (line.length >= fence.length && line === fence[0].repeat(line.length)) {
      return { kind: "code", language, text: code.join("\n"), closed: true, to: next + 1 };
    }
    code.push(withoutIndent(lines[next], indent.length));
  }
  return { kind: "code", language, text: code.join("\n"), closed: false, to: lines.length };
}

function quoteAt(lines, at, depth) {
  const inner = [];
  let next = at;
  for (; next < lines.length && lines[next].trim(); next += 1) {
    // A paragraph of a quote may go on without the mark.
    if (!QUOTE.test(lines[next]) && beginsBlock(lines[next])) break;
    inner.push(lines[next].replace(QUOTE, ""));
  }
  return { kind: "quote", blocks: blocksOf(inner, depth + 1), to: next };
}

function listAt(lines, at, depth) {
  const first = ITEM.exec(lines[at]);
  const ordered = first[3] !== undefined;
  const items = [];
  let next = at;
  while (next < lines.length) {
    const match = ITEM.exec(lines[next]);
    const same = match && match[1].length < first[1].length + 2 && (match[3] !== undefined) === ordered;
    if (!same || RULE.test(lines[next])) break;
    const marker = match[2] ?? `${match[3]}.`;
    const indent = match[1].length + marker.length + Math.min(match[4]?.length ?? 1, 4);
    const inner = [match[5]];
    next += 1;
    for (; next < lines.length; next += 1) {
      const line = lines[next];
      if (!line.trim()) {
        // An empty line belongs to the item if what follows does.
        const following = lines.slice(next + 1, next + 3).find((one) => one.trim());
        if (following === undefined || indentOf(following) < Math.min(indent, match[1].length + 2)) break;
      } else if (indentOf(line) < match[1].length + 2) {
        // So little indented: only a paragraph's next line.
        if (ITEM.test(line) || beginsBlock(line) || !inner.at(-1).trim()) break;
      }
      inner.push(withoutIndent(line, indent));
    }
    items.push(blocksOf(inner, depth + 1));
    while (next < lines.length && !lines[next].trim() && ITEM.test(lines[next + 1] ?? "")) next += 1;
  }
  return { kind: "list", ordered, start: ordered ? Number(first[3]) : 1, items, to: next };
}

function tableAt(lines, at) {
  if (!lines[at].includes("|") || at + 1 >= lines.length) return null;
  const header = cellsOf(lines[at]);
  const delimiters = cellsOf(lines[at + 1]).map((cell) => DELIMITER_CELL.exec(cell));
  if (!lines[at + 1].includes("-") || delimiters.length !== header.length || !delimiters.every(Boolean)) return null;
  const aligns = delimiters.map(([, left, right]) => (right ? (left ? "center" : "right") : "left"));
  const rows = [];
  let next = at + 2;
  for (; next < lines.length && lines[next].includes("|"); next += 1) {
    const cells = cellsOf(lines[next]);
    rows.push(header.map((_, column) => cells[column] ?? ""));
  }
  return { kind: "table", aligns, header, rows, to: next };
}

function paragraphAt(lines, at, depth) {
  let next = at + 1;
  while (next < lines.length && lines[next].trim()) {
    if (beginsBlock(lines[next]) || (depth < MOST_NESTED && beginsList(lines[next])) || tableAt(lines, next)) break;
    next += 1;
  }
  const text = lines.slice(at, next).map((line) => line.trim()).join("\n");
  return { kind: "paragraph", text, to: next };
}

function beginsBlock(line) {
  return FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line);
}

/** Whether a list may interrupt a paragraph here: numbers at a line's start are mostly numbers, unless it is 1. */
function beginsList(line) {
  const match = ITEM.exec(line);
  return match !== null && match[5].trim() !== "" && (match[3] === undefined || match[3] === "1");
}

function cellsOf(line) {
  const cells = [""];
  const inner = line.trim().replace(/^\|/, "").replace(/\|$/, "");
  let inCode = false;
  for (let at = 0; at < inner.length; at += 1) {
    if (inner[at] === "`") inCode = !inCode;
    if (inner[at] === "\\" && inner[at + 1] === "|") {
      cells[cells.length - 1] += "|";
      at += 1;
    } else if (inner[at] === "|" && !inCode) cells.push("");
    else cells[cells.length - 1] += inner[at];
  }
  return cells.map((cell) => cell.trim());
}

function indentOf(line) {
  return line.length - line.trimStart().length;
}

function withoutIndent(line, most) {
  return line.slice(Math.min(indentOf(line), most));
}
