// Who donates.

import { h } from "./dom.js";
import { donorList } from "./pieces.js";

export const title = () => "Contributors";

export function view(_, context) {
  return [
    h("h1", {}, "Contributors"),
    h("p", { class: "lede" }, "Blocks hosted, times hours, within 30 days, as this dashboard saw it. Who wants to be named starts a server with ",
      h("span", { class: "mono" }, "--public-name"), "; everybody else is anonymous."),
    h("section", {}, h("h2", {}, "Most block-hours"), donorList(context.overview.contributors)),
    context.overview.history_note ? h("p", { class: "empty" }, context.overview.history_note) : null,
  ];
}
