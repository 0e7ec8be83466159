// The list of chats at the side: choose, rename, delete.

import { ICONS, element, iconButton } from "./elements.js";

const DAY_MS = 24 * 60 * 60 * 1000;

export class ChatList {
  #root;
  #actions;

  /** actions: {rename(id, name), remove(id)}; chats are chosen by their links. */
  constructor(root, actions) {
    this.#root = root;
    this.#actions = actions;
  }

  /**
   * chats: {id, title, changedAt}, the latest first.
   * isRunning(id): whether its answer is being made.
   */
  show(chats, currentId, isRunning) {
    if (this.#root.querySelector("input")) return; // a name is being typed
    const focused = this.#root.contains(document.activeElement) ? document.activeElement.closest("li")?.dataset.id : null;
    this.#root.replaceChildren();
    for (const [period, some] of grouped(chats)) {
      const heading = element("h2", {}, period);
      this.#root.append(heading, element("ul", {}, ...some.map((chat) => this.#row(chat, chat.id === currentId, isRunning(chat.id)))));
    }
    if (!chats.length) this.#root.append(element("p", { class: "no-chats" }, "Chats are kept in this browser only."));
    if (focused) this.#root.querySelector(`li[data-id="${focused}"] a`)?.focus();
  }

  #row(chat, isCurrent, running) {
    const title = element("span", { class: "chat-title" }, chat.title || "New chat");
    const link = element("a", { href: `#${chat.id}`, "aria-current": isCurrent ? "page" : null }, title);
    if (running) link.append(element("span", { class: "under-way" }, element("span", { class: "unseen" }, " (answering)")));
    const row = element("li", { "data-id": chat.id }, link);
    link.addEventListener("dblclick", () => this.#rename(row, chat));
    row.append(
      iconButton(`Rename ${chat.title}`, ICONS.edit, () => this.#rename(row, chat)),
      iconButton(`Delete ${chat.title}`, ICONS.remove, () => this.#actions.remove(chat.id)),
    );
    return row;
  }

  #rename(row, chat) {
    const input = element("input", { "aria-label": "Name of the chat", maxlength: "120", enterkeyhint: "done" });
    input.value = chat.title;
    let done = false;
    const finish = (keep) => {
      if (done) return;
      done = true;
      input.remove();
      this.#actions.rename(chat.id, keep ? input.value : null);
      this.#root.querySelector(`li[data-id="${chat.id}"] a`)?.focus();
    };
    input.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.isComposing) finish(true);
      if (event.key === "Escape") {
        event.stopPropagation();
        finish(false);
      }
    });
    input.addEventListener("blur", () => finish(true));
    row.prepend(input);
    input.select();
  }
}

function grouped(chats) {
  const groups = new Map();
  for (const chat of chats) groups.set(periodOf(chat), [...(groups.get(periodOf(chat)) ?? []), chat]);
  return groups;
}

function periodOf({ changedAt }) {
  const midnight = new Date().setHours(0, 0, 0, 0);
  if (changedAt >= midnight) return "Today";
  if (changedAt >= midnight - DAY_MS) return "Yesterday";
  return changedAt >= midnight - 7 * DAY_MS ? "This week" : "Earlier";
}
