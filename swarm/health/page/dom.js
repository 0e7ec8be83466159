// Build elements, and change what is shown into them without losing focus, scroll position or selection.

const SVG = "http://www.w3.org/2000/svg";
const SVG_TAGS = new Set(["svg", "path", "rect", "line", "text", "g", "title"]);

export function h(tag, attributes = {}, ...children) {
  const element = SVG_TAGS.has(tag) ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** Make the children of `shown` equal those of `wanted`. */
export function morph(shown, wanted) {
  const old = [...shown.childNodes];
  const fresh = [...wanted.childNodes];
  fresh.forEach((child, index) => {
    const there = old[index];
    if (!there) shown.append(child);
    else if (!sameKind(there, child)) there.replaceWith(child);
    else if (there.nodeType === Node.TEXT_NODE) {
      if (there.data !== child.data) there.data = child.data;
    } else {
      morphAttributes(there, child);
      if (there.tagName !== "CANVAS") morph(there, child);
    }
  });
  old.slice(fresh.length).forEach((child) => child.remove());
}

function sameKind(one, other) {
  return one.nodeName === other.nodeName && one.nodeType === other.nodeType
    && (one.nodeType !== Node.ELEMENT_NODE || one.getAttribute("data-key") === other.getAttribute("data-key"));
}

function morphAttributes(there, child) {
  const isCanvas = there.tagName === "CANVAS";
  for (const { name, value } of child.attributes) {
    if (there.getAttribute(name) !== value) there.setAttribute(name, value);
  }
  for (const { name } of [...there.attributes]) {
    const isOwn = isCanvas && (name === "width" || name === "height" || name === "style" || name === "class");
    if (!child.hasAttribute(name) && !isOwn) there.removeAttribute(name);
  }
}
