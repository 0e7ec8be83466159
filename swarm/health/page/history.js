// The past of every model: how it was, how many servers it had, what they could do.

import { h } from "./dom.js";
import { about, hourAndMinute, plural, shortDayOf } from "./words.js";

const RANGES = [[6, "6 hours"], [24, "24 hours"], [168, "7 days"], [720, "30 days"]];
const WIDE = 270;

export const everyMs = 15000;
export const title = () => "History";
export const load = (_, context, ui) => context.fetchJson(`/api/v1/history?hours=${ui.hours ?? 24}`);

export function view(data, context, ui) {
  const chosen = ui.hours ?? 24;
  return [
    h("h1", {}, "History"),
    h("p", { class: "tools ranges" }, RANGES.map(([hours, name]) => h("button", { type: "button", "data-hours": hours, "aria-pressed": String(hours === chosen) }, name))),
    data.note ? h("p", { class: "note" }, data.note) : null,
    data.models.length ? data.models.map((one) => modelSection(one, data)) : h("p", { class: "empty" }, "Nothing has been seen in this time."),
  ];
}

export function clicked(event, context, ui, load, page) {
  const hours = event.target.closest("button")?.dataset.hours;
  if (!hours) return;
  ui.hours = Number(hours);
  page.loadedAt = 0;
  load();
}

function modelSection(model, data) {
  const { samples } = model;
  const latest = samples[samples.length - 1];
  const seen = samples.length;
  const share = (key) => samples.reduce((sum, one) => sum + one[key], 0) / Math.max(seen, 1);
  const percent = (part) => `${(100 * part).toFixed(part > 0 && part < 0.1 ? 1 : 0)}%`;
  return h("section", { class: "chart", "data-key": model.model },
    h("h2", {}, h("a", { href: `#/models/${encodeURIComponent(model.model)}` }, model.name)),
    h("p", {}, `${percent(share("healthy"))} healthy, ${percent(share("degraded"))} degraded, ${percent(share("broken"))} broken`,
      h("span", { class: "quiet" }, ` of ${plural(seen, "interval")} of ${data.interval_s / 60} min that were seen`)),
    band(samples, data),
    h("div", { class: "charts" },
      line("servers online", samples, "servers", data, latest.servers),
      line("survives deaths", samples, "survives", data, latest.survives),
      line("throughput bound, steps/s", samples, "bound_steps_per_s", data, latest.bound_steps_per_s),
      line("sessions", samples, "sessions", data, latest.sessions)));
}

const across = (at, data) => Math.max(0, (WIDE * (at - data.begin)) / (data.end - data.begin));

function band(samples, data) {
  const rects = samples.flatMap((one) => {
    const left = across(one.at, data);
    const width = Math.max(0.3, Math.min(across(one.at + data.interval_s, data), WIDE) - left);
    let top = 0;
    return ["broken", "degraded", "healthy"].filter((state) => one[state] > 0).map((state) => {
      const tall = 24 * one[state];
      const rect = h("rect", { x: left, y: top, width, height: tall, class: `band-${state}` });
      top += tall;
      return rect;
    });
  });
  return h("svg", { viewBox: `0 0 ${WIDE} 24`, preserveAspectRatio: "none", class: "band", role: "img", "aria-label": "Health over time" }, rects);
}

function line(name, samples, key, data, latest) {
  const tall = 84;
  const top = 16;
  const most = Math.max(1, ...samples.map((one) => one[key]));
  const least = Math.min(0, ...samples.map((one) => one[key]));
  const y = (value) => top + (tall - top) * (1 - (value - least) / (most - least));
  let path = "";
  let before = null;
  for (const one of samples) {
    const isGap = before === null || one.at - before > 1.5 * data.interval_s;
    const middle = Math.min(across(one.at + data.interval_s / 2, data), WIDE);
    path += `${isGap ? "M" : "L"}${middle.toFixed(1)} ${y(one[key]).toFixed(1)}`;
    if (isGap) path += `L${(middle + 0.5).toFixed(1)} ${y(one[key]).toFixed(1)}`;
    before = one.at;
  }
  const label = data.end - data.begin > 2 * 86400 ? shortDayOf : hourAndMinute;
  return h("div", {},
    h("h4", {}, name, h("b", {}, about(Math.max(latest, 0)))),
    h("svg", { viewBox: `0 0 ${WIDE} ${tall + 16}`, role: "img", "aria-label": `${name}: at most ${about(most)}, now ${about(Math.max(latest, 0))}` },
      h("line", { x1: 0, x2: WIDE, y1: y(0), y2: y(0), class: "axis" }),
      h("path", { d: path, class: "line" }),
      h("text", { x: 0, y: 9 }, about(most)),
      h("text", { x: 0, y: tall + 14 }, label(data.begin)),
      h("text", { x: WIDE, y: tall + 14, "text-anchor": "end" }, "now")));
}
