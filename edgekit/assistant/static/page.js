"use strict";

// One conversation at a time is on the page. Text goes into the page as text nodes only: nothing is ever parsed as HTML.

const $ = (id) => document.getElementById(id);
const state = { status: null, id: newId(), turns: [], running: null, document: null, token: sessionStorage.getItem("token") || "" };
const EXAMPLES = {
  plain: ["Write a haiku about the sea", "Explain what a battery does", "Give me three names for a cat"],
  documents: ["What are these documents about?", "Which rules are the most important?"],
  tools: ["What time is it?", "How much is 17.5 % of 240?"],
};

// --- small helpers

function newId() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

function make(tag, options = {}, ...children) {
  const { on, ...rest } = options;
  const element = document.createElement(tag);
  for (const [key, value] of Object.entries(rest)) {
    if (key in element) element[key] = value;
    else element.setAttribute(key, value);
  }
  for (const [event, act] of Object.entries(on || {})) element.addEventListener(event, act);
  element.append(...children);
  return element;
}

const size = (bytes) => (bytes == null ? "n/a" : bytes >= 1e9 ? `${(bytes / 1e9).toFixed(2)} GB` : `${Math.round(bytes / 1e6)} MB`);
const rate = (speed) => (speed == null ? "–" : `${speed.toFixed(speed < 10 ? 1 : 0)} tok/s`);
const joules = (cost) => (cost.joules == null ? "n/a" : `${cost.joules.toFixed(cost.joules < 10 ? 2 : 0)} J`);

// Lines that a document's author broke flow on; its paragraphs, lists and tables stay. No character is added or lost.
const flowing = (text) => text.replace(/(?<=[^\n])\n(?=[^\s*|`#\d]|-\w)/g, " ");

function say(text) {
  $("said").textContent = text;
}

async function call(path, options = {}) {
  const headers = { ...(options.headers || {}) };
  if (state.token) headers.Authorization = `Bearer ${state.token}`;
  const response = await fetch(path, { ...options, headers });
  if (response.status === 401) {
    await askForToken();
    return call(path, options);
  }
  if (!response.ok) {
    const problem = await response.json().catch(() => null);
    const error = new Error(problem?.error?.message || `the server answered ${response.status}`);
    error.code = problem?.error?.code;
    error.wait = response.headers.get("Retry-After");
    throw error;
  }
  return response;
}

function askForToken() {
  return new Promise((done) => {
    const door = $("door");
    door.addEventListener("close", () => {
      state.token = $("token").value.trim();
      sessionStorage.setItem("token", state.token);
      $("token").value = "";
      done();
    }, { once: true });
    door.showModal();
  });
}

function sure(title, text) {
  return new Promise((done) => {
    $("sure-title").textContent = title;
    $("sure-text").textContent = text;
    $("sure").returnValue = "no";
    $("sure").addEventListener("close", () => done($("sure").returnValue === "yes"), { once: true });
    $("sure").showModal();
  });
}

// --- Markdown, the little of it that small models write

function inline(text, parent, cite) {
  const pattern = /`([^`\n]+)`|\*\*([^*\n]+)\*\*|(?<![*\w])\*([^*\s][^*\n]*)\*(?!\w)|\[(\d{1,2})\]|\\([\\`*_{}[\]()#+.!~|>-])/g;
  let at = 0;
  for (const found of text.matchAll(pattern)) {
    parent.append(text.slice(at, found.index));
    at = found.index + found[0].length;
    if (found[1] !== undefined) parent.append(make("code", {}, found[1]));
    else if (found[2] !== undefined) parent.append(make("strong", {}, found[2]));
    else if (found[3] !== undefined) parent.append(make("em", {}, found[3]));
    else if (found[4] !== undefined) parent.append(cite(Number(found[4])) || found[0]);
    else parent.append(found[5]); // escaped: no mark-up
  }
  parent.append(text.slice(at));
  return parent;
}

function markdown(text, cite) {
  const blocks = [];
  const lines = text.split("\n");
  let paragraph = null, list = null;
  for (let n = 0; n < lines.length; n++) {
    const line = lines[n];
    const fence = line.match(/^\s*```/);
    const item = line.match(/^\s*(?:([-*•])|(\d{1,3})[.)])\s+(.*)/);
    const heading = line.match(/^(#{1,6})\s+(.*)/);
    if (fence) {
      const code = [];
      for (n++; n < lines.length && !/^\s*```/.test(lines[n]); n++) code.push(lines[n]);
      blocks.push(make("pre", { tabIndex: 0 }, make("code", {}, code.join("\n"))));
      paragraph = list = null;
    } else if (item) {
      const tag = item[1] ? "UL" : "OL";
      if (list?.tagName !== tag) blocks.push((list = make(tag, item[2] ? { start: Number(item[2]) } : {})));
      list.append(inline(item[3], make("li"), cite));
      paragraph = null;
    } else if (heading) {
      blocks.push(inline(heading[2], make(heading[1].length < 3 ? "h3" : "h4"), cite));
      paragraph = list = null;
    } else if (!line.trim()) {
      paragraph = null;
      if (!/^\s*([-*•]|\d{1,3}[.)])\s/.test(lines[n + 1] || "")) list = null;
    } else {
      list = null;
      if (paragraph) paragraph.append(document.createElement("br"));
      else blocks.push((paragraph = make("p")));
      inline(line, paragraph, cite);
    }
  }
  return blocks;
}

// --- turns

function showUser(text) {
  $("log").append(make("article", { className: "turn user", "aria-label": "You" }, make("p", {}, text)));
}

class Answer {
  // An answer on the page, from its first event to its last.
  constructor() {
    this.text = "";
    this.notes = { tools: [] };
    this.said = make("div", { className: "said" });
    this.facts = make("p", { className: "facts" });
    this.element = make("article", { className: "turn answer working", "aria-label": "Answer" }, this.said, this.facts);
    this.element.setAttribute("aria-busy", "true");
    this.drawn = false;
    $("log").append(this.element);
  }

  add(text) {
    this.text += text;
    if (this.drawn) return;
    this.drawn = true;
    requestAnimationFrame(() => { this.drawn = false; this.draw(); });
  }

  note(notes) {
    if (notes.progress) {
      $("live-speed").textContent = rate(notes.progress.tokens_per_second);
      if (notes.progress.memory_bytes != null) $("live-memory").textContent = size(notes.progress.memory_bytes);
    }
    if (notes.tool) this.showTool(notes.tool);
    if (notes.tools && !this.notes.tools.length) notes.tools.forEach((tool) => this.showTool(tool));
    if (notes.sources) this.showSources(notes.sources);
    if (notes.route) this.notes.route = notes.route.decision || notes.route;
    for (const verdict of [notes.filter || []].flat()) this.showVerdict(verdict);
    if (notes.citations) this.mark(notes.citations);
    if (notes.document) this.notes.document = notes.document;
    if (notes.cost) this.notes.cost = notes.cost;
    if (notes.finish_reason) this.notes.reason = notes.finish_reason;
    if (notes.dropped_turns) this.notes.dropped = notes.dropped_turns;
    this.showFacts();
  }

  draw() {
    const stay = nearEnd();
    this.said.replaceChildren(...markdown(this.text, (number) => this.citation(number)));
    if (stay) toEnd();
  }

  end(stopped) {
    this.notes.stopped = stopped;
    this.draw();
    this.showFacts();
    this.element.classList.remove("working");
    this.element.setAttribute("aria-busy", "false");
  }

  fail(problem, again) {
    this.end(false);
    const wait = problem.wait ? ` Try again in ${problem.wait} s.` : "";
    const text = problem.code === "context_length_exceeded" ? "This conversation is full: begin a new one." : problem.message + wait;
    this.facts.remove();
    const retry = make("button", { type: "button", on: { click: () => { this.element.remove(); again(); } } }, "Try again");
    this.element.append(make("div", { className: "error", role: "alert" }, make("span", {}, text), retry));
    toEnd();
  }

  citation(number) {
    if (!this.sources?.[number - 1]) return null;
    const label = `Source ${number}: ${this.sources[number - 1].document}`;
    return make("button", { type: "button", className: "cite", title: label, "aria-label": label, on: { click: () => this.light(number) } }, String(number));
  }

  light(number) {
    const item = this.items[number - 1];
    for (const each of this.items) each.classList.toggle("lit", each === item);
    const folded = item.closest("details.more");
    if (folded) folded.open = true;
    item.firstChild.open = true;
    item.scrollIntoView({ block: "nearest" });
    item.querySelector("summary").focus({ preventScroll: true });
  }

  showSources(found) {
    this.sources = found.passages || found.found?.passages || [];
    if (!this.sources.length) return;
    this.items = this.sources.map((passage, n) => {
      const where = [passage.heading, `characters ${passage.start}–${passage.end}`].filter(Boolean).join(" · ");
      const summary = make("summary", {}, make("b", {}, String(n + 1)), make("span", { className: "name" }, passage.title || passage.document), make("span", { className: "where" }, `${passage.document} · ${where}`));
      const whole = make("button", { type: "button", className: "whole", on: { click: () => readWhole(passage.document, passage.title) } }, "Ask the whole document");
      return make("li", {}, make("details", {}, summary, make("p", { tabIndex: 0 }, flowing(passage.text)), whole));
    });
    this.element.querySelector(".sources")?.remove();
    this.element.classList.add("sourced");
    this.element.append(make("section", { className: "sources", "aria-label": "Sources" }, make("h3", {}, "Sources"), make("ul", {}, ...this.items)));
  }

  mark(citations) {
    // The checked words of the citations, marked in the passages they come from; passages that nothing cites are folded away.
    const cited = new Set(citations.map(({ number }) => number));
    for (const found of this.text.matchAll(/\[(\d{1,2})\]/g)) cited.add(Number(found[1]));
    const rest = (this.items || []).filter((item, n) => !cited.has(n + 1));
    if (rest.length && rest.length < this.items.length) {
      const title = `${rest.length} more found`;
      this.element.querySelector(".sources").append(make("details", { className: "more" }, make("summary", {}, title), make("ul", {}, ...rest)));
    }
    (this.sources || []).forEach((passage, n) => {
      const spans = citations.filter((c) => c.number === n + 1 && c.start >= passage.start && c.end <= passage.end);
      if (!spans.length) return;
      const text = Array.from(flowing(passage.text)); // Python counts characters, not UTF-16 units
      const parts = [];
      let at = 0;
      for (const { start, end } of spans.sort((x, y) => x.start - y.start)) {
        const [from, to] = [Math.max(at, start - passage.start), end - passage.start];
        if (to <= from) continue;
        parts.push(text.slice(at, from).join(""), make("mark", {}, text.slice(from, to).join("")));
        at = to;
      }
      this.items[n].querySelector("p").replaceChildren(...parts, text.slice(at).join(""));
    });
  }

  showTool({ name, arguments: given, result }) {
    this.notes.tools.push(name);
    const asked = Object.values(given || {}).join(", ");
    const line = make("div", { className: "tool" }, make("strong", {}, name), asked ? ` ${asked} ` : " ", "→ ", make("code", {}, result));
    this.element.insertBefore(line, this.said);
  }

  showVerdict(verdict) {
    const { explanation, action } = verdict.verdict || verdict;
    const words = `${action === "block" ? "Blocked" : "Note"}: ${explanation}`;
    if ([...this.element.querySelectorAll(".filter")].some((line) => line.textContent === words)) return;
    this.element.insertBefore(make("div", { className: "filter" }, words), this.said);
  }

  showFacts() {
    const { route, cost, reason, stopped, dropped, document: read } = this.notes;
    const away = route?.to === "elsewhere";
    const rows = [make("span", { className: away ? "route away" : "route", title: route?.reason || "The model on this machine answers." }, away ? `handed over${route.endpoint ? ` to ${route.endpoint}` : ""}` : "here")];
    if (cost) {
      if (cost.tokens_per_second != null) rows.push(rate(cost.tokens_per_second));
      rows.push(`${cost.generated_tokens ? `${cost.generated_tokens} tokens in ` : ""}${cost.seconds.toFixed(1)} s`);
      rows.push(make("span", { title: cost.joules_reason }, `energy ${joules(cost)}`));
      $("live-speed").textContent = rate(cost.tokens_per_second);
      $("live-energy").textContent = joules(cost);
      $("live-energy").title = cost.joules_reason;
    }
    if (read) {
      const how = { disk: "taken from disk", memory: "still in memory" }[read.origin] || "read";
      rows.push(`whole document, ${read.tokens.toLocaleString("en")} tokens, ${how} in ${read.seconds.toFixed(1)} s`);
    }
    if (dropped) rows.push(`${dropped} earlier turns left out`);
    if (stopped) rows.push(make("span", { className: "cut" }, "stopped"));
    else if (reason === "length" || reason === "context") rows.push(make("span", { className: "cut" }, reason === "length" ? "cut: longest answer reached" : "cut: the context is full"));
    this.facts.replaceChildren(...rows.map((row) => (typeof row === "string" ? make("span", {}, row) : row)));
  }
}

const nearEnd = () => { const main = document.querySelector("main"); return main.scrollHeight - main.scrollTop - main.clientHeight < 90; };
const toEnd = () => { const main = document.querySelector("main"); main.scrollTo({ top: main.scrollHeight, behavior: "instant" }); };

// --- asking

const mode = () => document.querySelector("#modes input:checked")?.value || "plain";

function readWhole(path, title) {
  // The next questions are about this document alone, which the model reads whole; null ends that.
  state.document = path;
  $("whole").hidden = path === null;
  $("whole-name").textContent = path === null ? "" : title || path;
  $("whole").title = path || "";
  const documents = document.querySelector("#modes input[value=documents]");
  if (path !== null && documents) documents.checked = true;
  say(path === null ? "Questions are about all documents" : `Questions are about the whole of ${title || path}`);
  $("question").focus();
}

async function ask(text) {
  $("hello").hidden = true;
  showUser(text);
  state.turns.push({ role: "user", content: text });
  toEnd();
  await answer();
}

async function answer() {
  const view = new Answer();
  const control = new AbortController();
  const id = state.id;
  const finished = () => { running(null); refreshList(); refreshMemory(); };
  running(control);
  view.showFacts();
  toEnd();
  const chosen = mode();
  const body = {
    model: state.status.model + (chosen === "documents" ? ":documents" : ""),
    messages: state.turns,
    stream: true,
    edgekit: { events: true, ...(state.status.records ? { conversation: id } : {}) },
  };
  if (chosen === "documents" && state.document) {
    body.edgekit.document = state.document;
    body.repetition_penalty = 1.1;
  }
  if (chosen === "plain") Object.assign(body, { temperature: 0.3, top_p: 0.9, repetition_penalty: 1.05 });
  if (chosen === "tools") {
    body.edgekit.tools = state.status.tools.map((tool) => tool.name);
    body.tool_choice = "required";
  }
  try {
    const response = await call("/v1/chat/completions", {
      method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal: control.signal,
    });
    location.replace(`#${id}`);
    for await (const data of events(response.body)) {
      if (data.error) throw new Error(data.error.message);
      if (data.choices?.[0]?.delta?.content) view.add(data.choices[0].delta.content);
      if (data.edgekit) view.note(data.edgekit);
    }
    view.end(false);
    say("Answer complete");
  } catch (problem) {
    if (problem.name === "AbortError") {
      view.end(true);
      say("Stopped");
    } else {
      view.fail(problem, () => answer());
      finished();
      return;
    }
  }
  if (state.id === id) state.turns.push({ role: "assistant", content: view.text });
  finished();
}

async function* events(stream) {
  // The JSON of each server-sent event.
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      if (data) yield JSON.parse(data);
    }
  }
}

function running(control) {
  state.running = control;
  $("stop").hidden = control === null;
  $("send").hidden = control !== null;
  for (const button of document.querySelectorAll("#list .open, #new")) button.disabled = control !== null;
  $("question").focus({ preventScroll: true });
}

// --- conversations

async function refreshList() {
  if (!state.status.records) return;
  const { conversations } = await (await call("/api/conversations")).json();
  $("none").hidden = conversations.length > 0;
  $("list").replaceChildren(...conversations.map((row) => {
    const current = row.id === state.id;
    const open = make("button", { type: "button", className: "open", title: row.title, disabled: state.running !== null, on: { click: () => load(row.id) } }, row.title || "(empty)");
    if (current) open.setAttribute("aria-current", "true");
    const drop = make("button", { type: "button", className: "drop", "aria-label": `Delete ${row.title}`, on: { click: () => forget(row) } }, "×");
    return make("li", { className: current ? "now" : "" }, open, drop);
  }));
}

async function refreshMemory() {
  $("live-memory").textContent = size((await (await call("/api/status")).json()).memory_bytes);
}

async function load(id) {
  const { entries } = await (await call(`/api/conversations/${id}`)).json();
  begin(id);
  $("hello").hidden = entries.length > 0;
  for (const entry of entries) {
    state.turns.push({ role: entry.role, content: entry.content });
    if (entry.role === "user") {
      showUser(entry.content);
      continue;
    }
    const view = new Answer();
    view.text = entry.content;
    view.note(entry.facts);
    view.end(entry.facts.stopped);
  }
  location.replace(`#${id}`);
  toEnd();
  await refreshList();
}

function begin(id = newId()) {
  state.id = id;
  state.turns = [];
  if (state.document !== null) readWhole(null);
  $("log").replaceChildren();
  $("hello").hidden = false;
  drawer(false);
}

async function fresh() {
  begin();
  history.replaceState(null, "", location.pathname);
  await refreshList();
  $("question").focus();
}

async function forget(row) {
  if (!(await sure("Delete this conversation?", row.title))) return;
  await call(`/api/conversations/${row.id}`, { method: "DELETE" });
  if (row.id === state.id) await fresh();
  else await refreshList();
}

async function forgetAll() {
  if (!(await sure("Delete all conversations?", "They are overwritten on the disk and cannot be brought back."))) return;
  await call("/api/conversations", { method: "DELETE" });
  await fresh();
}

async function exportAll() {
  const blob = await (await call("/api/export")).blob();
  const link = make("a", { href: URL.createObjectURL(blob), download: "conversations.jsonl" });
  link.click();
  URL.revokeObjectURL(link.href);
}

function drawer(open) {
  $("side").classList.toggle("open", open);
  $("veil").hidden = !open;
  $("menu").setAttribute("aria-expanded", String(open));
}

// --- the beginning

function theme(next) {
  const order = ["system", "light", "dark"];
  const now = localStorage.getItem("theme") || "system";
  const chosen = next ? order[(order.indexOf(now) + 1) % 3] : now;
  if (chosen === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = chosen;
  localStorage.setItem("theme", chosen);
  $("theme").setAttribute("aria-label", `Theme: ${chosen}`);
  $("theme").title = `Theme: ${chosen}`;
}

function modes() {
  const { documents, tools } = state.status;
  const kinds = [["plain", "Model"], ...(documents ? [["documents", "Documents"]] : []), ...(tools.length ? [["tools", "Tools"]] : [])];
  const chosen = documents ? "documents" : "plain";
  $("modes").append(...kinds.map(([value, label]) => make("label", {}, make("input", { type: "radio", name: "mode", value, checked: value === chosen, on: { change: chooseMode } }), label)));
  $("modes").hidden = kinds.length < 2;
  examples();
}

function chooseMode() {
  if (mode() !== "documents" && state.document !== null) readWhole(null);
  examples();
}

function examples() {
  $("examples").replaceChildren(...EXAMPLES[mode()].map((text) => make("li", {}, make("button", { type: "button", on: { click: () => state.running || ask(text) } }, text))));
}

function grow() {
  const box = $("question");
  box.style.height = "auto";
  box.style.height = `${Math.min(box.scrollHeight, 190)}px`;
}

function submit() {
  const text = $("question").value.trim();
  if (!text || state.running || !state.status) return;
  $("question").value = "";
  grow();
  ask(text);
}

async function start() {
  theme(false);
  const fragment = location.hash.slice(1);
  if (fragment.startsWith("token=")) {
    state.token = decodeURIComponent(fragment.slice(6));
    sessionStorage.setItem("token", state.token);
    history.replaceState(null, "", location.pathname);
  }
  try {
    state.status = await (await call("/api/status")).json();
  } catch (problem) {
    $("about").textContent = problem.message;
    return;
  }
  const status = state.status;
  if (status.handover) $("promise").textContent = `The model runs on this machine. Questions that it would get wrong go to ${status.handover}, and the answer says so.`;
  document.title = `${status.model} · edgekit`;
  $("model").textContent = status.model;
  $("about").textContent = `on this machine · ${status.context.toLocaleString("en")} tokens of context${status.documents ? " · with documents" : ""}`;
  $("live-memory").textContent = size(status.memory_bytes);
  $("live-energy").textContent = status.power ? "–" : "n/a";
  $("live-energy").title = status.power_reason;
  $("keeping").hidden = !status.records;
  $("kept").textContent = status.keep_days ? `Kept on this machine for ${status.keep_days} days.` : "Kept on this machine.";
  modes();
  await refreshList();
  if (/^[0-9a-f]{32}$/.test(fragment) && status.records) await load(fragment).catch(() => fresh());
  $("question").focus();
}

$("ask").addEventListener("submit", (event) => { event.preventDefault(); submit(); });
$("question").addEventListener("input", grow);
$("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); submit(); }
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  state.running?.abort();
  drawer(false);
});
$("stop").addEventListener("click", () => state.running?.abort());
$("new").addEventListener("click", fresh);
$("whole-end").addEventListener("click", () => readWhole(null));
$("export").addEventListener("click", exportAll);
$("forget").addEventListener("click", forgetAll);
$("theme").addEventListener("click", () => theme(true));
$("menu").addEventListener("click", () => drawer(!$("side").classList.contains("open")));
$("veil").addEventListener("click", () => drawer(false));
start();
