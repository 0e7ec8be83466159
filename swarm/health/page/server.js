// One server: what it hosts, how it is, and since when.

import { h } from "./dom.js";
import { figure, incidentList, stateWord } from "./pieces.js";
import { count, dayOf, duration, hosted, inMemory, rate, timeOfDay } from "./words.js";

export const everyMs = 1500;
export const load = (id, context) => context.fetchJson(`/api/v1/servers/${encodeURIComponent(id)}`);
export const title = (data) => (data ? data.name : "Unknown server");

export function view(data, context) {
  if (!data) return [h("h1", {}, "This server is not known"), h("p", { class: "lede" }, "It has not been seen for 30 days. ", h("a", { href: "#/" }, "Overview"))];
  const now = context.now();
  return [
    h("p", { class: "crumb" }, h("a", { href: "#/" }, "Overview"), " / server"),
    h("h1", {}, data.name),
    h("p", { class: "lede mono" }, data.id),
    h("dl", { class: "figures large" },
      figure("first seen", duration(now - data.first_seen), "ago"),
      figure("uptime since then", data.uptime === null ? "–" : `${(100 * data.uptime).toFixed(data.uptime > 0.995 ? 1 : 0)}%`),
      figure("online, as watched", duration(data.online_s)),
      figure("donated, 30 days", rate(data.block_hours), "block-hours")),
    data.hosts.length ? data.hosts.map((one) => hostSection(one, context)) : h("p", { class: "empty" }, `It is gone; last seen ${dayOf(data.last_seen)}, ${timeOfDay(data.last_seen)}.`),
    h("section", {}, h("h2", {}, "What happened"), incidentList(data.incidents, now)),
  ];
}

function hostSection(server, context) {
  const model = context.overview.models.find((one) => one.id === server.model);
  return h("section", {},
    h("h2", {}, "Hosts"),
    h("p", { class: "lede" }, stateWord(server.condition), ` for ${duration(context.now() - server.since)} · `,
      h("a", { href: `#/models/${encodeURIComponent(server.model)}` }, model?.name ?? "a model"),
      server.start !== null ? `, blocks ${hosted(server)}${model ? ` of ${model.num_blocks}` : ""}${inMemory(server)}` : `, ${hosted(server)}`),
    h("dl", { class: "figures large" },
      server.steps_per_s !== null ? figure("speed", rate(server.steps_per_s), "steps/s") : figure("speed", rate(server.rows_per_s), "rows/s"),
      figure(server.start !== null ? "sessions" : "calls", count(server.sessions)),
      server.free_kv_tokens !== null ? figure("free cache", count(server.free_kv_tokens), "tokens") : null,
      figure("reached in", server.latency_ms !== null ? rate(server.latency_ms) : "no answer", server.latency_ms !== null ? "ms" : null, { warn: server.latency_ms === null }),
      figure("precision", server.precision),
      figure("version", server.version),
      figure("moves", count(server.moves))));
}
