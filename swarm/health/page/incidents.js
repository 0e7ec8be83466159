// What has happened within a week.

import { h } from "./dom.js";
import { incidentList } from "./pieces.js";

const HOURS = 24 * 7;

export const everyMs = 10000;
export const load = (_, context) => context.fetchJson(`/api/v1/history?hours=${HOURS}`);
export const title = () => "Incidents";

export function view(data, context) {
  const known = new Set(data.incidents.map((one) => `${one.at} ${one.text}`));
  const newer = context.overview.incidents.filter((one) => !known.has(`${one.at} ${one.text}`));
  const all = [...newer, ...data.incidents].sort((one, other) => other.at - one.at);
  return [
    h("h1", {}, "Incidents"),
    h("p", { class: "lede" }, "Servers that came, left, moved or died, and what that made of their models, within seven days."),
    incidentList(all, context.now(), { days: true }),
  ];
}
