// A picture of the way that an answer takes: which servers, and where the time of a token goes.

import { element } from "./elements.js";
import { changeSettings } from "./settings.js";

const COLOURS = 6;
const PARTS = [
  ["compute", "computeMs", "computing"],
  ["queue", "queueMs", "waiting its turn"],
  ["network", "networkMs", "on the way"],
];

export class RouteView {
  #root;
  #colours = new Map();
  #summary = element("button", { type: "button", class: "route-summary", "aria-controls": "hops" });
  #track = element("span", { class: "track", "aria-hidden": "true" });
  #figures = element("span", { class: "route-figures" });
  #hops = element("ol", { "aria-label": "Servers of the route" });
  #details = element("div", { id: "hops", class: "hops", tabindex: "-1" }, this.#hops);
  #note = element("p", { class: "route-note", hidden: true });

  constructor(root, settings) {
    this.#root = root;
    this.#summary.append(this.#track, this.#figures);
    this.#details.append(element("p", { class: "legend" }, "Solid: computing. Striped: on the way."));
    root.append(this.#note, this.#summary, this.#details);
    const open = settings.routeOpen ?? matchMedia("(min-width: 60rem) and (min-height: 44rem)").matches;
    this.#open(open);
    this.#summary.addEventListener("click", () => {
      this.#open(this.#details.hidden);
      changeSettings(settings, { routeOpen: !this.#details.hidden });
    });
  }

  /** Show the route of an answer, or nothing if it is not known. */
  show(answer) {
    const route = answer?.route;
    this.#root.hidden = !route;
    if (!route) return;
    this.#root.classList.toggle("live", answer.state === "running");
    this.#track.replaceChildren(...route.hops.map((hop) => this.#segment(hop)));
    this.#figures.textContent = summaryOf(route);
    this.#hops.replaceChildren(...this.#rows(route.hops));
    this.#note.hidden = !route.recoveries;
    this.#note.textContent = route.recoveries ? recoverySentence(route.recoveries) : "";
  }

  /** Draw the eye to it for a moment. */
  flash() {
    this.#root.classList.remove("recovered");
    void this.#root.offsetWidth; // begins the animation anew
    this.#root.classList.add("recovered");
  }

  #open(open) {
    this.#details.hidden = !open;
    this.#summary.setAttribute("aria-expanded", String(open));
  }

  #segment(hop) {
    const segment = element("span", { class: `segment colour-${this.#colour(hop.peerId)}` });
    segment.style.flexGrow = Math.max(hop.totalMs, 0.1);
    if (hop.tookOver) segment.classList.add("took-over");
    return segment;
  }

  #rows(hops) {
    const longest = Math.max(...hops.map((hop) => hop.totalMs), 0.1);
    return hops.map((hop) => {
      const bar = element("span", { class: "bar", "aria-hidden": "true" });
      for (const [name, field] of PARTS) {
        const part = element("span", { class: name });
        part.style.width = `${(100 * Math.max(hop[field], 0)) / longest}%`;
        bar.append(part);
      }
      const times = PARTS.map(([, field, words]) => `${milliseconds(hop[field])} ${words}`).join(", ");
      return element(
        "li",
        { class: `hop colour-${this.#colour(hop.peerId)}`, title: `${hop.peerId}\n${times}` },
        element("span", { class: "server" }, hop.name || `…${hop.peerId.slice(-6)}`, hop.tookOver ? element("em", {}, "took over") : null),
        element("span", { class: "blocks" }, blocksOf(hop)),
        bar,
        element("span", { class: "ms" }, milliseconds(hop.totalMs), element("span", { class: "unseen" }, ` (${times})`)),
      );
    });
  }

  #colour(peerId) {
    if (!this.#colours.has(peerId)) this.#colours.set(peerId, this.#colours.size % COLOURS);
    return this.#colours.get(peerId);
  }
}

/** What to tell of recoveries. */
export function recoverySentence(recoveries) {
  return recoveries === 1
    ? "A server was lost on the way; another took over, and the answer went on."
    : `Servers were lost ${recoveries} times on the way; others took over, and the answer went on.`;
}

function summaryOf({ hops, stepMs }) {
  const servers = new Set(hops.map((hop) => hop.peerId)).size;
  return `${servers} ${servers === 1 ? "server" : "servers"} · ${milliseconds(stepMs)} a token`;
}

function blocksOf({ start, end }) {
  return end - start === 1 ? `block ${start}` : `blocks ${start}–${end - 1}`;
}

function milliseconds(ms) {
  return `${ms < 9.95 ? ms.toFixed(1) : Math.round(ms)} ms`;
}
