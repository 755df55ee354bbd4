// The page: what it knows, when it asks, and what its buttons do. Elements are made in view.js.

import { Failed, Stream, ask, session } from "./api.js";
import { ask_pause, ask_drain, ask_cordon } from "./dialogs.js";
import { h, show } from "./dom.js";
import * as view from "./view.js";
import { span } from "./words.js";

const LOOK_MS = 3000; // memory, temperatures and ages change without an event
const LEAST_MS = 300; // between two looks, however many events come
const LINES = 500;

const place = (id) => document.getElementById(id);
const state = { seen: null, jobs: null, config: null, signed: false, level: "info", query: "" };

// ---- what is shown

function draw() {
  const { seen } = state;
  show(place("top"), view.top(state.signed ? seen : null, theme.now));
  if (!seen) return;
  document.title = `${seen.state} · ${seen.worker || "Bulkhead"}`;
  show(place("headline"), view.headline(seen));
  show(place("holds"), view.holds(seen));
  show(place("gpus"), view.gpus(seen));
  show(place("models"), view.models(seen));
  show(place("jobs"), view.jobs(state.jobs, seen.now));
  show(place("incidents"), view.incidents(seen));
  show(place("config"), view.config(state.config));
}

/** One line at the top; `kind` is "lost" (stays until it is replaced), "bad" or "good" (go by themselves). */
function notice(sentence, kind = "good") {
  show(place("notice"), sentence && h("p", { class: kind }, sentence));
  clearTimeout(notice.timer);
  if (sentence && kind !== "lost") notice.timer = setTimeout(() => notice(""), kind === "good" ? 8000 : 30_000);
}

function signed_out(problem = "") {
  state.signed = false;
  state.seen = null;
  session.forget();
  events.stop();
  log.stop();
  for (const section of document.querySelectorAll("main section")) show(section);
  document.body.classList.add("out");
  document.title = "Bulkhead";
  notice("");
  show(place("headline"), view.login(problem));
  show(place("top"), view.top(null, theme.now));
}

// ---- looking

let looking = false;
let again = false;
let lost = false;
let timer = 0;

/** Look now; a look that is under way is followed by another. */
async function look() {
  if (!state.signed || document.hidden) return;
  if (looking) {
    again = true;
    return;
  }
  looking = true;
  clearTimeout(timer);
  try {
    const [seen, jobs] = await Promise.all([ask("GET", "/v1/status"), jobs_or_why()]);
    Object.assign(state, { seen, jobs });
    if (lost) came_back();
    draw();
  } catch (problem) {
    failed(problem);
  } finally {
    looking = false;
    timer = setTimeout(look, again ? LEAST_MS : LOOK_MS);
    again = false;
  }
}

/** Jobs, or a sentence in their place. */
async function jobs_or_why() {
  try {
    return (await ask("GET", "/v1/jobs?limit=30")).jobs;
  } catch (problem) {
    return plainly(problem, "This supervisor does not list jobs.");
  }
}

/** The sentence that stands in for a part that this supervisor does not have. Everything else is thrown on. */
function plainly(problem, sentence) {
  if (problem.status === 404) return sentence;
  if (problem.status === 503) return problem.message;
  throw problem;
}

function failed(problem) {
  if (problem.status === 401) signed_out("The session has ended.");
  else if (problem.status === 0 || problem.name === "TimeoutError") went_away();
  else notice(problem.message, "bad");
}

function went_away() {
  lost = true;
  document.body.classList.add("lost");
  notice("Connection lost, retrying. What is shown may be old; after a restart `supervisor ui` opens it anew.", "lost");
}

function came_back() {
  lost = false;
  document.body.classList.remove("lost");
  notice("Connected again.");
}

const events = new Stream((last) => `/v1/events${last ? `?since=${encodeURIComponent(last)}` : ""}`, {
  event: () => look(),
  open: () => look(),
  lost: () => look(), // which tells whether the supervisor is gone, or this stream alone
  failed: (problem) => {
    if (problem.status === 401) signed_out("The session has ended.");
  }, // without events there is still a look every few seconds
});

// ---- the log

const log = new Stream(
  (last) => {
    const more = last ? `&since=${encodeURIComponent(last)}` : `&limit=200`;
    return `/v1/logs?follow=1&level=${state.level}&q=${encodeURIComponent(state.query)}${more}`;
  },
  {
    event: ({ name, data }) => {
      if (name === "line") add_line(view.logLine(data));
      if (name === "dropped") add_line(h("li", { class: "quiet" }, `${data.lines ?? "Some"} lines are not kept any more.`));
    },
    lost: (problem) => {
      if (problem.status) only_line(problem.message);
    },
    failed: (problem) => {
      if (problem.status === 401) signed_out("The session has ended.");
      else only_line(problem.status === 404 ? "This supervisor does not show its log." : problem.message);
    },
  },
);

function add_line(line) {
  const lines = place("lines");
  const follows = lines.scrollTop + lines.clientHeight >= lines.scrollHeight - 30;
  lines.append(line);
  while (lines.children.length > LINES) lines.firstChild.remove();
  if (follows) lines.scrollTop = lines.scrollHeight;
}

/** Stands in for the lines that cannot be had. */
function only_line(sentence) {
  show(place("lines"), h("li", { class: "quiet" }, sentence));
}

function begin_log() {
  show(place("logs"), view.logTools(state.level, state.query),
    h("ol", { id: "lines", tabindex: "0", "aria-label": "Log lines, the latest last" }));
  again_log();
}

function again_log() {
  place("lines").replaceChildren();
  log.last = null;
  log.start();
}

// ---- the configuration

async function look_at_config() {
  try {
    const found = await ask("GET", "/v1/config");
    state.config = rows(found);
  } catch (problem) {
    try {
      state.config = plainly(problem, "This supervisor does not show its configuration.");
    } catch {
      failed(problem);
    }
  }
  draw();
}

/** [key, value, where it comes from]; of a supervisor that does not know where, the settings alone. */
function rows(found) {
  const waits = new Set((found.restart ?? []).map((change) => change.key));
  const told = (found.values ?? []).map(({ key, value, source, place: at }) =>
    [key, JSON.stringify(value), [file_name(at) ?? source, waits.has(key) && "from the next start on"].filter(Boolean).join(", ")]);
  return { rows: told.length ? told : flat(found.settings ?? found, ""), problems: found.problems ?? [], path: found.path ?? "" };
}

function file_name(at) {
  return at?.slice(at.lastIndexOf("/") + 1);
}

function flat(value, key) {
  if (value === null || typeof value !== "object" || Array.isArray(value)) return [[key, JSON.stringify(value), ""]];
  return Object.entries(value).flatMap(([name, inner]) => flat(inner, key ? `${key}.${name}` : name));
}

// ---- orders

const of = encodeURIComponent;

async function order(method, path, body, sentence) {
  try {
    const told = await ask(method, path, body);
    notice(told.message ?? sentence);
  } catch (problem) {
    failed(problem);
  }
  look();
}

const ACTS = {
  theme: () => theme.next(),
  "sign-out": async () => {
    await ask("DELETE", "/v1/session").catch(() => {});
    signed_out("Signed out.");
  },
  pause: async () => {
    const wanted = await ask_pause();
    if (wanted) await order("POST", "/v1/pause", wanted, wanted.for_s ? `Paused for ${span(wanted.for_s)}.` : "Paused.");
  },
  free: () => order("POST", "/v1/pause", { free_vram: true, reason: "GPU memory is wanted" }, "Paused; idle models are ended, and come back on Resume."),
  resume: () => order("POST", "/v1/resume", {}, "Resumed."),
  lift: ({ gpu, kind_of_job: kind }) => order("POST", "/v1/resume", gpu || kind ? { gpu, kind } : {}, "Lifted."),
  drain: async () => {
    const wanted = await ask_drain(state.seen.jobs);
    if (wanted) await order("POST", "/v1/drain", wanted, "Draining.");
  },
  cordon: async ({ gpu, name }) => {
    const wanted = await ask_cordon(name);
    if (wanted) await order("POST", `/v1/gpus/${of(gpu)}/cordon`, wanted, `${name} is kept free.`);
  },
  uncordon: ({ gpu }) => order("POST", `/v1/gpus/${of(gpu)}/uncordon`, {}, "It is used again."),
  load: ({ model }) => order("POST", `/v1/models/${of(model)}/load`, {}, `${model} is loaded.`),
  unload: ({ model }) => order("POST", `/v1/engines/${of(model)}/unload`, {}, `${model} is unloaded.`),
  restart: ({ model }) => order("POST", `/v1/engines/${of(model)}/restart`, {}, `${model} is started again.`),
  cancel: ({ job }) => order("POST", `/v1/jobs/${of(job)}/cancel`, {}, "The job is cancelled."),
};

document.addEventListener("click", async (event) => {
  const button = event.target.closest("button[data-act]");
  if (!button) return;
  button.disabled = true;
  try {
    await ACTS[button.dataset.act](button.dataset);
  } finally {
    button.disabled = false;
  }
});

document.addEventListener("change", (event) => {
  if (event.target.id !== "level") return;
  state.level = event.target.value;
  again_log();
});

document.addEventListener("input", (event) => {
  if (event.target.id !== "query") return;
  state.query = event.target.value.trim();
  clearTimeout(again_log.timer);
  again_log.timer = setTimeout(again_log, 300);
});

document.addEventListener("toggle", (event) => {
  if (event.target.open && event.target.closest("#config")) look_at_config();
}, true);

document.addEventListener("visibilitychange", look);

// ---- light and dark

const theme = {
  words: ["system", "light", "dark"],
  now: localStorage.getItem("bulkhead-theme") ?? "system",
  apply() {
    document.documentElement.dataset.theme = this.now;
  },
  next() {
    this.now = this.words[(this.words.indexOf(this.now) + 1) % 3];
    localStorage.setItem("bulkhead-theme", this.now);
    this.apply();
    show(place("top"), view.top(state.signed ? state.seen : null, this.now));
  },
};

// ---- the beginning

async function begin() {
  theme.apply();
  try {
    await session.open();
  } catch (problem) {
    if (!(problem instanceof Failed)) throw problem;
    return signed_out(problem.message);
  }
  if (!session.token) return signed_out();
  document.body.classList.remove("out");
  state.signed = true;
  state.config = state.config ?? "Loading…";
  await look();
  if (!state.signed) return;
  begin_log();
  events.start();
}

window.addEventListener("hashchange", () => {
  if (location.hash) begin();
});
begin();
