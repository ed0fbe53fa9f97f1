// Conversations and settings, kept in this browser's localStorage.

const KEY = "qwen-workbench";
const EMPTY = { conversations: [], current: null, model: null, theme: null, apiKey: "", sampling: {} };

/** What is kept; `onChange` hears when another tab has changed it, `onFull` when the browser has no room left. */
export class Store {
  constructor(onChange, onFull) {
    this.onFull = onFull;
    this.read();
    this.timer = null;
    addEventListener("storage", (event) => {
      if (event.key === KEY) {
        this.read();
        onChange();
      }
    });
    addEventListener("pagehide", () => this.flush());
  }

  read() {
    let kept = null;
    try {
      kept = JSON.parse(localStorage.getItem(KEY));
    } catch {
      // Damaged, or storage is forbidden here: begin anew.
    }
    this.data = { ...structuredClone(EMPTY), ...(kept && typeof kept === "object" ? kept : {}) };
    if (!Array.isArray(this.data.conversations)) this.data.conversations = [];
  }

  /** Write soon; many calls in a row become one. */
  save() {
    this.timer ??= setTimeout(() => this.flush(), 250);
  }

  flush() {
    if (this.timer !== null) clearTimeout(this.timer);
    this.timer = null;
    try {
      localStorage.setItem(KEY, JSON.stringify(this.data));
    } catch {
      this.onFull();
    }
  }

  get current() {
    return this.data.conversations.find((one) => one.id === this.data.current) ?? null;
  }

  /** A new conversation, first in the list; an empty one that is there already is used again. */
  begin() {
    let made = this.data.conversations.find((one) => !one.messages.length && !one.system);
    if (!made) {
      made = { id: crypto.randomUUID?.() ?? String(Math.random()).slice(2), title: "", system: "", messages: [] };
      this.data.conversations.unshift(made);
    }
    this.data.current = made.id;
    this.save();
    return made;
  }

  open(id) {
    this.data.current = id;
    this.save();
  }

  /** Take one out; returns a function that puts it back. */
  remove(id) {
    const at = this.data.conversations.findIndex((one) => one.id === id);
    const [removed] = this.data.conversations.splice(at, 1);
    if (this.data.current === id) this.data.current = (this.data.conversations[at] ?? this.data.conversations[at - 1])?.id ?? null;
    this.save();
    return () => {
      this.data.conversations.splice(at, 0, removed);
      this.data.current = removed.id;
      this.save();
    };
  }
}
