// Parts that several pages are made of.

import { h } from "./dom.js";
import { count, dayOf, duration, isoTime, plural, rate, timeOfDay } from "./words.js";

const DOTS = {
  server_died: "dead", model_broken: "broken", model_degraded: "degraded", model_healthy: "healthy",
  server_returned: "healthy", server_appeared: "healthy", model_found: "left", server_left: "left", server_moved: "left",
};

export const stateWord = (word) => h("span", { class: `state ${word}` }, word);

export const modelLink = (model) => h("a", { href: `#/models/${encodeURIComponent(model.id)}` }, model.name);

export function figure(name, value, unit, { warn = false } = {}) {
  return h("div", {}, h("dt", {}, name), h("dd", { class: warn ? "warn" : null }, value, unit ? h("small", {}, unit) : null));
}

export function survival(model) {
  if (model.survives === null) return figure("survives", "–");
  return figure("survives", count(model.survives), model.survives === 1 ? "death" : "deaths", { warn: model.survives === 0 });
}

export function modelFigures(model, large = false) {
  return h("dl", { class: large ? "figures large" : "figures" },
    survival(model),
    figure("at most", rate(model.bound_steps_per_s), "steps/s"),
    figure("sessions", count(model.sessions)),
    figure("servers", count(model.servers.online), serversAside(model.servers)));
}

function serversAside(servers) {
  const parts = ["joining", "draining", "unreachable", "dead"].filter((one) => servers[one]).map((one) => `${servers[one]} ${one}`);
  return parts.length ? parts.join(", ") : null;
}

export function copiesInWords(model) {
  const without = model.copies.filter((one) => one === 0).length;
  const single = model.copies.filter((one) => one === 1).length;
  return `${plural(model.num_blocks, "block")}: ${without} without a server, ${single} with a single one`;
}

export function incidentList(incidents, now, { days = false } = {}) {
  if (!incidents.length) return h("p", { class: "empty" }, "Nothing has happened yet.");
  const items = [];
  let shownDay = null;
  for (const one of incidents) {
    if (days && dayOf(one.at) !== shownDay) {
      shownDay = dayOf(one.at);
      items.push(h("li", { class: "day" }, shownDay));
    }
    const age = now - one.at;
    const when = days || age > 6 * 3600 ? timeOfDay(one.at) : `${duration(age)} ago`;
    const target = one.server ? `#/servers/${encodeURIComponent(one.server)}` : `#/models/${encodeURIComponent(one.model)}`;
    items.push(h("li", {},
      h("time", { datetime: isoTime(one.at), title: `${dayOf(one.at)}, ${timeOfDay(one.at)}` }, when),
      h("span", {}, h("span", { class: `dot ${DOTS[one.kind] ?? "left"}`, "aria-hidden": "true" }),
        one.text, " ", h("a", { href: target, "aria-label": `more about ${one.server ? one.server_name : one.model_name}` }, "more"))));
  }
  return h("ol", { class: "incidents" }, items);
}

export function donorList(donors) {
  if (!donors.length) return h("p", { class: "empty" }, "Nobody yet.");
  const most = Math.max(...donors.map((one) => one.block_hours), 1e-9);
  return h("ol", { class: "donors" }, donors.map((one) => h("li", {},
    h("span", { class: one.is_named ? "name" : "name quiet" }, one.name, one.servers > 1 ? h("span", { class: "quiet" }, ` · ${one.servers} servers`) : null),
    h("span", {}, rate(one.block_hours), h("span", { class: "quiet" }, " block-hours")),
    h("span", { class: "share", "aria-hidden": "true" }, h("svg", { viewBox: "0 0 100 3", preserveAspectRatio: "none" }, h("rect", { width: (100 * one.block_hours) / most, height: 3 }))))));
}
