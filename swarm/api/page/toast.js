// A sentence at the page's edge that goes away by itself, with something to do about it.

import { element } from "./elements.js";

const SHOWN_MS = 9000;
let timer = 0;

/** Show it in place of the last one. */
export function toast(words, label = null, act = null) {
  const box = document.getElementById("toast");
  const hide = () => {
    clearTimeout(timer);
    box.hidden = true;
  };
  box.replaceChildren(element("span", { role: "status" }, words));
  if (label) {
    const button = element("button", { type: "button", class: "quiet" }, label);
    button.addEventListener("click", () => {
      hide();
      act();
    });
    box.append(button);
  }
  box.hidden = false;
  clearTimeout(timer);
  timer = setTimeout(hide, SHOWN_MS);
}
