// One model: its blocks, its experts, its servers.

import { h } from "./dom.js";
import { byCopies, byDemand, drawBlockMap, drawExpertMap, interactive, serverTip } from "./maps.js";
import { copiesInWords, modelFigures, stateWord } from "./pieces.js";
import { count, duration, plural } from "./words.js";
import { serverTable, sortedBy } from "./table.js";

export const load = (id, context) => context.fetchJson(`/api/v1/models/${encodeURIComponent(id)}`);
export const title = (data) => (data ? `${data.model.name} is ${data.model.health}` : "Unknown model");

export function view(data, context, ui) {
  if (!data) return [h("h1", {}, "This model is not watched"), h("p", { class: "lede" }, "Nobody has hosted it for a day. ", h("a", { href: "#/" }, "All models"))];
  const { model, servers } = data;
  return [
    h("p", { class: "crumb" }, h("a", { href: "#/" }, "Overview"), " / model"),
    h("h1", {}, model.name),
    h("p", { class: "lede" }, stateWord(model.health), ` for ${duration(context.now() - model.since)}. ${model.reason}`),
    modelFigures(model, true),
    h("section", { class: "map" },
      h("h2", {}, "Servers by blocks"),
      h("div", { class: "map-scroll", tabindex: "0", role: "region", "aria-label": "Block map; the table below says the same" },
        h("canvas", { class: "blocks", role: "img", "aria-label": `${copiesInWords(model)}; ${plural(servers.length, "server")}` })),
      h("p", { class: "legend" },
        swatch("c0", "no server"), swatch("c1", "1"), swatch("c2", "2"), swatch("c3", "3"), swatch("c4", "4 or more"),
        swatch("bar", "online"), swatch("gone", "dead"), swatch("amber", "leaving or unreachable"), swatch("loading", "loading"))),
    model.experts ? expertSection(data) : null,
    Object.keys(data.expert_shares).length ? demandSection(data) : null,
    serverTable(servers, ui),
    h("p", { class: "empty" }, "Precisions: ", Object.entries(model.precisions).map(([name, number]) => `${name} (${count(number)})`).join(", ") || "none",
      h("br"), "Digest: ", h("span", { class: "mono" }, model.id)),
  ];
}

function expertSection({ model }) {
  const { experts } = model;
  const missing = experts.missing ? `, ${plural(experts.missing, "of them")} hosted by nobody` : "";
  return h("section", { class: "map" },
    h("h2", {}, "Servers by experts"),
    h("p", { class: "quiet" }, `${count(experts.experts)} routed experts in ${plural(experts.blocks, "block")}${missing}. A column is a block, a row an expert.`),
    h("div", { class: "map-scroll", tabindex: "0", role: "region", "aria-label": "Heat map of experts" },
      h("canvas", { class: "experts", role: "img", "aria-label": `The worst expert has ${plural(experts.fewest_copies, "server")} of its own` })));
}

function demandSection({ expert_shares: shares }) {
  const hottest = Math.max(...Object.values(shares).flat());
  return h("section", { class: "map" },
    h("h2", {}, "Demand by experts"),
    h("p", { class: "quiet" }, "Of what a block has computed by servers of experts, each expert's share, in the last minutes."),
    h("div", { class: "map-scroll", tabindex: "0", role: "region", "aria-label": "Heat map of demand" },
      h("canvas", { class: "demand", role: "img", "aria-label": `The hottest expert is asked for ${(100 * hottest).toFixed(1)}% of its block's tokens` })));
}

const swatch = (kind, text) => h("span", {}, h("i", { class: kind }), text);

export function drawn(root, data) {
  if (!data) return;
  const blocks = root.querySelector("canvas.blocks");
  const at = drawBlockMap(blocks, data.model, data.servers);
  interactive(blocks, (x, y) => {
    const { block, server } = at(x, y);
    if (server) return { text: serverTip(server), href: `#/servers/${encodeURIComponent(server.id)}` };
    return { text: `block ${block}: ${plural(data.model.copies[block], "server")} online` };
  });
  const blocksOf = data.model.num_blocks;
  drawExperts(root.querySelector("canvas.experts"), data.expert_copies, blocksOf, byCopies,
    (copies) => `${plural(copies, "server")} of experts`);
  drawExperts(root.querySelector("canvas.demand"), data.expert_shares, blocksOf, byDemand,
    (share) => `${(100 * share).toFixed(1)}% of what the block asks for`);
}

function drawExperts(canvas, figures, numBlocks, colour, said) {
  if (!canvas || !Object.keys(figures).length) return;
  const at = drawExpertMap(canvas, figures, numBlocks, colour);
  interactive(canvas, (x, y) => {
    const found = at(x, y);
    return found && { text: `block ${found.block}, expert ${found.expert}: ${said(found.figure)}` };
  });
}

export function clicked(event, context, ui) {
  const button = event.target.closest("button");
  if (!button) return;
  if (button.dataset.sort) sortedBy(ui, button.dataset.sort);
  else if (button.dataset.all !== undefined) ui.all = !ui.all;
  context.redraw();
}

export function typed(event, context, ui) {
  ui.filter = event.target.value;
  context.redraw();
}
