// What is inside a line of Markdown (code, emphasis, links), as values. No DOM here.

const MOST_NESTED = 12;
const LONGEST_LINK = 2048; // its label, and its URL
const ESCAPABLE = /[!-/:-@[-`{-~]/;
const WORD = /[\p{L}\p{N}]/u;
const URL_IN_TEXT = /^https?:\/\/[^\s<>"`]+/i;
const AUTOLINK = /^<((?:https?:\/\/|mailto:)[^\s<>]+)>/i;
const DELIMITERS = [
  ["***", ["strong", "em"]],
  ["___", ["strong", "em"]],
  ["**", ["strong"]],
  ["__", ["strong"]],
  ["~~", ["del"]],
  ["*", ["em"]],
  ["_", ["em"]],
];

/**
 * Spans of a text: strings, {kind: "break"}, {kind: "code", text}, {kind: "strong" | "em" | "del", spans},
 * {kind: "link", url, spans}. URLs are safe to follow: http, https and mailto only; images become links.
 */
export function parseSpans(text) {
  return spansOf(text, 0, false);
}

/** The URL if it is safe to follow, else null. */
export function safeUrl(url) {
  const cleaned = url.trim();
  return /^(?:https?:\/\/|mailto:)/i.test(cleaned) && URL.canParse(cleaned) ? cleaned : null;
}

function spansOf(text, depth, inLink) {
  const spans = [];
  const hopeless = new Set(); // what has no closing end in the rest of the text: looked for once only
  let plain = "";
  let at = 0;

  const flush = () => {
    if (plain) spans.push(plain);
    plain = "";
  };
  const add = (span, to) => {
    flush();
    spans.push(span);
    at = to;
  };

  while (at < text.length) {
    const found = depth < MOST_NESTED ? spanAt(text, at, depth, inLink, hopeless) : null;
    if (found) add(found.span, found.to);
    else if (text[at] === "\\" && ESCAPABLE.test(text[at + 1] ?? "")) {
      plain += text[at + 1];
      at += 2;
    } else if (text[at] === "\n") {
      plain = plain.trimEnd();
      add({ kind: "break" }, at + 1);
    } else {
      // A run of the same mark is text as a whole.
      const run = /^(`+|\*+|_+|~+)/.exec(text.slice(at, at + 64))?.[0] ?? text[at];
      plain += run;
      at += run.length;
    }
  }
  flush();
  return spans;
}

function spanAt(text, at, depth, inLink, hopeless) {
  switch (text[at]) {
    case "`":
      return codeAt(text, at, hopeless);
    case "*":
    case "_":
    case "~":
      return emphasisAt(text, at, depth, inLink, hopeless);
    case "!":
      return text[at + 1] === "[" && !inLink ? linkAt(text, at + 1, depth) : null;
    case "[":
      return inLink ? null : linkAt(text, at, depth);
    case "<":
      return inLink ? null : autolinkAt(text, at);
    case "h":
    case "H":
      return inLink ? null : bareUrlAt(text, at);
    default:
      return null;
  }
}

function codeAt(text, at, hopeless) {
  const ticks = /^`+/.exec(text.slice(at))[0];
  if (hopeless.has(ticks)) return null;
  const end = endOfCode(text, at, ticks);
  if (end < 0) {
    hopeless.add(ticks);
    return null;
  }
  let inner = text.slice(at + ticks.length, end - ticks.length).replace(/\n/g, " ");
  if (/^ .*[^ ].* $/.test(inner)) inner = inner.slice(1, -1);
  return { span: { kind: "code", text: inner }, to: end };
}

/** Where the code that begins at `at` ends, or -1. */
function endOfCode(text, at, ticks) {
  for (let next = text.indexOf(ticks, at + ticks.length); next >= 0; ) {
    let end = next;
    while (text[end] === "`") end += 1;
    if (end - next === ticks.length) return end;
    next = text.indexOf(ticks, end);
  }
  return -1;
}

function emphasisAt(text, at, depth, inLink, hopeless) {
  for (const [mark, kinds] of DELIMITERS) {
    if (!text.startsWith(mark, at) || hopeless.has(mark)) continue;
    const begin = at + mark.length;
    if (begin >= text.length || /\s/.test(text[begin])) continue;
    if (mark[0] === "_" && WORD.test(text[at - 1] ?? "")) continue;
    const end = closing(text, begin, mark);
    if (end < 0) {
      hopeless.add(mark);
      continue;
    }
    const inner = spansOf(text.slice(begin, end), depth + 1, inLink);
    const span = kinds.reduceRight((spans, kind) => [{ kind, spans }], inner)[0];
    return { span, to: end + mark.length };
  }
  return null;
}

/** Where the mark that closes what begins at `begin` is, or -1. Code and escaped characters are passed over. */
function closing(text, begin, mark) {
  for (let at = begin; at < text.length; ) {
    if (text[at] === "\\") {
      at += 2;
      continue;
    }
    if (text[at] === "`") {
      const ticks = /^`+/.exec(text.slice(at, at + 64))[0];
      const end = endOfCode(text, at, ticks);
      at = end < 0 ? at + ticks.length : end;
      continue;
    }
    if (text[at] !== mark[0]) {
      at += 1;
      continue;
    }
    let end = at;
    while (text[end] === mark[0]) end += 1;
    const run = end - at;
    const closes = at > begin && !/\s/.test(text[at - 1]) && !(mark[0] === "_" && WORD.test(text[end] ?? ""));
    // A run that is longer closes what is inside first; one that only opens something is passed over.
    if (closes && run === mark.length) return at;
    if (closes && run > mark.length) return end - mark.length;
    at = end;
  }
  return -1;
}

function linkAt(text, at, depth) {
  const middle = closingBracket(text, at, "[", "]");
  if (middle < 0 || text[middle + 1] !== "(") return null;
  const end = closingBracket(text, middle + 1, "(", ")");
  if (end < 0) return null;
  const [, angled, bare] = /^\s*(?:<([^<>\n]*)>|(\S*))(?:\s+(?:"[^]*"|'[^]*'))?\s*$/.exec(text.slice(middle + 2, end)) ?? [];
  const url = safeUrl(angled ?? bare ?? "");
  const label = text.slice(at + 1, middle);
  const spans = spansOf(label || url || "", depth + 1, true);
  // What cannot be followed is shown, not hidden.
  return url ? { span: { kind: "link", url, spans }, to: end + 1 } : null;
}

function closingBracket(text, at, open, close) {
  let nested = 0;
  for (let next = at; next < Math.min(text.length, at + LONGEST_LINK); next += 1) {
    if (text[next] === "\\") next += 1;
    else if (text[next] === open) nested += 1;
    else if (text[next] === close && (nested -= 1) === 0) return next;
  }
  return -1;
}

function autolinkAt(text, at) {
  const match = AUTOLINK.exec(text.slice(at, at + LONGEST_LINK));
  const url = match && safeUrl(match[1]);
  return url ? { span: { kind: "link", url, spans: [match[1]] }, to: at + match[0].length } : null;
}

function bareUrlAt(text, at) {
  if (WORD.test(text[at - 1] ?? "")) return null;
  const match = URL_IN_TEXT.exec(text.slice(at, at + LONGEST_LINK));
  if (!match) return null;
  let shown = match[0].replace(/[.,;:!?'*_~\]]+$/, "");
  while (shown.endsWith(")") && shown.split(")").length > shown.split("(").length) shown = shown.slice(0, -1);
  const url = safeUrl(shown);
  return url ? { span: { kind: "link", url, spans: [shown] }, to: at + shown.length } : null;
}
