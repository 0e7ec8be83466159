// The table of a model's servers: sorted, filtered, and short until all are asked for.

import { h } from "./dom.js";
import { stateWord } from "./pieces.js";
import { count, hosted, plural, rate } from "./words.js";

const SHOWN = 100;
const WORST_FIRST = ["dead", "unreachable", "draining", "joining", "online", "left"];
const COLUMNS = [
  ["name", "server", (one) => one.name.toLowerCase()],
  ["blocks", "blocks", (one) => one.start ?? 1e6],
  ["condition", "state", (one) => WORST_FIRST.indexOf(one.condition)],
  ["speed", "steps/s", (one) => one.steps_per_s ?? one.rows_per_s ?? -1, "n"],
  ["sessions", "sessions", (one) => one.sessions, "n"],
  ["free", "free KV", (one) => one.free_kv_tokens ?? -1, "n"],
  ["latency", "latency", (one) => one.latency_ms ?? 1e9, "n"],
  ["precision", "precision", (one) => one.precision],
  ["version", "version", (one) => one.version],
];

export function sortedBy(ui, column) {
  ui.descending = ui.sort === column ? !ui.descending : false;
  ui.sort = column;
}

export function serverTable(servers, ui) {
  const wanted = (ui.filter ?? "").trim().toLowerCase();
  const found = servers.filter((one) => !wanted || `${one.name} ${one.id} ${one.condition} ${one.precision} ${one.version}`.toLowerCase().includes(wanted));
  const sort = ui.sort ?? "condition";
  const value = COLUMNS.find(([key]) => key === sort)[2];
  const sign = ui.descending ? -1 : 1;
  found.sort((one, other) => {
    const [left, right] = [value(one), value(other)];
    return left < right ? -sign : left > right ? sign : (one.start ?? 1e6) - (other.start ?? 1e6);
  });
  const shown = ui.all ? found : found.slice(0, SHOWN);
  return h("section", {},
    h("h2", {}, "Servers"),
    h("div", { class: "tools" },
      h("input", { type: "search", placeholder: "Name, state, version…", "aria-label": "Filter servers", "data-key": "filter" }),
      h("span", { class: "quiet" }, wanted ? `${count(found.length)} of ${plural(servers.length, "server")}` : plural(servers.length, "server")),
      found.length > SHOWN ? h("button", { type: "button", "data-all": true }, ui.all ? `Show ${SHOWN}` : `Show all ${count(found.length)}`) : null),
    h("div", { class: "wide", tabindex: "0", role: "region", "aria-label": "Table of servers" },
      h("table", {},
        h("thead", {}, h("tr", {}, COLUMNS.map(([key, name, , kind]) => h("th", {
          scope: "col", class: kind, "aria-sort": key === sort ? (ui.descending ? "descending" : "ascending") : null,
        }, h("button", { type: "button", "data-sort": key }, name))))),
        h("tbody", {}, shown.map(row)))));
}

function row(server) {
  return h("tr", {},
    h("td", {}, h("a", { href: `#/servers/${encodeURIComponent(server.id)}`, class: "who", title: server.id }, server.name)),
    h("td", {}, hosted(server)),
    h("td", {}, stateWord(server.condition)),
    h("td", { class: "n" }, server.steps_per_s !== null ? rate(server.steps_per_s) : server.rows_per_s !== null ? `${rate(server.rows_per_s)} rows` : "–"),
    h("td", { class: "n" }, count(server.sessions)),
    h("td", { class: "n" }, server.free_kv_tokens !== null ? count(server.free_kv_tokens) : "–"),
    h("td", { class: "n" }, server.latency_ms !== null ? `${rate(server.latency_ms)} ms` : "–"),
    h("td", {}, server.precision),
    h("td", {}, server.version));
}
