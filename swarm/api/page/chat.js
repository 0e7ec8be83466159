// A chat as a value: its messages, and what asking, answering and editing make of them. No DOM, no storage.

const TITLE_LENGTH = 48;

/**
 * A new chat: {id, title, named, createdAt, changedAt, model, messages}.
 *
 * A message is {role: "user", content} or {role: "assistant", content, state, model, error, route, usage, seconds};
 * state: "running", "complete", "length" (it was cut off), "stopped", "failed".
 */
export function newChat(now = Date.now()) {
  return { id: randomId(), title: "", named: false, createdAt: now, changedAt: now, model: "", messages: [] };
}

/** Put a question; returns the answer that is to be filled in. */
export function ask(chat, content, model, now = Date.now()) {
  chat.messages.push({ role: "user", content });
  if (!chat.named) chat.title = titleOf(chat.messages[0].content);
  return answerAgain(chat, model, now);
}

/** Ask something else in place of the message at `index`; what came after it is dropped. */
export function editQuestion(chat, index, content, model, now = Date.now()) {
  chat.messages.length = index;
  return ask(chat, content, model, now);
}

/** Drop the last answer, if there is one; returns the one that is to be filled in. */
export function answerAgain(chat, model, now = Date.now()) {
  if (chat.messages.at(-1)?.role === "assistant") chat.messages.pop();
  const answer = { role: "assistant", content: "", state: "running", model };
  chat.messages.push(answer);
  Object.assign(chat, { model, changedAt: now });
  return answer;
}

/** What the gateway is asked to continue: the system prompt, and all that has been said. */
export function requestMessages(chat, systemPrompt) {
  const said = chat.messages.filter((message) => message.role === "user" || message.content);
  const opening = systemPrompt.trim() ? [{ role: "system", content: systemPrompt }] : [];
  return [...opening, ...said.map(({ role, content }) => ({ role, content }))];
}

/** Give it a name of the user's own; an empty one: by its first question again. */
export function rename(chat, name) {
  chat.named = name.trim() !== "";
  chat.title = chat.named ? name.trim() : titleOf(chat.messages[0]?.content ?? "");
}

/** As it should be after the page was closed in the middle of an answer. */
export function withoutRunning(chat) {
  for (const message of chat.messages) if (message.state === "running") message.state = "stopped";
  return chat;
}

function titleOf(text) {
  const line = text.trim().replace(/\s+/g, " ");
  return line.length > TITLE_LENGTH ? `${line.slice(0, TITLE_LENGTH - 1).trimEnd()}…` : line;
}

function randomId() {
  // Not crypto.randomUUID: it is missing on pages that came over plain HTTP from another machine.
  return Array.from(crypto.getRandomValues(new Uint8Array(8)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}
