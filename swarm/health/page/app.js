// The pages: which one is shown, and what it shows whenever something has changed.

import { h, morph } from "./dom.js";
import { fetchJson, follow } from "./live.js";
import { duration } from "./words.js";
import * as contributors from "./contributors.js";
import * as history from "./history.js";
import * as incidents from "./incidents.js";
import * as model from "./model.js";
import * as overviewPage from "./overview.js";
import * as server from "./server.js";

const ROUTES = [
  [/^#\/models\/([^/]+)$/, model],
  [/^#\/servers\/([^/]+)$/, server],
  [/^#\/incidents$/, incidents],
  [/^#\/history$/, history],
  [/^#\/contributors$/, contributors],
];

const content = document.getElementById("content");
const live = document.getElementById("live");
let overview = null;
let page = null;
let connection = "connecting";
let clockAhead = 0;

/** What a page may use. `now` is by the dashboard's clock. */
const context = {
  get overview() { return overview; },
  now: () => Date.now() / 1000 + clockAhead,
  fetchJson,
  redraw: () => show(),
};

function route() {
  if (location.hash === "#content") return;
  const [match, module] = ROUTES.map(([pattern, one]) => [location.hash.match(pattern), one]).find(([found]) => found)
    ?? [[], overviewPage];
  page = { module, argument: match[1] ? decodeURIComponent(match[1]) : null, data: undefined, loadedAt: 0, ui: {} };
  for (const link of document.querySelectorAll("nav a")) {
    const isHere = link.getAttribute("href") === (location.hash || "#/");
    if (isHere) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  content.replaceChildren(h("p", { class: "empty" }, "Loading…"));
  scrollTo(0, 0);
  load();
}

/** Fetch what the page needs, unless that was done a moment ago, and show it. */
async function load() {
  const here = page;
  if (here.module.load && Date.now() - here.loadedAt >= (here.module.everyMs ?? 0) && !here.loading) {
    here.loading = true;
    try {
      here.data = await here.module.load(here.argument, context, here.ui);
      here.loadedAt = Date.now();
    } catch (error) {
      if (here.data === undefined) here.failed = String(error.message ?? error);
    } finally {
      here.loading = false;
    }
  }
  if (here === page) show();
}

function show() {
  if (!overview || (page.module.load && page.data === undefined)) {
    if (page.failed) morph(content, h("main", {}, h("p", { class: "note" }, `This page could not be loaded: ${page.failed}`)));
    return;
  }
  const view = page.module.view(page.data, context, page.ui, page.argument);
  const body = h("main", {}, overview.connection.note ? h("p", { class: "note" }, overview.connection.note) : null, view);
  morph(content, body);
  page.module.drawn?.(content, page.data, context, page.ui);
  const title = page.module.title(page.data, context);
  document.title = title ? `${title} · Swarm health` : "Swarm health";
  content.setAttribute("data-sequence", overview.sequence);
}

function showConnection() {
  if (connection === "lost") live.textContent = "The dashboard does not answer";
  else if (overview?.at) live.textContent = `Live · looked ${duration(context.now() - overview.at)} ago`;
  else live.textContent = "Connecting…";
  live.dataset.state = connection;
}

let worstBefore = null;
function showHealth() {
  const worst = overview.connection.connected && overview.models.length ? overview.models[0].health : "unknown";
  document.body.dataset.health = worst;
  document.getElementById("favicon").href = `/page/${worst}.svg`;
  if (worstBefore !== null && worstBefore !== overview.headline) {
    document.getElementById("announcer").textContent = overview.headline;
  }
  worstBefore = overview.headline;
}

content.addEventListener("click", (event) => page.module.clicked?.(event, context, page.ui, load, page));
content.addEventListener("input", (event) => page.module.typed?.(event, context, page.ui));
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault();
  content.focus();
});
addEventListener("hashchange", route);
let resizing = 0;
addEventListener("resize", () => {
  cancelAnimationFrame(resizing);
  resizing = requestAnimationFrame(show);
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", show);
setInterval(showConnection, 1000);

route();
follow((latest) => {
  overview = latest;
  if (latest.at) clockAhead = Math.max(latest.at - Date.now() / 1000, Math.min(clockAhead, 0));
  showHealth();
  showConnection();
  load();
}, (state) => {
  connection = state;
  showConnection();
});
