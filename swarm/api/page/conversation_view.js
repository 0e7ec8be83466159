// The messages of a chat on the page, with what can be done to each.

import { copyButton } from "./clipboard.js";
import { ICONS, element, iconButton } from "./elements.js";
import { MarkdownView } from "./markdown_view.js";

export class ConversationView {
  #root;
  #actions;
  #chat = null;
  #live = null;
  #frame = 0;

  /** actions: {edit(index, content), again(), enterKey()}. */
  constructor(root, actions) {
    this.#root = root;
    this.#actions = actions;
  }

  /** Show all messages of a chat. */
  show(chat) {
    this.#chat = chat;
    this.#live = null;
    this.#root.replaceChildren(...chat.messages.map((message, index) => this.#node(message, index)));
  }

  /** The last answer has grown: show it with the next frame, then call `shown()`. */
  grow(answer, shown) {
    if (this.#frame) return;
    this.#frame = requestAnimationFrame(() => {
      this.#frame = 0;
      if (this.#live?.answer !== answer) return;
      this.#live.markdown.show(answer.content);
      this.#live.waiting.textContent = waitingWords(answer);
      shown();
    });
  }

  /** The answer that grew has ended. */
  end(answer) {
    if (this.#live?.answer !== answer) return;
    const { article, markdown, waiting } = this.#live;
    this.#live = null;
    markdown.show(answer.content);
    waiting.remove();
    article.removeAttribute("aria-busy");
    article.classList.replace("running", answer.state);
    this.#complete(article, answer, true);
  }

  /** Let the user change the last question. Returns whether there is one. */
  editLast() {
    const button = [...this.#root.querySelectorAll(".edit-question")].at(-1);
    button?.click();
    return button !== undefined;
  }

  #node(message, index) {
    return message.role === "user" ? this.#question(message, index) : this.#answer(message, index);
  }

  #question({ content }, index) {
    const text = element("div", { class: "question-text" }, content);
    const article = element("article", { class: "message question" }, element("h2", { class: "unseen" }, "You"), text);
    const edit = iconButton("Edit and ask again", ICONS.edit, () => this.#edit(article, content, index));
    edit.classList.add("edit-question");
    article.append(element("div", { class: "actions" }, copyButton("Copy", () => content), edit));
    return article;
  }

  #answer(answer, index) {
    const text = element("div", { class: "answer-text" });
    const running = answer.state === "running";
    const article = element(
      "article",
      { class: `message answer ${answer.state}`, "aria-busy": running ? "true" : null },
      element("h2", { class: "unseen" }, answer.model),
      text,
    );
    const markdown = new MarkdownView(text);
    markdown.show(answer.content);
    if (running) {
      const waiting = element("p", { class: "waiting" }, waitingWords(answer));
      article.append(waiting);
      this.#live = { answer, article, markdown, waiting };
    } else this.#complete(article, answer, index === this.#chat.messages.length - 1);
    return article;
  }

  #complete(article, answer, isLast) {
    if (answer.error) article.append(this.#failure(answer.error));
    const actions = element("div", { class: "actions" });
    if (answer.content) actions.append(copyButton("Copy", () => answer.content));
    if (isLast && !answer.error) actions.append(iconButton("Answer again", ICONS.again, () => this.#actions.again()));
    actions.append(element("span", { class: "figures" }, figuresOf(answer)));
    article.append(actions);
  }

  #failure({ message, status, retryAfterS }) {
    const later = retryAfterS ? ` Try again in ${Math.ceil(retryAfterS)} s.` : "";
    const box = element("div", { class: "failure", role: "alert" }, element("p", {}, message + later));
    const act = (label, action) => {
      const button = element("button", { type: "button", class: "quiet" }, label);
      button.addEventListener("click", action);
      box.append(button);
    };
    if (status === 401) act("Enter a key", () => this.#actions.enterKey());
    act("Try again", () => this.#actions.again());
    return box;
  }

  #edit(article, content, index) {
    const area = element("textarea", { "aria-label": "Your question", rows: "1" });
    area.value = content;
    const cancel = element("button", { type: "button", class: "quiet" }, "Cancel");
    const form = element(
      "form",
      { class: "editing" },
      area,
      element("div", { class: "buttons" }, cancel, element("button", { type: "submit", class: "primary" }, "Ask again")),
    );
    const leave = () => {
      form.remove();
      article.classList.remove("is-edited");
      article.querySelector(".edit-question").focus();
    };
    cancel.addEventListener("click", leave);
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (area.value.trim()) this.#actions.edit(index, area.value.trim());
    });
    form.addEventListener("keydown", (event) => {
      if (event.key === "Escape") {
        event.stopPropagation();
        leave();
      } else if (event.key === "Enter" && !event.shiftKey && !event.isComposing && event.target === area) {
        event.preventDefault();
        form.requestSubmit();
      }
    });
    article.classList.add("is-edited");
    article.append(form);
    area.focus();
    area.setSelectionRange(area.value.length, area.value.length);
  }
}

function waitingWords({ content, waiting }) {
  if (waiting) return "Waiting for servers…";
  return content ? "" : "Finding a way through the swarm…";
}

function figuresOf({ state, usage, seconds, route }) {
  const words = [];
  if (state === "stopped") words.push("stopped");
  if (state === "length") words.push("cut off at the longest length");
  if (usage) words.push(`${usage.tokens} ${usage.tokens === 1 ? "token" : "tokens"}`);
  if (usage && seconds > 0) words.push(`${(usage.tokens / seconds).toFixed(1)} a second`);
  if (route?.recoveries) words.push(route.recoveries === 1 ? "1 recovery" : `${route.recoveries} recoveries`);
  return words.join(" · ");
}
