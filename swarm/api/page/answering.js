// Answers that are being made: one for each chat at most, also for chats that are not shown.

import { GatewayError, answerParts } from "./gateway.js";
import { requestMessages } from "./chat.js";

const KEEP_EVERY_MS = 1000;

export class Answering {
  #running = new Map();
  #keep;
  #changed;

  /**
   * keep(chat): store it; changed(chat, answer, what): show it, `what` being "begun", "grown" (its text), "routed",
   * "recovered" (routed, and a server was lost) or "ended".
   */
  constructor(keep, changed) {
    this.#keep = keep;
    this.#changed = changed;
  }

  /** Whether the chat's answer is being made. */
  isRunning(chatId) {
    return this.#running.has(chatId);
  }

  /** The chat, as it grows, if its answer is being made. */
  chat(chatId) {
    return this.#running.get(chatId)?.chat;
  }

  /** Stop the chat's answer; what has come is kept. */
  stop(chatId) {
    this.#running.get(chatId)?.abort.abort();
  }

  /** Chats whose answers are being made. */
  chats() {
    return [...this.#running.values()].map(({ chat }) => chat);
  }

  /** Fill in `answer`, the last message of `chat`. Returns when it has ended, however. */
  async run(chat, answer, settings) {
    const abort = new AbortController();
    this.stop(chat.id);
    this.#running.set(chat.id, { chat, abort });
    this.#changed(chat, answer, "begun");
    let keptAt = performance.now();
    try {
      const parts = answerParts(answer.model, requestMessages(chat, settings.systemPrompt), settings, abort.signal);
      const begun = performance.now();
      for await (const part of parts) {
        this.#changed(chat, answer, this.#take(answer, part, begun));
        if (performance.now() - keptAt > KEEP_EVERY_MS) {
          keptAt = performance.now();
          this.#keep(chat);
        }
      }
      if (answer.state === "running") answer.state = "complete";
    } catch (error) {
      this.#fail(answer, error);
    } finally {
      delete answer.waiting;
      if (this.#running.get(chat.id)?.abort === abort) this.#running.delete(chat.id);
      this.#keep(chat);
      this.#changed(chat, answer, "ended");
    }
  }

  /** Returns what has changed. */
  #take(answer, part, begun) {
    answer.waiting = part.waiting ?? false;
    if (part.text) answer.content += part.text;
    if (part.finish) answer.state = part.finish === "length" ? "length" : "complete";
    if (part.usage) {
      answer.usage = part.usage;
      answer.seconds = (performance.now() - begun) / 1000;
    }
    if (!part.route) return "grown";
    const recovered = part.route.recoveries > (answer.route?.recoveries ?? 0);
    answer.route = withReplacements(part.route, answer.route);
    return recovered ? "recovered" : "routed";
  }

  #fail(answer, error) {
    if (error.name === "AbortError") {
      answer.state = "stopped";
      return;
    }
    answer.state = "failed";
    const known = error instanceof GatewayError ? error : null;
    answer.error = { message: error.message, status: known?.status ?? 0, retryAfterS: known?.retryAfterS ?? null };
    if (!known) console.error(error); // ours to repair
  }
}

/** A route in which servers that were not there before are marked, once there was a recovery. */
function withReplacements(route, before) {
  const known = new Set(before?.hops.filter((hop) => !hop.tookOver).map((hop) => hop.peerId));
  const hops = route.hops.map((hop) => ({ ...hop, tookOver: route.recoveries > 0 && before !== undefined && !known.has(hop.peerId) }));
  return { ...route, hops };
}
