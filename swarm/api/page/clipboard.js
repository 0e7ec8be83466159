// Copy text, and buttons that do so.

import { element } from "./elements.js";

const SHOWN_MS = 1600;

/** A button that copies what `text()` returns, and says so for a moment. */
export function copyButton(label, text) {
  const button = element("button", { type: "button", class: "quiet copy" }, label);
  let timer = 0;
  button.addEventListener("click", async () => {
    const done = await copy(text());
    clearTimeout(timer);
    button.textContent = done ? "Copied" : "Cannot copy";
    timer = setTimeout(() => (button.textContent = label), SHOWN_MS);
  });
  return button;
}

/** Whether it worked. */
async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return copyTheOldWay(text); // pages that came over plain HTTP from another machine have no clipboard
  }
}

function copyTheOldWay(text) {
  const before = document.activeElement;
  const area = element("textarea", { class: "unseen", "aria-hidden": "true", tabindex: "-1" });
  area.value = text;
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  before?.focus();
  return done;
}
