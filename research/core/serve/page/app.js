// The page: what is shown of the store, and what happens when something is pressed.

import { ApiError, chat, models } from "./api.js";
import { render } from "./markdown.js";
import { Store } from "./store.js";

const $ = (id) => document.getElementById(id);
const SAMPLING = ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "max_tokens"];
const SUGGESTIONS = ["What is 47 plus 8?", "Explain what a hash table is, with an example.", "Write a haiku about autumn.", "用三句话介绍一下杭州。"];
const THEMES = [null, "light", "dark"];
const THEME_NAMES = { null: "as the system has them", light: "light", dark: "dark" };

const store = new Store(() => !running && show(), () => say("This browser has no room left: the newest messages are not kept."));
let running = null; // the answer that is coming: {conversation, message, controller, node}
let following = true; // the newest line stays in view until somebody scrolls up

// --- the list -------------------------------------------------------------------------------------------------------

function showList() {
  const items = store.data.conversations.map((one) => {
    const item = $("conversation-template").content.firstElementChild.cloneNode(true);
    const [open, rename, remove] = item.querySelectorAll("button");
    open.textContent = one.title || "New conversation";
    item.setAttribute("aria-current", String(one.id === store.data.current));
    open.onclick = () => switchTo(one.id);
    open.ondblclick = rename.onclick = () => renameIn(item, one);
    rename.setAttribute("aria-label", `Rename ${open.textContent}`);
    remove.setAttribute("aria-label", `Delete ${open.textContent}`);
    remove.onclick = () => {
      if (running?.conversation === one) stop();
      const putBack = store.remove(one.id);
      show();
      say("Conversation deleted.", () => (putBack(), show()));
    };
    return item;
  });
  $("conversations").replaceChildren(...items);
}

function renameIn(item, conversation) {
  const field = document.createElement("input");
  field.value = conversation.title;
  field.setAttribute("aria-label", "Name of the conversation");
  item.replaceChildren(field);
  field.select();
  field.onkeydown = (event) => {
    if (event.key === "Escape") field.value = conversation.title;
    if (event.key === "Enter" || event.key === "Escape") field.blur();
    event.stopPropagation();
  };
  field.onblur = () => {
    conversation.title = field.value.trim() || conversation.title;
    store.save();
    showList();
  };
}

function switchTo(id) {
  store.open(id);
  document.body.classList.remove("listing");
  following = true;
  show();
  $("prompt").focus();
}

function step(by) {
  const all = store.data.conversations;
  const at = all.findIndex((one) => one.id === store.data.current);
  const next = all[at + by];
  if (next) switchTo(next.id);
}

// --- the conversation -----------------------------------------------------------------------------------------------

function show() {
  showList();
  const conversation = store.current;
  const messages = conversation?.messages ?? [];
  document.body.classList.toggle("empty", !messages.length);
  document.title = conversation?.title ? `${conversation.title} – Qwen Workbench` : "Qwen Workbench";
  $("messages").replaceChildren(...messages.map((message, at) => article(conversation, message, at)));
  $("system").value = conversation?.system ?? "";
  if (running?.conversation === conversation) running.node = $("messages").lastElementChild;
  showBusy();
  toEnd();
}

function article(conversation, message, at) {
  const node = $("message-template").content.firstElementChild.cloneNode(true);
  const mine = message.role === "user";
  node.classList.add(message.role);
  node.setAttribute("aria-label", mine ? "You" : "Answer");
  node.querySelector(".edit").hidden = !mine;
  node.querySelector(".again").hidden = mine || at !== conversation.messages.length - 1;
  node.querySelector(".copy").onclick = (event) => copy(message.content, event.currentTarget);
  node.querySelector(".edit").onclick = () => edit(conversation, at);
  node.querySelector(".again").onclick = again;
  fill(node, message);
  return node;
}

function fill(node, message) {
  const body = node.querySelector(".body");
  if (message.role === "user") {
    body.textContent = message.content;
  } else {
    body.replaceChildren(...render(message.content));
  }
  if (message.problem) {
    const box = document.createElement("p");
    box.className = "problem";
    box.textContent = message.problem;
    body.append(box);
  }
  node.querySelector(".note").textContent = note(message);
  node.setAttribute("aria-busy", String(running?.message === message));
}

function note(message) {
  const parts = [];
  if (message.model && message.role === "assistant") parts.push(message.model);
  if (message.tokens) parts.push(`${message.tokens} tokens`);
  if (message.rate) parts.push(`${message.rate.toFixed(1)} tokens/s`);
  if (message.end === "length") parts.push("cut at the longest answer");
  if (message.end === "stopped") parts.push("stopped");
  return parts.join(" · ");
}

function toEnd() {
  if (following) $("scroller").scrollTop = $("scroller").scrollHeight;
  $("to-end").hidden = following;
}

function showBusy() {
  const busy = running !== null;
  document.body.classList.toggle("busy", busy);
  $("send").setAttribute("aria-label", busy ? "Stop" : "Send");
  $("send").disabled = !busy && !$("prompt").value.trim();
  $("speed").textContent = busy ? $("speed").textContent : "";
}

// --- asking ---------------------------------------------------------------------------------------------------------

function send() {
  const text = $("prompt").value.trim();
  if (!text || running) return;
  const conversation = store.current ?? store.begin();
  conversation.messages.push({ role: "user", content: text });
  conversation.title ||= text.split("\n")[0].slice(0, 60);
  // The newest conversation comes first.
  const all = store.data.conversations;
  all.unshift(...all.splice(all.indexOf(conversation), 1));
  $("prompt").value = "";
  grow();
  following = true;
  ask(conversation);
}

function again() {
  const conversation = store.current;
  if (running || !conversation?.messages.length) return;
  if (conversation.messages.at(-1).role === "assistant") conversation.messages.pop();
  ask(conversation);
}

function edit(conversation, at) {
  if (running) stop();
  $("prompt").value = conversation.messages[at].content;
  conversation.messages.splice(at);
  store.save();
  show();
  grow();
  $("prompt").focus();
}

async function ask(conversation) {
  const model = $("model").value;
  const sent = conversation.messages.filter((one) => one.content || one.role === "user");
  const body = {
    model,
    messages: [
      ...(conversation.system ? [{ role: "system", content: conversation.system }] : []),
      ...sent.map(({ role, content }) => ({ role, content })),
    ],
    ...store.data.sampling,
  };
  const message = { role: "assistant", content: "", model };
  conversation.messages.push(message);
  running = { conversation, message, controller: new AbortController(), node: null };
  const mine = running;
  $("speed").textContent = "";
  show();
  store.flush();
  let first = null;
  let before = 0;
  const draw = throttled(() => {
    if (!mine.node?.isConnected || store.current !== conversation) return;
    fill(mine.node, message);
    $("speed").textContent = message.rate ? `${message.rate.toFixed(1)} tokens/s` : "";
    toEnd();
  });
  try {
    await chat(body, store.data.apiKey, mine.controller.signal, (chunk) => {
      const choice = chunk.choices[0];
      message.content += choice?.delta.content ?? "";
      if (choice?.finish_reason) message.end = choice.finish_reason;
      const tokens = chunk.usage?.completion_tokens ?? 0;
      if (tokens) {
        // The first chunk's tokens took the prompt's time: the rate counts those after it.
        if (first === null) [first, before] = [performance.now(), tokens];
        message.tokens = tokens;
        const seconds = (performance.now() - first) / 1000;
        if (tokens > before && seconds > 0) message.rate = (tokens - before) / seconds;
      }
      store.save();
      draw();
    });
  } catch (error) {
    if (error.name === "AbortError") {
      message.end = "stopped";
    } else {
      message.problem = error.message;
      if (error instanceof ApiError && error.status === 401) needKey();
    }
  }
  if (running === mine) running = null;
  store.flush();
  if (store.current === conversation) show();
  else showBusy();
}

function stop() {
  running?.controller.abort();
  running = null;
}

/** `draw` at most every 50 ms, and once more after the last call. */
function throttled(draw) {
  let waiting = false;
  return () => {
    if (waiting) return;
    waiting = true;
    setTimeout(() => ((waiting = false), draw()), 50);
  };
}

// --- models, settings, colours --------------------------------------------------------------------------------------

async function loadModels() {
  let known;
  try {
    known = await models(store.data.apiKey);
  } catch (error) {
    if (error.status === 401) needKey();
    else say(error.message);
    return;
  }
  const options = known.map((model) => {
    const option = document.createElement("option");
    option.value = model.id;
    option.textContent = model.parent ? `${model.id} (adapter)` : model.id;
    return option;
  });
  $("model").replaceChildren(...options);
  if (known.some((model) => model.id === store.data.model)) $("model").value = store.data.model;
  $("welcome-model").textContent = `${$("model").value} · ${known[0].max_model_len.toLocaleString("en")} tokens of context`;
}

function needKey() {
  openSettings();
  $("api-key").focus();
  say("This server asks for an API key.");
}

function openSettings() {
  if (!$("settings").open) $("settings").showModal();
}

function readSampling() {
  const sampling = {};
  for (const name of SAMPLING) {
    const field = $(name);
    if (field.value !== "" && field.validity.valid) sampling[name] = field.valueAsNumber;
  }
  store.data.sampling = sampling;
  store.save();
}

function showSampling() {
  for (const name of SAMPLING) $(name).value = store.data.sampling[name] ?? "";
  $("api-key").value = store.data.apiKey;
}

function showTheme() {
  const theme = store.data.theme;
  if (theme) document.documentElement.dataset.theme = theme;
  else delete document.documentElement.dataset.theme;
  $("theme").setAttribute("aria-label", `Colours: ${THEME_NAMES[theme]}`);
  $("theme").title = $("theme").getAttribute("aria-label");
}

let toastTimer;
function say(text, undo) {
  const [words, button] = $("toast").children;
  words.textContent = text;
  button.hidden = !undo;
  button.onclick = () => (($("toast").hidden = true), undo());
  $("toast").hidden = false;
  clearTimeout(toastTimer);
  toastTimer = setTimeout(() => ($("toast").hidden = true), 6000);
}

async function copy(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    say("This browser does not let the page copy.");
    return;
  }
  if (button.dataset.copy) button.textContent = "Copied";
  else say("Copied.");
}

function grow() {
  const field = $("prompt");
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight}px`;
  showBusy();
}

// --- what is pressed ------------------------------------------------------------------------------------------------

$("composer").onsubmit = (event) => {
  event.preventDefault();
  if (running) running.controller.abort();
  else send();
};
$("prompt").oninput = grow;
$("prompt").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    if (!running) send();
  } else if (event.key === "ArrowUp" && !$("prompt").value && !running) {
    const messages = store.current?.messages ?? [];
    const at = messages.findLastIndex((one) => one.role === "user");
    if (at >= 0) {
      event.preventDefault();
      edit(store.current, at);
    }
  }
};
addEventListener("keydown", (event) => {
  const typing = /^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName);
  if (event.key === "Escape" && running && !$("settings").open) running.controller.abort();
  else if (event.key === "Escape") document.body.classList.remove("listing");
  else if (event.key === "/" && !typing && !$("settings").open) {
    event.preventDefault();
    $("prompt").focus();
  } else if (event.altKey && !event.ctrlKey && !event.metaKey) {
    const actions = { KeyN: newChat, KeyR: again, KeyS: openSettings, ArrowUp: () => step(-1), ArrowDown: () => step(1) };
    const action = actions[event.code];
    if (action) {
      event.preventDefault();
      action();
    }
  }
});
$("messages").addEventListener("click", (event) => {
  const button = event.target.closest("button[data-copy]");
  if (button) copy(button.closest(".code").querySelector("code").textContent, button);
});
$("scroller").addEventListener("scroll", () => {
  const box = $("scroller");
  following = box.scrollHeight - box.scrollTop - box.clientHeight < 60;
  $("to-end").hidden = following;
});
$("to-end").onclick = () => {
  following = true;
  toEnd();
};

function newChat() {
  store.begin();
  document.body.classList.remove("listing");
  show();
  $("prompt").focus();
}
$("new-chat").onclick = newChat;
$("open-sidebar").onclick = () => document.body.classList.add("listing");
$("close-sidebar").onclick = $("shade").onclick = () => document.body.classList.remove("listing");
$("open-settings").onclick = openSettings;
$("settings").onclick = (event) => event.target === $("settings") && $("settings").close();
$("theme").onclick = () => {
  store.data.theme = THEMES[(THEMES.indexOf(store.data.theme) + 1) % THEMES.length];
  store.save();
  showTheme();
};
$("model").onchange = () => {
  store.data.model = $("model").value;
  store.save();
};
$("system").oninput = () => {
  (store.current ?? store.begin()).system = $("system").value;
  store.save();
};
for (const name of SAMPLING) $(name).oninput = readSampling;
$("api-key").onchange = () => {
  store.data.apiKey = $("api-key").value.trim();
  store.save();
  loadModels();
};
$("reset-settings").onclick = () => {
  store.data.sampling = {};
  store.save();
  showSampling();
};
$("delete-all").onclick = () => {
  stop();
  const { conversations, current } = store.data;
  Object.assign(store.data, { conversations: [], current: null });
  store.save();
  show();
  $("settings").close();
  say("All conversations deleted.", () => (Object.assign(store.data, { conversations, current }), store.save(), show()));
};

for (const text of SUGGESTIONS) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = text;
  button.onclick = () => {
    $("prompt").value = text;
    send();
  };
  $("suggestions").append(button);
}
showTheme();
showSampling();
show();
loadModels();
