// Server-sent events out of pieces of text, wherever the pieces were cut
// (https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation).

/**
 * Eats text, returns events. An event is {data, type, comment: false}; a comment line, with which servers keep
 * connections open, is {data, comment: true}.
 */
export class EventStreamParser {
  #unread = "";
  #atStart = true;
  #data = [];
  #type = "";

  /** The events that are complete with this piece. */
  push(text) {
    this.#unread += text;
    if (this.#atStart && this.#unread) {
      this.#atStart = false;
      if (this.#unread.startsWith("\uFEFF")) this.#unread = this.#unread.slice(1);
    }
    const events = [];
    for (let line; (line = this.#takeLine()) !== null; ) {
      const event = this.#read(line);
      if (event) events.push(event);
    }
    return events;
  }

  #takeLine() {
    const end = this.#unread.search(/[\r\n]/);
    // A carriage return at the very end may be half of a line's end.
    if (end < 0 || (this.#unread[end] === "\r" && end === this.#unread.length - 1)) return null;
    const line = this.#unread.slice(0, end);
    this.#unread = this.#unread.slice(this.#unread.startsWith("\r\n", end) ? end + 2 : end + 1);
    return line;
  }

  #read(line) {
    if (line === "") {
      const event = this.#data.length ? { data: this.#data.join("\n"), type: this.#type || "message", comment: false } : null;
      this.#data = [];
      this.#type = "";
      return event;
    }
    if (line.startsWith(":")) return { data: line.slice(1).trim(), type: "", comment: true };
    const [, field, value] = /^([^:]*):? ?([^]*)$/.exec(line);
    if (field === "data") this.#data.push(value);
    else if (field === "event") this.#type = value;
    return null;
  }
}

/** The connection ended in the middle. */
export class StreamBroken extends Error {}

/** The events of a response's body, as they come. Stopping the loop ends the response. Throws StreamBroken, AbortError. */
export async function* eventsOf(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  const parser = new EventStreamParser();
  try {
    for (;;) {
      const { done, value } = await reader.read().catch(broken);
      if (done) return;
      yield* parser.push(value);
    }
  } finally {
    await reader.cancel().catch(() => {}); // it has failed already, and was told to whoever reads
  }
}

function broken(error) {
  throw error.name === "AbortError" ? error : new StreamBroken(error.message);
}
