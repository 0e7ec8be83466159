// Keeps chats in this browser (IndexedDB), and tells other tabs of this page when they change.

const DATABASE = "swarm-chats";
const CHATS = "chats";

export class ChatStore {
  #database;
  #channel;

  /** Open it. Rejects where the browser keeps nothing, as some private windows do. */
  static async open() {
    const opening = indexedDB.open(DATABASE, 1);
    opening.onupgradeneeded = () => opening.result.createObjectStore(CHATS, { keyPath: "id" });
    return new ChatStore(await result(opening));
  }

  constructor(database) {
    this.#database = database;
    this.#channel = new BroadcastChannel(DATABASE);
    // A tab with a newer version of this page must not wait for this one.
    database.onversionchange = () => database.close();
  }

  /** All chats, the latest first. */
  async all() {
    const chats = await result(this.#chats("readonly").getAll());
    return chats.sort((one, other) => other.changedAt - one.changedAt);
  }

  /** Keep a chat as it is now. */
  async keep(chat) {
    await result(this.#chats("readwrite").put(structuredClone(chat)));
    this.#channel.postMessage("kept");
  }

  async remove(id) {
    await result(this.#chats("readwrite").delete(id));
    this.#channel.postMessage("removed");
  }

  async removeAll() {
    await result(this.#chats("readwrite").clear());
    this.#channel.postMessage("removed");
  }

  /** Call `changed()` when another tab has kept or removed something. */
  onChangeElsewhere(changed) {
    this.#channel.onmessage = changed;
  }

  #chats(mode) {
    return this.#database.transaction(CHATS, mode).objectStore(CHATS);
  }
}

function result(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}
