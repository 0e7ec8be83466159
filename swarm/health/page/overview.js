// The first page: what is wrong, and then everything else.

import { h } from "./dom.js";
import { drawStrip } from "./maps.js";
import { copiesInWords, donorList, incidentList, modelFigures, modelLink, stateWord } from "./pieces.js";
import { count, duration, plural } from "./words.js";

export const title = (_, context) => context.overview.headline.replace(/\.$/, "");

export function view(_, context) {
  const { overview } = context;
  return [
    h("h1", {}, overview.headline),
    h("p", { class: "lede" }, lede(overview)),
    overview.models.length ? h("div", { class: "models" }, overview.models.map((one) => modelRow(one, context.now()))) : null,
    h("div", { class: "columns" },
      h("section", {}, h("h2", {}, "Latest incidents"), incidentList(overview.incidents.slice(0, 12), context.now())),
      h("section", {}, h("h2", {}, "Top contributors, 30 days"), donorList(overview.contributors))),
    overview.history_note ? h("p", { class: "empty" }, overview.history_note) : null,
  ];
}

function lede(overview) {
  const [worst] = overview.models;
  if (worst && worst.health !== "healthy") {
    const isAlone = overview.models.filter((one) => one.health === worst.health).length === 1;
    return isAlone ? worst.reason : `${worst.name}: ${worst.reason}`;
  }
  if (!worst) return overview.connection.connected ? "As soon as a server joins, its model appears here." : "";
  const { servers, sessions } = overview.totals;
  const weakest = Math.min(...overview.models.map((one) => one.survives ?? 0));
  const survive = weakest > 0
    ? `any ${weakest === 1 ? "server" : plural(weakest, "server")} may die and nothing is lost`
    : "but some blocks have a single server: its death would break a model";
  return `${plural(servers.online, "server")} online, ${plural(sessions, "session")} under way; ${survive}.`;
}

function modelRow(model, now) {
  return h("article", { class: "model", "data-health": model.health, "data-key": model.id },
    h("h3", {}, modelLink(model), h("span", { class: "since" }, `${count(model.num_blocks)} blocks`)),
    h("p", { class: "reason" }, stateWord(model.health), " ", h("span", { class: "quiet" }, `for ${duration(now - model.since)} · `), model.reason),
    modelFigures(model),
    h("canvas", { class: "strip", role: "img", "aria-label": copiesInWords(model), "data-model": model.id }));
}

export function drawn(root, _, context) {
  for (const canvas of root.querySelectorAll("canvas.strip")) {
    const model = context.overview.models.find((one) => one.id === canvas.dataset.model);
    if (model) drawStrip(canvas, model.copies);
  }
}
