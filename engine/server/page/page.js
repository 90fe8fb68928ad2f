// The playground: answers one question twice in parallel, plain and steered, and shows the trace of each token.

const COLOURS = [0, 1, 2, 3, 4, 5]; // the classes objective-0 to objective-5 of page.css
const BASE = { text: "base", colour: "base" };
const HINT = "Point at a token of the steered answer, or focus the answer and use the arrow keys.";

const methods = new Map();
let model;
let running = new AbortController();
let steered; // the answer shown in the chart and the detail panel

const $ = (id) => document.getElementById(id);
const make = (tag, properties, ...children) => {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
};

const draw = (tag, attributes, ...children) => {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
};

// The server

async function call(path, options = {}) {
  const headers = { "Content-Type": "application/json" };
  if ($("key").value) headers.Authorization = `Bearer ${$("key").value}`;
  const response = await fetch(path, { ...options, headers });
  if (response.ok) return response;
  if (response.status === 401) $("key-field").hidden = false;
  const body = await response.json().catch(() => ({}));
  throw new Error(body.error?.message ?? `The server answered with status ${response.status}.`);
}

async function* chunks(request, signal) {
  const body = JSON.stringify({ ...request, stream: true, stream_options: { include_usage: true } });
  const response = await call("v1/chat/completions", { method: "POST", body, signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    const lines = (rest + part.value).split("\n");
    rest = lines.pop();
    for (const line of lines.filter((each) => each.startsWith("data:"))) {
      if (line.trim() === "data: [DONE]") return;
      const chunk = JSON.parse(line.slice(5));
      if (chunk.error) throw new Error(chunk.error.message);
      yield chunk;
    }
  }
  throw new Error("The connection closed before the answer was complete.");
}

// fetch throws a TypeError when the network fails
const errorText = (error) => (error instanceof TypeError ? "The connection failed." : error.message);

async function load() {
  try {
    const paths = ["v1/models", "v1/steer/methods"];
    const [models, steer] = await Promise.all(paths.map(async (path) => (await call(path)).json()));
    model = models.data[0].id;
    $("model").textContent = `The model is ${model}.`;
    steer.methods.filter((each) => each.objective_arity !== "none").forEach((each) => methods.set(each.name, each));
    $("method").replaceChildren(...[...methods.keys()].map((name) => new Option(name)));
    showPresets();
    $("page-error").textContent = "";
  } catch (error) {
    $("page-error").textContent = errorText(error);
  }
}

// The request

function addObjective(text, weight) {
  const row = $("objective").content.firstElementChild.cloneNode(true);
  const [name, slider, box] = row.querySelectorAll("input");
  const free = COLOURS.find((colour) => !document.querySelector(`.objective.objective-${colour}`));
  row.dataset.colour = free ?? $("objectives").children.length % COLOURS.length;
  row.classList.add(`objective-${row.dataset.colour}`);
  name.value = text;
  slider.value = box.value = weight;
  slider.addEventListener("input", () => { box.value = slider.value; });
  box.addEventListener("input", () => { slider.value = box.value; });
  row.querySelector(".remove").addEventListener("click", () => { row.remove(); $("add").focus(); });
  $("objectives").append(row);
  return name;
}

function readObjectives() {
  const read = (row) => {
    const [name, slider, box] = row.querySelectorAll("input");
    return { text: name.value.trim(), weight: Number(box.value || slider.value), colour: row.dataset.colour };
  };
  return [...$("objectives").children].map(read).filter((objective) => objective.text);
}

/** The branches besides base: one for each objective, or one for all. */
function branches() {
  const joined = methods.get($("method").value)?.objective_arity === "one";
  return joined ? [{ text: "all objectives", colour: 0 }] : readObjectives();
}

function showPresets() {
  const names = Object.keys(methods.get($("method").value).presets);
  $("preset").replaceChildren(...["published", ...names].map((name) => new Option(name)));
  $("preset").value = names[0] ?? "published";
  $("presets").hidden = !names.length;
  showBudget();
}

function showBudget() {
  const { fields, presets } = methods.get($("method").value);
  const masked = fields.mask_top_p?.default != null; // a method with a mask rejects a budget
  $("budget").hidden = masked || !("kl_budget" in fields);
  $("kl-budget").placeholder = presets[$("preset").value]?.kl_budget ?? "off";
}

/** The number in an input; undefined if it is empty, so that the server's default applies. */
const number = (id) => ($(id).value ? Number($(id).value) : undefined);

function question() {
  const messages = [{ role: "user", content: $("question").value }];
  const [max_tokens, temperature, seed] = ["max-tokens", "temperature", "seed"].map(number);
  return { model, messages, max_tokens, temperature, seed };
}

function steering() {
  const objectives = readObjectives().map(({ text, weight }) => ({ text, weight }));
  const kl_budget = $("budget").hidden ? undefined : number("kl-budget");
  const preset = $("presets").hidden || $("preset").value === "published" ? undefined : $("preset").value;
  return { method: $("method").value || undefined, preset, objectives, kl_budget };
}

// The answers

class Answer {
  constructor(side, branches = []) {
    [this.box, this.status, this.error] = [$(side), $(`${side}-status`), $(`${side}-error`)];
    Object.assign(this, { branches, trace: { tokens: [] }, text: "", selected: -1, count: 0 });
    this.box.replaceChildren();
  }

  take({ choices: [choice], usage }) {
    if (choice) this.add(choice.delta?.content ?? "", choice.trace);
    this.fulfilment = choice?.fulfilment ?? choice?.trace?.fulfilment?.at(-1) ?? this.fulfilment;
    this.notes = choice?.notes ?? this.notes;
    this.finish = choice?.finish_reason ?? this.finish;
    this.count = usage?.completion_tokens ?? this.count;
    this.report("writing");
    if (this === steered) drawChart();
  }

  /** Shows the tokens of a chunk; without a trace, each piece of text counts as one token. */
  add(content, trace) {
    const brought = trace ?? { tokens: content && !this.trace.weights ? [content] : [] };
    for (const [name, list] of Object.entries(brought)) (this.trace[name] ??= []).push(...list);
    this.text += content;
    const kind = this === steered ? { className: "token", tabIndex: -1 } : {};
    this.box.append(...brought.tokens.map((token) => make("span", kind, token)));
    if (!brought.tokens.length) return;
    this.count += brought.tokens.length;
    this.last = performance.now();
    this.first ??= { count: this.count, time: this.last };
  }

  report(state, error = "") {
    const speed = this.first && (1000 * (this.count - this.first.count)) / (this.last - this.first.time);
    const pace = speed > 0 && speed < Infinity ? ` · ${speed.toFixed(1)} tokens/s` : "";
    this.status.textContent = `tokens: ${this.count}${pace} · ${state}`;
    this.error.textContent = error;
    this.box.setAttribute("aria-busy", ["waiting", "writing"].includes(state));
  }

  /** Sets the spans to the pieces of the final text once the answer is complete. */
  settle() {
    spread(this.text, this.trace.tokens).forEach((piece, i) => { this.box.children[i].textContent = piece; });
  }
}

/** Splits a text at its tokens. A character of several tokens goes to the last one; an end token gets "". */
function spread(text, tokens) {
  const pieces = tokens.map(() => "");
  let end = 0;
  tokens.forEach((token, i) => {
    const at = text.indexOf(token, end);
    if (at < 0 || at > end + 8) return;
    pieces[Math.max(i - 1, 0)] += text.slice(end, at);
    pieces[i] += token;
    end = at + token.length;
  });
  const broken = tokens.findLastIndex((token) => token.includes("\uFFFD"));
  if (end < text.length) pieces.splice(broken, 1, pieces.at(broken) + text.slice(end));
  return pieces;
}

async function stream(answer, request, signal) {
  answer.report("waiting");
  try {
    for await (const chunk of chunks(request, signal)) answer.take(chunk);
    answer.settle();
    answer.report(`finish: ${answer.finish ?? "none"}`);
  } catch (error) {
    if (signal !== running.signal) return; // the page already shows the next run
    if (signal.aborted) answer.report("stopped");
    else answer.report("failed", errorText(error));
  }
}

async function run() {
  if (!methods.size) await load();
  running.abort();
  running = new AbortController();
  const { signal } = running;
  $("stop").disabled = false;
  const plain = stream(new Answer("plain"), question(), signal);
  steered = new Answer("steered", branches());
  showSteered();
  const request = { ...question(), steering: { ...steering(), trace: true } };
  if (readObjectives().length) await stream(steered, request, signal);
  else steered.report("not run", "Steering needs an objective; add one.");
  await plain;
  if (signal === running.signal) $("stop").disabled = true;
}

// The chart and the detail panel

function showSteered() {
  drawChart();
  showDetail();
}

function swatch({ text, colour }) {
  return make("span", { className: "branch" }, make("span", { className: `swatch objective-${colour}` }), text);
}

/** What was asked of an objective and what the answer reached, 1 being as if its branch decoded alone. */
function asked({ weight }, reached) {
  if (weight === undefined) return "";
  return ` (asked ${weight.toFixed(2)}` + (reached == null ? ")" : `, reached ${reached.toFixed(2)})`);
}

function drawChart() {
  const { branches, selected, trace: { tokens, weights = [] } } = steered;
  const right = Math.max($("chart").clientWidth, 200) - 12;
  const x = (i) => (32 + (i * (right - 32)) / Math.max(tokens.length - 1, 1)).toFixed(1);
  const y = (weight) => (160 - 150 * weight).toFixed(1);
  const gap = [1, 2, 5, 10, 20, 50, 100, 200, 500].find((each) => tokens.length / each < 8) ?? 1000;
  const write = (x, y, text, more) => draw("text", { x, y, ...more }, text);
  const below = { class: "tick" };
  const rule = (w) => [draw("path", { class: "grid", d: `M32,${y(w)}H${right}` }), write(4, +y(w) + 4, w)];
  const tick = (_, i) => ((i + 1) % gap ? [] : write(x(i), 178, i + 1, below));
  const curve = ({ colour }, k) => {
    const points = weights.map((each, i) => `${x(i)},${y(each[k])}`);
    const d = points.length ? `M${points.join("L")}h0` : ""; // h0 makes a dot of a single point
    return draw("path", { class: `weight objective-${colour}`, "data-points": points.length, d });
  };
  const mark = selected < 0 ? [] : draw("path", { class: "mark", d: `M${x(selected)},10V160` });
  const title = write(right / 2 + 16, 196, "token number", below);
  const parts = [[0, 0.5, 1].map(rule), tokens.map(tick), title, mark, branches.map(curve)].flat(2);
  const head = { width: "100%", height: 200, role: "img", "aria-label": "Weights by token" };
  $("chart").replaceChildren(draw("svg", head, ...parts));
  const entry = (branch, k) => make("li", {}, swatch(branch), asked(branch, steered.fulfilment?.[k]));
  const notes = (steered.notes ?? []).map((note) => make("li", { className: "note" }, note));
  $("legend").replaceChildren(...branches.map(entry), ...notes);
}

function showDetail() {
  const { branches, selected, trace } = steered;
  if (selected < 0) return $("detail").replaceChildren(HINT);
  if (!trace.weights) return $("detail").replaceChildren("This answer has no trace.");
  const [strength, kl] = [trace.strength[selected].toFixed(2), trace.kl[selected]?.toFixed(3) ?? "none"];
  const title = `Token ${selected + 1} of ${trace.tokens.length}: ${JSON.stringify(trace.tokens[selected])}`;
  const head = ["Branch", "Probability", "Weight"].map((text) => make("th", { scope: "col" }, text));
  const [logprobs, weights] = [trace.branch_logprobs[selected], ["", ...trace.weights[selected]]];
  const rows = [BASE, ...branches].map((branch, i) => detailRow(branch, logprobs[i], weights[i]));
  const table = make("table", {}, make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...rows));
  const numbers = `Strength: ${strength} · KL in nats: ${kl}`;
  $("detail").replaceChildren(make("p", {}, title), make("p", {}, numbers), table);
}

function detailRow(branch, logprob, weight) {
  const percent = logprob === null ? 0 : 100 * Math.exp(logprob);
  const bar = make("span", { className: `bar objective-${branch.colour}` }, make("span"));
  bar.firstChild.style.width = `${percent}%`;
  const name = make("th", { scope: "row" }, swatch(branch));
  const probability = make("td", {}, `${percent.toFixed(1)}%`, bar);
  return make("tr", {}, name, probability, make("td", {}, weight && weight.toFixed(3)));
}

function pointAt({ target }) {
  const index = [...$("steered").children].indexOf(target);
  if (index < 0 || index === steered.selected) return;
  $("steered").children[steered.selected]?.classList.remove("selected");
  target.classList.add("selected");
  steered.selected = index;
  showSteered();
}

function moveFocus(event) {
  const [tokens, at] = [$("steered").children, steered.selected];
  const goals = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: tokens.length - 1 };
  const token = tokens[goals[event.key]];
  if (token) event.preventDefault();
  token?.focus();
}

// Copying the call as curl or Python

const here = (path) => new URL(path, location).href;

function callBody() {
  const body = readObjectives().length ? { ...question(), steering: steering() } : question();
  return JSON.parse(JSON.stringify(body)); // drops undefined values
}

function asCurl() {
  const key = $("key").value && `-H "Authorization: Bearer $TRIMTAB_API_KEY" \\\n  `;
  const json = JSON.stringify(callBody(), null, 2).replaceAll("'", "'\\''");
  return `curl ${here("v1/chat/completions")} \\
  ${key}-H 'Content-Type: application/json' \\
  -d '${json}'`;
}

function asPython() {
  const { steering, ...given } = callBody();
  if (steering) given.extra_body = { steering };
  const literal = (value) => JSON.stringify(value, null, 4).replaceAll("\n", "\n    ");
  const lines = Object.entries(given).map(([name, value]) => `    ${name}=${literal(value)},\n`);
  const [head, key] = $("key").value ? ["import os\n\n", 'os.environ["TRIMTAB_API_KEY"]'] : ["", '"none"'];
  return `${head}from openai import OpenAI

client = OpenAI(base_url="${here("v1")}", api_key=${key})
answer = client.chat.completions.create(
${lines.join("")})
print(answer.choices[0].message.content)`;
}

/** Selects the shown text if the page has no clipboard, as over plain http from another machine. */
async function copy(text) {
  Object.assign($("copied"), { textContent: text, hidden: false });
  const done = await navigator.clipboard?.writeText(text).then(() => true, () => false);
  if (!done) getSelection().selectAllChildren($("copied"));
  $("copy-status").textContent = done || document.execCommand("copy") ? "Copied." : "Copy it from below.";
}

// Event handlers

const on = (id, type, action) => $(id).addEventListener(type, action);
on("controls", "submit", (event) => { event.preventDefault(); run(); });
on("stop", "click", () => { running.abort(); $("run").focus(); });
on("add", "click", () => addObjective("", 0.5).focus());
on("key", "change", load);
on("method", "change", showPresets);
on("preset", "change", showBudget);
on("steered", "pointerover", pointAt);
on("steered", "focusin", pointAt);
on("steered", "keydown", moveFocus);
on("copy-curl", "click", () => copy(asCurl()));
on("copy-python", "click", () => copy(asPython()));
document.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
  event.preventDefault(); // otherwise it would also press the focused button
  run();
});

addObjective("Your answer should be uplifting.", 0.7);
addObjective("Your answer should be one short sentence.", 0.3);
steered = new Answer("steered");
new ResizeObserver(showSteered).observe($("chart"));
load();
