// Pictures of many blocks and servers on one canvas each: a thousand servers are one element, not eighty thousand.

import { hosted, plural, rate } from "./words.js";

const HISTOGRAM_PX = 58;
const AXIS_PX = 18;
const GAP_PX = 8;

function prepared(canvas, heightPx) {
  const ratio = Math.min(window.devicePixelRatio || 1, 2);
  const width = Math.max(1, Math.round(canvas.parentElement.clientWidth || canvas.clientWidth));
  if (canvas.width !== width * ratio || canvas.height !== Math.round(heightPx * ratio)) {
    canvas.width = width * ratio;
    canvas.height = Math.round(heightPx * ratio);
    canvas.style.height = `${heightPx}px`;
  }
  const pen = canvas.getContext("2d");
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.clearRect(0, 0, width, heightPx);
  return [pen, width];
}

function colours() {
  const style = getComputedStyle(document.documentElement);
  const of = (name) => style.getPropertyValue(`--${name}`).trim();
  return {
    copies: [0, 1, 2, 3, 4].map((number) => of(`copies-${number}`)),
    bar: of("bar"), barInk: of("bar-ink"), soft: of("soft"), rule: of("rule"), faint: of("faint"), ink: of("ink"),
    dead: of("broken"), warn: of("degraded"), font: of("sans"),
  };
}

/** The colour for what so many servers host. */
export const byCopies = (palette, copies) => palette.copies[Math.min(copies, 4)];

/** One cell a block, coloured by how many servers it has. */
export function drawStrip(canvas, copies) {
  const [pen, width] = prepared(canvas, 16);
  const palette = colours();
  const cell = width / copies.length;
  const gap = cell > 5 ? 1 : 0;
  copies.forEach((number, block) => {
    pen.fillStyle = byCopies(palette, number);
    const left = Math.round(block * cell);
    pen.fillRect(left, number === 0 ? 0 : 3, Math.max(1, Math.round((block + 1) * cell) - left - gap), number === 0 ? 16 : 10);
  });
}

/** Put spans that do not overlap into one lane, as few lanes as there are servers for the busiest block. */
export function lanesOf(servers) {
  const ends = [];
  const placed = [];
  for (const server of [...servers].sort((one, other) => one.start - other.start || other.end - one.end)) {
    let lane = ends.findIndex((end) => end <= server.start);
    if (lane < 0) lane = ends.push(0) - 1;
    ends[lane] = server.end;
    placed.push({ server, lane });
  }
  return { placed, lanes: ends.length };
}

/** Servers by blocks, with how many servers each block has above; returns what is at a point. */
export function drawBlockMap(canvas, model, servers) {
  const spans = servers.filter((one) => one.start !== null && one.condition !== "left");
  const { placed, lanes } = lanesOf(spans);
  const lanePx = Math.max(3, Math.min(24, Math.floor(460 / Math.max(lanes, 1))));
  const top = HISTOGRAM_PX + AXIS_PX + GAP_PX;
  const [pen, width] = prepared(canvas, top + Math.max(1, lanes) * lanePx);
  const palette = colours();
  const cell = width / model.num_blocks;
  const x = (block) => Math.round(block * cell);
  drawHistogram(pen, model.copies, x, palette, cell);
  drawAxis(pen, model.num_blocks, x, palette, cell, width);
  for (const { server, lane } of placed) drawBar(pen, server, x, top + lane * lanePx, lanePx, palette);
  const at = (left, y) => {
    const block = Math.min(model.num_blocks - 1, Math.max(0, Math.floor(left / cell)));
    const lane = Math.floor((y - top) / lanePx);
    const found = placed.find((one) => one.lane === lane && one.server.start <= block && block < one.server.end);
    return { block, server: found?.server ?? null };
  };
  return at;
}

function drawHistogram(pen, copies, x, palette, cell) {
  const most = Math.max(2, ...copies);
  copies.forEach((number, block) => {
    const left = x(block);
    const wide = Math.max(1, x(block + 1) - left - (cell > 5 ? 1 : 0));
    pen.fillStyle = byCopies(palette, number);
    if (number === 0) {
      pen.globalAlpha = 0.22;
      pen.fillRect(left, 0, wide, HISTOGRAM_PX);
      pen.globalAlpha = 1;
      pen.fillRect(left, HISTOGRAM_PX - 4, wide, 4);
      return;
    }
    const tall = Math.max(3, ((HISTOGRAM_PX - 14) * number) / most);
    pen.fillRect(left, HISTOGRAM_PX - tall, wide, tall);
  });
  pen.fillStyle = palette.soft;
  pen.font = `11px ${palette.font}`;
  pen.textBaseline = "top";
  pen.textAlign = "left";
  pen.fillText(`servers per block (at most ${Math.max(0, ...copies)})`, 0, 0);
}

function drawAxis(pen, blocks, x, palette, cell, width) {
  const steps = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000];
  const step = steps.find((one) => one * cell >= 34) ?? blocks;
  pen.fillStyle = palette.soft;
  pen.font = `11px ${palette.font}`;
  pen.textBaseline = "top";
  for (let block = 0; block < blocks; block += step) {
    const middle = x(block) + cell / 2;
    pen.textAlign = middle < 8 ? "left" : middle > width - 12 ? "right" : "center";
    pen.fillText(String(block), middle < 8 ? 0 : Math.min(middle, width), HISTOGRAM_PX + 4);
  }
}

function drawBar(pen, server, x, top, lanePx, palette) {
  const gap = lanePx > 5 ? 2 : lanePx > 3 ? 1 : 0.5;
  const left = x(server.start) + 0.5;
  const wide = Math.max(1, x(server.end) - x(server.start) - 1);
  const tall = lanePx - gap;
  const { condition } = server;
  if (condition === "online") {
    pen.fillStyle = palette.bar;
    pen.fillRect(left, top, wide, tall);
  } else {
    const colour = condition === "dead" ? palette.dead : condition === "joining" ? palette.soft : palette.warn;
    pen.strokeStyle = colour;
    pen.lineWidth = 1;
    pen.setLineDash(condition === "joining" ? [3, 3] : []);
    if (condition !== "joining") hatch(pen, left, top, wide, tall, colour);
    pen.strokeRect(left + 0.5, top + 0.5, Math.max(0, wide - 1), Math.max(0, tall - 1));
    pen.setLineDash([]);
  }
  if (lanePx < 14 || wide < 40) return;
  pen.save();
  pen.beginPath();
  pen.rect(left, top, wide - 6, tall);
  pen.clip();
  pen.font = `12px ${palette.font}`;
  pen.textAlign = "left";
  pen.textBaseline = "middle";
  const text = condition === "online" ? server.name : `${server.name} · ${condition}`;
  if (condition !== "online") {
    pen.fillStyle = palette.faint;
    pen.fillRect(left + 4, top + 2, pen.measureText(text).width + 8, tall - 4);
  }
  pen.fillStyle = condition === "online" ? palette.barInk : palette.ink;
  pen.fillText(text, left + 8, top + tall / 2 + 0.5);
  pen.restore();
}

function hatch(pen, left, top, wide, tall, colour) {
  pen.save();
  pen.beginPath();
  pen.rect(left, top, wide, tall);
  pen.clip();
  pen.globalAlpha = 0.18;
  pen.fillStyle = colour;
  pen.fillRect(left, top, wide, tall);
  pen.globalAlpha = 0.75;
  pen.beginPath();
  for (let start = left - tall; start < left + wide; start += 5) {
    pen.moveTo(start, top + tall);
    pen.lineTo(start + tall, top);
  }
  pen.stroke();
  pen.restore();
}

/** The colour for an expert that is asked for so often: full for the one that is asked for most. */
export const byDemand = (palette, share, most) =>
  `color-mix(in srgb, ${palette.bar} ${Math.round(100 * (share / most))}%, ${palette.rule})`;

/** Figures of experts by blocks, on the block map's axis; returns what is at a point. */
export function drawExpertMap(canvas, figures, numBlocks, colour) {
  const blocks = Object.keys(figures).map(Number);
  const most = Math.max(...blocks.map((block) => figures[block].length));
  const tall = Math.max(3, Math.min(16, Math.floor(420 / most)));
  const [pen, width] = prepared(canvas, AXIS_PX + most * tall);
  const palette = colours();
  const cell = width / numBlocks;
  const x = (block) => Math.round(block * cell);
  pen.save();
  pen.translate(0, -HISTOGRAM_PX - 2);
  drawAxis(pen, numBlocks, x, palette, cell, width);
  pen.restore();
  for (const block of blocks) {
    const wide = Math.max(1, x(block + 1) - x(block) - (cell > 5 ? 1 : 0));
    const highest = Math.max(...figures[block]);
    figures[block].forEach((figure, expert) => {
      pen.fillStyle = colour(palette, figure, highest);
      pen.fillRect(x(block), AXIS_PX + expert * tall, wide, tall > 4 ? tall - 1 : tall);
    });
  }
  return (left, y) => {
    const block = Math.floor(left / cell);
    const expert = Math.floor((y - AXIS_PX) / tall);
    const figure = figures[block]?.[expert];
    return figure === undefined ? null : { block, expert, figure };
  };
}

/** Show a tip where the pointer is, and follow a link when it is clicked. */
export function interactive(canvas, describe) {
  canvas.describe = describe;
  if (canvas.isInteractive) return;
  canvas.isInteractive = true;
  const tip = document.getElementById("tip");
  const at = (event) => {
    const box = canvas.getBoundingClientRect();
    return canvas.describe(event.clientX - box.left, event.clientY - box.top);
  };
  canvas.addEventListener("pointermove", (event) => {
    const found = at(event);
    tip.hidden = !found;
    canvas.classList.toggle("pointing", Boolean(found?.href));
    if (!found) return;
    tip.textContent = found.text;
    tip.style.left = `${Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8)}px`;
    tip.style.top = `${Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 8)}px`;
  });
  canvas.addEventListener("pointerleave", () => { tip.hidden = true; });
  canvas.addEventListener("click", (event) => {
    const found = at(event);
    if (found?.href) {
      tip.hidden = true;
      location.hash = found.href;
    }
  });
}

export function serverTip(server) {
  const speed = server.steps_per_s !== null ? `\n${rate(server.steps_per_s)} steps/s, ${plural(server.sessions, "session")}` : "";
  return `${server.name} · ${server.condition}\nblocks ${hosted(server)}${speed}`;
}
