// Brings the page to life: the chats, the one that is shown, the composer, and the keyboard.

import { Answering } from "./answering.js";
import { answerAgain, ask, editQuestion, newChat, rename, withoutRunning } from "./chat.js";
import { ChatList } from "./chat_list.js";
import { ChatStore } from "./chat_store.js";
import { ConversationView } from "./conversation_view.js";
import { element } from "./elements.js";
import { modelNames } from "./gateway.js";
import { RouteView, recoverySentence } from "./route_view.js";
import { followEnd } from "./scrolling.js";
import { changeSettings, readSettings, settingsDialog } from "./settings.js";
import { sidePanel } from "./side_panel.js";
import { toast } from "./toast.js";

const SUGGESTIONS = ["Why is the sea salty?", "Write a short poem about rain", "How does bread rise?"];

const byId = (id) => document.getElementById(id);
const composer = byId("composer");
const question = byId("question");
const modelChoice = byId("model");

const settings = readSettings();
const store = await ChatStore.open().catch(() => null);
let chats = new Map((store ? await store.all() : []).map((chat) => [chat.id, chat]));
const removed = new Set(); // answers that were being made when their chats were deleted must not bring them back
let current = newChat();

const answering = new Answering(keep, answerChanged);
const conversation = new ConversationView(byId("conversation"), {
  edit: (index, content) => start(editQuestion(current, index, content, chosenModel())),
  again: () => start(answerAgain(current, chosenModel())),
  enterKey: () => openSettings("apiKey"),
});
const list = new ChatList(byId("chats"), { rename: renameChat, remove: removeChat });
const route = new RouteView(byId("route"), settings);
const end = followEnd(byId("scroller"), byId("to-end"));
const side = sidePanel(byId("side"), byId("scrim"), byId("open-side"), byId("close-side"));
const openSettings = settingsDialog(settings, loadModels);

// Chats.

function showChat(id) {
  const chat = answering.chat(id) ?? chats.get(id);
  current = chat ? (answering.isRunning(id) ? chat : withoutRunning(chat)) : newChat();
  conversation.show(current);
  route.show(current.messages.at(-1));
  byId("welcome").hidden = current.messages.length > 0;
  if (current.model && [...modelChoice.options].some((option) => option.value === current.model)) modelChoice.value = current.model;
  showState();
  showList();
  side.close();
  end.jump();
}

function openChat(id) {
  if (location.hash === `#${id}`) showChat(id);
  else location.hash = id; // hashchange shows it
}

function beginChat() {
  history.pushState(null, "", location.pathname + location.search);
  showChat(null);
  question.focus();
}

function showList() {
  const shown = [...chats.values()].sort((one, other) => other.changedAt - one.changedAt);
  list.show(shown, current.id, (id) => answering.isRunning(id));
}

function keep(chat) {
  if (removed.has(chat.id)) return;
  chats.set(chat.id, chat);
  store?.keep(chat).catch(() => toast("This browser has no room for the chat. It is lost when the page is closed."));
}

function renameChat(id, name) {
  const chat = chats.get(id);
  if (chat && name !== null) {
    rename(chat, name);
    keep(chat);
  }
  showState();
  showList();
}

function removeChat(id) {
  const chat = chats.get(id);
  removed.add(id);
  answering.stop(id);
  chats.delete(id);
  store?.remove(id);
  if (id === current.id) beginChat();
  else showList();
  toast(`“${chat.title}” is deleted.`, "Undo", () => {
    removed.delete(id);
    keep(chat);
    openChat(id);
  });
}

function removeAllChats() {
  for (const chat of answering.chats()) answering.stop(chat.id);
  const before = chats;
  for (const id of before.keys()) removed.add(id);
  chats = new Map();
  store?.removeAll();
  byId("settings").close();
  beginChat();
  toast("All chats are deleted.", "Undo", () => {
    removed.clear();
    for (const chat of before.values()) keep(chat);
    showList();
  });
}

// Answers.

function start(answer) {
  answering.run(current, answer, settings);
  if (location.hash !== `#${current.id}`) history.pushState(null, "", `#${current.id}`);
}

function answerChanged(chat, answer, what) {
  if (what === "begun") keep(chat);
  if (what === "begun" || what === "ended") showList();
  if (chat !== current || answer !== chat.messages.at(-1)) return; // not shown, or replaced meanwhile
  if (what === "begun") {
    conversation.show(chat);
    byId("welcome").hidden = true;
    end.jump();
  } else if (what === "ended") conversation.end(answer);
  else conversation.grow(answer, end.follow);
  if (what !== "grown") route.show(answer);
  if (what === "recovered") route.flash();
  if (what === "begun" || what === "ended") showState();
  if (what !== "grown") end.follow();
  say(statusWords(what, answer));
}

function statusWords(what, { state, route }) {
  if (what === "recovered") return recoverySentence(route.recoveries);
  if (what === "ended") return { stopped: "Stopped.", failed: "The answer failed." }[state] ?? "The answer is complete.";
  return what === "begun" ? "" : byId("status").textContent;
}

function showState() {
  const running = answering.isRunning(current.id);
  byId("send").hidden = running;
  byId("stop").hidden = !running;
  byId("send").disabled = !question.value.trim() || !chosenModel();
  const title = current.title || "New chat";
  byId("title").textContent = title;
  document.title = current.title ? `${title} · Swarm` : "Swarm";
}

function say(words) {
  if (byId("status").textContent !== words) byId("status").textContent = words;
}

// Models.

function chosenModel() {
  return modelChoice.value;
}

async function loadModels() {
  try {
    const names = await modelNames(settings.apiKey);
    modelChoice.replaceChildren(...names.map((name) => element("option", { value: name }, name)));
    const wanted = [current.model, settings.model].find((name) => names.includes(name));
    if (wanted) modelChoice.value = wanted;
    modelChoice.disabled = false;
  } catch (error) {
    modelChoice.replaceChildren(element("option", { value: "" }, "no model"));
    modelChoice.disabled = true;
    if (error.status === 401) toast("This gateway asks for an API key.", "Enter it", () => openSettings("apiKey"));
    else toast(error.message, "Try again", loadModels);
  }
  showState();
}

// The composer, and the keyboard.

function grow() {
  question.style.height = "auto";
  question.style.height = `${question.scrollHeight}px`;
  showState();
}

composer.addEventListener("submit", (event) => {
  event.preventDefault();
  const content = question.value.trim();
  if (!content || !chosenModel() || answering.isRunning(current.id)) return;
  question.value = "";
  grow();
  start(ask(current, content, chosenModel()));
});

question.addEventListener("input", grow);
question.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    composer.requestSubmit();
  } else if (event.key === "ArrowUp" && !question.value && !answering.isRunning(current.id) && conversation.editLast()) {
    event.preventDefault();
  }
});

document.addEventListener("keydown", (event) => {
  if (document.querySelector("dialog[open]") || event.isComposing) return;
  if (event.key === "Escape" && !side.close()) answering.stop(current.id);
  if (event.code === "KeyO" && event.shiftKey && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    beginChat();
  }
});

byId("stop").addEventListener("click", () => {
  answering.stop(current.id);
  question.focus();
});
byId("new-chat").addEventListener("click", beginChat);
byId("open-settings").addEventListener("click", () => openSettings());
byId("remove-all").addEventListener("click", removeAllChats);
modelChoice.addEventListener("change", () => {
  changeSettings(settings, { model: modelChoice.value });
  showState();
});
byId("suggestions").append(
  ...SUGGESTIONS.map((text) => {
    const button = element("button", { type: "button" }, text);
    button.addEventListener("click", () => {
      question.value = text;
      grow();
      question.focus();
    });
    return element("li", {}, button);
  }),
);

window.addEventListener("hashchange", () => showChat(location.hash.slice(1)));
window.addEventListener("pagehide", () => answering.chats().forEach(keep));
store?.onChangeElsewhere(async () => {
  const mine = answering.chats();
  chats = new Map([...(await store.all()), ...mine].map((chat) => [chat.id, chat]));
  const now = chats.get(current.id);
  if (now && !answering.isRunning(now.id) && JSON.stringify(now) !== JSON.stringify(current)) showChat(now.id);
  showList();
});

if (/Mac|iPhone|iPad/.test(navigator.platform)) byId("new-chat").querySelector("kbd").textContent = "⌘ ⇧ O";
if (!store) toast("This browser keeps nothing for this page: chats are lost when it is closed.");
showChat(location.hash.slice(1));
if (matchMedia("(pointer: fine)").matches) question.focus();
await loadModels();
document.documentElement.dataset.ready = ""; // for those who drive this page by a program
