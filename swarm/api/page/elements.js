// Make DOM elements in one expression. Text is always text: nothing here reads HTML.

/** An element; attributes that are null or false are left out; children are nodes or texts. */
export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== false) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

const SVG = "http://www.w3.org/2000/svg";

/** An icon of strokes: the `d` of a path in a box of 24 by 24. */
export function icon(d) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  svg.classList.add("icon");
  const path = document.createElementNS(SVG, "path");
  path.setAttribute("d", d);
  svg.append(path);
  return svg;
}

/** A button with an icon only; its label is for tooltips and screen readers. */
export function iconButton(label, d, act) {
  const button = element("button", { type: "button", class: "icon-button", "aria-label": label, title: label }, icon(d));
  button.addEventListener("click", act);
  return button;
}

export const ICONS = {
  edit: "M4 20h4L19 9l-4-4L4 16zM13 7l4 4",
  remove: "M5 7h14M10 7V4h4v3M7 7l1 13h8l1-13",
  again: "M19 12a7 7 0 1 1-2-5M19 3v5h-5",
};
