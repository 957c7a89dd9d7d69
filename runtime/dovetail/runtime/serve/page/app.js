// The page: a conversation with the server's own API, and what the engine did for each answer.

import { Bars, drawTree, told } from "./tree.js";
import { draw, element } from "./text.js";

const at = (id) => document.getElementById(id);
const DEFAULTS = { system: "", temperature: 0.7, top_p: 0.95, top_k: 0, min_p: 0, repetition_penalty: 1, max_tokens: 512, seed: "" };
const EXAMPLES = [
  "Write a Python function that merges two sorted lists.",
  "List the planets with their distance from the Sun.",
  "Explain how a dovetail joint holds without glue.",
];

let model = null; // the name that the server gives its model
let turns = []; // {role: "user", text} and {role: "assistant", runs, node}
let running = null; // {turn, run, abort} of the answer that is written now
let shown = null; // the run whose rounds are shown
const speeds = { drafted: { tokens: 0, ms: 0 }, plain: { tokens: 0, ms: 0 } }; // sums over this page's answers
const bars = new Bars(at("bars"));

// --- settings

const store = (place, key) => ({
  get: () => { try { return place().getItem(key); } catch { return null; } }, // storage may be off
  set: (value) => { try { place().setItem(key, value); } catch { /* then a setting lasts as long as the page */ } },
});
const kept = store(() => localStorage, "dovetail"), keptKey = store(() => sessionStorage, "dovetail-key");
let settings = { ...DEFAULTS };
try { settings = { ...DEFAULTS, ...JSON.parse(kept.get() ?? "{}") }; } catch { /* not ours: the defaults */ }
let key = keptKey.get() ?? "";

function showSettings(values) {
  const fields = at("settings-form").elements;
  for (const name of Object.keys(DEFAULTS)) fields[name].value = values[name];
  fields.key.value = key;
}

at("open-settings").addEventListener("click", () => { showSettings(settings); at("settings").showModal(); });
at("close-settings").addEventListener("click", () => at("settings").close());
at("reset").addEventListener("click", () => showSettings(DEFAULTS));
at("settings-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const fields = event.target.elements;
  for (const [name, usual] of Object.entries(DEFAULTS)) {
    const value = fields[name].value;
    settings[name] = typeof usual === "number" ? Number(value) : value;
  }
  kept.set(JSON.stringify(settings));
  if (key !== fields.key.value) {
    key = fields.key.value;
    keptKey.set(key);
    findModel();
  }
  at("settings").close();
});

// --- the server

const headers = () => ({ "content-type": "application/json", ...(key ? { authorization: `Bearer ${key}` } : {}) });

async function findModel() {
  try {
    const reply = await fetch("/v1/models", { headers: headers() });
    if (!reply.ok) throw new Error(await reason(reply));
    model = (await reply.json()).data[0].id;
    at("model").textContent = model;
  } catch (error) {
    at("model").textContent = error instanceof TypeError ? "The server does not answer" : error.message;
  }
}

async function reason(reply) {
  try { return (await reply.json()).error.message; } catch { return `The server answers ${reply.status}`; }
}

/** Yields the data of each server-sent event. */
async function* events(reply) {
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    const parts = text.split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const data = part.split("\n").filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trimStart());
      if (data.length && data[0] !== "[DONE]") yield JSON.parse(data.join("\n"));
    }
  }
}

/** Returns the conversation up to `turn`, without questions that got no answer. */
function said(turn) {
  const end = turns.indexOf(turn), messages = [];
  for (let index = 0; index < end; index += 2) {
    const question = { role: "user", content: turns[index].text }, reply = turns[index + 1].runs.at(-1)?.text;
    if (index + 1 === end) messages.push(question);
    else if (reply) messages.push(question, { role: "assistant", content: reply });
  }
  return messages;
}

function request(run, messages) {
  const { system, seed, ...sampling } = run.settings;
  const said = system.trim() ? [{ role: "system", content: system }, ...messages] : messages;
  return JSON.stringify({
    model, messages: said, stream: true, stream_options: { include_usage: true, include_rounds: true },
    speculate: run.speculate, seed: run.seed, ...sampling,
  });
}

// --- a run: one answer to one question

function newRun(speculate, seed) {
  return {
    speculate, seed, settings: { ...settings }, text: "", thought: "", rounds: [], tokens: 0, metrics: null, finish: null,
    fault: null, begin: performance.now(), first: null, last: null,
  };
}

function take(run, chunk) {
  if (chunk.error) throw new Error(chunk.error.message);
  const choice = chunk.choices?.[0], own = chunk.dovetail;
  if (choice?.delta?.content) run.text += choice.delta.content;
  if (choice?.delta?.reasoning_content) run.thought += choice.delta.reasoning_content;
  if (choice?.finish_reason) run.finish = choice.finish_reason;
  if (chunk.usage) run.tokens = chunk.usage.completion_tokens;
  if (own?.metrics) run.metrics = own.metrics;
  if (own?.tokens) {
    run.last = performance.now();
    run.first ??= run.last;
    run.tokens += own.tokens;
  }
  if (own?.tree) run.rounds.push(own);
}

/** Returns the figures of a run: the engine's own at the end, those of this page's clock before. */
function figures(run) {
  const passes = run.rounds.length, later = run.tokens - 1;
  const ms = run.metrics?.decode_ms ?? (run.first === null ? 0 : run.last - run.first);
  return {
    perSecond: run.metrics?.tokens_per_second || (later > 0 && ms > 0 ? (later / ms) * 1000 : null),
    perPass: passes && later > 0 ? later / passes : null,
    first: run.first === null ? null : run.first - run.begin, later, ms,
    draft: passes ? run.rounds.reduce((sum, round) => sum + round.draft_ms, 0) / passes : null,
    verify: passes ? run.rounds.reduce((sum, round) => sum + round.verify_ms, 0) / passes : null,
  };
}

async function answer(turn, run) {
  const abort = new AbortController();
  running = { turn, run, abort };
  turn.runs.push(run);
  setBusy(true);
  watch(run);
  show();
  say(run.speculate ? "Answering." : "Answering without drafts.");
  const messages = said(turn);
  try {
    const reply = await fetch("/v1/chat/completions", { method: "POST", headers: headers(), body: request(run, messages), signal: abort.signal });
    if (!reply.ok) throw new Error(await reason(reply));
    for await (const chunk of events(reply)) {
      take(run, chunk);
      soon();
    }
    if (!run.finish) throw new Error("The connection ended before the answer did");
  } catch (error) {
    if (error.name === "AbortError") run.finish = "stopped";
    else run.fault = error instanceof TypeError ? "The server does not answer. Is it running?" : error.message;
  }
  running = null;
  if (run.finish !== "stopped" && !run.fault) count(run);
  show();
  setBusy(false);
  read(run, true);
  say(run.fault ? "The answer failed." : run.finish === "stopped" ? "Stopped." : "The answer is complete.");
}

function count(run) {
  const { later, ms } = figures(run), sum = speeds[run.speculate ? "drafted" : "plain"];
  if (later > 0 && ms > 0) { sum.tokens += later; sum.ms += ms; }
}

// --- drawing, at most once a frame

let due = false;
function soon() {
  if (due) return;
  due = true;
  requestAnimationFrame(() => { due = false; if (running) show(); });
}

function show() {
  const talk = at("talk"), low = talk.scrollHeight - talk.scrollTop - talk.clientHeight < 60;
  for (const turn of turns) if (turn.role === "assistant" && turn.changed !== signature(turn)) drawTurn(turn);
  if (low) talk.scrollTop = talk.scrollHeight;
  if (running) read(running.run, false);
  drawWork();
}

const signature = (turn) => JSON.stringify([turn.runs.length, turn.runs.map((run) => [run.text.length, run.thought.length, run.tokens, run.finish, run.fault]), turn === turns.at(-1), running?.turn === turn]);

function drawTurn(turn) {
  turn.changed = signature(turn);
  const run = turn.runs.at(-1), live = running?.turn === turn, { node } = turn;
  node.classList.toggle("busy", live);
  const thought = node.querySelector(".thought");
  thought.hidden = !run.thought;
  thought.querySelector("p").textContent = run.thought;
  draw(node.querySelector(".text"), run.text);
  const fault = node.querySelector(".fault");
  fault.hidden = !run.fault;
  fault.textContent = run.fault ?? "";
  const list = node.querySelector(".runs");
  list.replaceChildren(...turn.runs.filter((each) => each.tokens).map(drawRun));
  const [one, other] = turn.runs.slice(-2);
  if (other && !live && one.finish === other.finish && !other.fault && other.finish !== "stopped") {
    list.append(element("span", one.text === other.text ? { class: "same" } : {}, one.text === other.text ? "The same text" : "Another text"));
  }
  if (!running && turn === turns.at(-1)) {
    const label = run.fault ? "Try again" : run.speculate ? "Again without drafts" : "Again with drafts";
    list.append(element("button", { type: "button", class: "again", onclick: () => again(turn, run) }, label));
  }
}

function drawRun(run) {
  const { perSecond, perPass } = figures(run), ended = { length: " · ended at its limit", stopped: " · stopped" }[run.finish] ?? "";
  const parts = [`${run.tokens} ${run.tokens === 1 ? "token" : "tokens"}`];
  if (perSecond) parts.push(`${perSecond.toFixed(1)} a second`);
  if (perPass && run.speculate) parts.push(`${perPass.toFixed(2)} a pass`);
  return element("span", { class: "run" }, element("span", { class: run.speculate ? "mode" : "mode plain" }, run.speculate ? "drafted" : "plain"), parts.join(" · ") + ended);
}

function drawWork() {
  if (!shown) return;
  const { rounds } = shown, pick = at("pick");
  while (bars.rounds < rounds.length) bars.add(rounds[bars.rounds]);
  at("strip").style.width = `${Math.min(rounds.length / 40, 1) * 100}%`;
  pick.disabled = !rounds.length;
  pick.max = Math.max(rounds.length, 1);
  if (at("follow").checked) pick.value = pick.max;
  drawRound();
  const { perSecond, perPass, first, draft, verify } = figures(shown);
  at("per-pass").textContent = perPass ? perPass.toFixed(2) : "–";
  at("per-second").textContent = perSecond ? perSecond.toFixed(1) : "–";
  at("first").textContent = first === null ? "–" : first < 1000 ? `${Math.round(first)} ms` : `${(first / 1000).toFixed(1)} s`;
  at("split").hidden = draft === null;
  if (draft !== null) {
    at("draft-part").style.flexGrow = draft;
    at("verify-part").style.flexGrow = verify;
    at("draft-ms").textContent = `${draft.toFixed(1)} ms`;
    at("verify-ms").textContent = `${verify.toFixed(1)} ms`;
  }
  drawDuel();
}

let drawn = null;
function drawRound() {
  const index = Number(at("pick").value) - 1, round = shown.rounds[index];
  if (!round || drawn === round) return;
  drawn = round;
  bars.pick(index);
  drawTree(at("tree"), round);
  const kept = round.tree.accepted.length, drafted = round.tree.tokens.length - 1;
  at("round").textContent = drafted ? `Round ${index + 1}: ${kept} of ${drafted} accepted` : `Round ${index + 1}: plain`;
  at("pick").setAttribute("aria-valuetext", `Round ${index + 1} of ${shown.rounds.length}. ${told(round)}`);
}

function drawDuel() {
  const speed = Object.fromEntries(Object.entries(speeds).map(([mode, { tokens, ms }]) => [mode, ms ? (tokens / ms) * 1000 : null]));
  const now = running && figures(running.run).perSecond;
  if (now) speed[running.run.speculate ? "drafted" : "plain"] ??= now;
  const most = Math.max(speed.drafted ?? 0, speed.plain ?? 0);
  for (const mode of ["drafted", "plain"]) {
    at(`speed-${mode}`).textContent = speed[mode] ? `${speed[mode].toFixed(1)} tokens/s` : "–";
    at(`lane-${mode}`).style.width = speed[mode] ? `${(100 * speed[mode]) / most}%` : "0";
  }
  if (!speeds.drafted.ms || !speeds.plain.ms) return;
  const ratio = speed.drafted / speed.plain;
  at("verdict").replaceChildren("Drafts make this server ", element("strong", {}, `${ratio.toFixed(2)}×`), " as fast, over the answers on this page.");
}

function redraw() {
  drawn = null;
  if (shown) drawRound();
}

/** Shows the rounds of a run from now on. */
function watch(run) {
  shown = run;
  drawn = null;
  bars.clear();
  at("tree").replaceChildren(element("p", { class: "note" }, "The tree of each round appears here."));
  at("round").textContent = "No round yet";
  drawWork();
}

// --- what a screen reader says: states, and each sentence once it is complete

function say(text) { at("status").textContent = text; }

let spoken = { run: null, length: 0 };
function read(run, end) {
  if (spoken.run !== run) {
    spoken = { run, length: 0 };
    at("spoken").replaceChildren();
  }
  const rest = run.text.slice(spoken.length);
  const ready = end ? rest.length : Math.max(...[...rest.matchAll(/[.!?:]\s|\n|[。！？]/g)].map((found) => found.index + found[0].length), 0);
  const words = rest.slice(0, ready).replace(/\*\*|`+|^#+ /gm, ""); // marks are not read out
  if (words.trim()) at("spoken").append(element("p", {}, words));
  spoken.length += ready;
  if (end && run.fault) at("spoken").append(element("p", {}, run.fault));
}

// --- the conversation

function setBusy(busy) {
  const [gone, here] = busy ? [at("send"), at("stop")] : [at("stop"), at("send")], focused = document.activeElement === gone;
  gone.hidden = true;
  here.hidden = false;
  if (focused) here.focus();
}

function add(turn) {
  at("welcome").hidden = true;
  turns.push(turn);
  at("turns").append(turn.node);
  at("talk").scrollTop = at("talk").scrollHeight;
}

function ask(text) {
  if (running || !text.trim()) return;
  const seed = settings.seed === "" ? Math.floor(Math.random() * 2 ** 31) : Number(settings.seed);
  add({ role: "user", text, node: element("li", { class: "turn user" }, element("h3", { class: "hidden" }, "You"), text) });
  const node = element("li", { class: "turn answer" }, element("h3", {}, "Answer"),
    element("details", { class: "thought", hidden: "" }, element("summary", {}, "Reasoning"), element("p")),
    element("div", { class: "text" }), element("p", { class: "fault", hidden: "" }), element("div", { class: "runs" }));
  const turn = { role: "assistant", runs: [], node };
  add(turn);
  answer(turn, newRun(at("speculate").checked, seed));
}

/** Writes an answer once more: the other way, or the same way after a fault. */
function again(turn, run) {
  if (running) return;
  focusMessage();
  if (run.fault) turn.runs.pop();
  const next = newRun(run.fault ? run.speculate : !run.speculate, run.seed);
  next.settings = run.fault ? { ...settings } : run.settings; // the same question, so that the figures compare
  answer(turn, next);
}

function fresh() {
  running?.abort.abort();
  turns = [];
  shown = null;
  at("turns").replaceChildren();
  at("spoken").replaceChildren();
  at("welcome").hidden = false;
  focusMessage();
}

/** Puts the focus into the message field, unless that would open a keyboard on the screen. */
function focusMessage() {
  if (matchMedia("(pointer: fine)").matches) at("message").focus();
  else at("talk").focus();
}

function fit() {
  const field = at("message");
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight}px`;
}

at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) return;
  const text = at("message").value;
  at("message").value = "";
  fit();
  ask(text);
});
at("message").addEventListener("input", fit);
at("message").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    at("ask").requestSubmit();
  }
});
at("stop").addEventListener("click", () => running?.abort.abort());
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !at("settings").open) running?.abort.abort();
});
at("fresh").addEventListener("click", fresh);
at("pick").addEventListener("input", () => {
  at("follow").checked = at("pick").value === at("pick").max;
  if (shown) drawRound();
});
addEventListener("resize", redraw);
at("follow").addEventListener("change", drawWork);
at("show-work").addEventListener("click", () => {
  const open = at("work").classList.toggle("open");
  at("show-work").setAttribute("aria-expanded", String(open));
  redraw();
});
at("examples").append(...EXAMPLES.map((text) => element("li", {}, element("button", { type: "button", onclick: () => { focusMessage(); ask(text); } }, text))));
findModel();
focusMessage();
