// The page: what it knows, when it asks, and what its buttons do. Elements are made in view.js and tables.js.

import { Failed, Feed, ask, fetched, session } from "./api.js";
import * as dialogs from "./dialogs.js";
import { h, show } from "./dom.js";
import * as tables from "./tables.js";
import * as view from "./view.js";

const JOBS_SHOWN = 25; // as many as the feed brings
const LINES_SHOWN = 50; // of a job's log
const AGES_MS = 10_000; // how often ages go on where nothing else changes
const USAGE_MS = 60_000;

const place = (id) => document.getElementById(id);
const nothing = () => ({ head: {}, workers: {}, queues: {}, deployments: {}, jobs: {}, pending: {}, trouble: {} });
const state = {
  seen: null, ahead: 0, signed: false,
  query: "", first: { workers: 0, queues: 0 },
  job: { state: "", page: 0, befores: [""], found: null, more: false, history: {} },
  usage: { by: "tenant", days: "7", found: null }, keys: null,
};

// ---- what is shown

const now = () => Date.now() + state.ahead;
let due = 0;

/** Draw before the next frame, however many events come until then. */
function draw() {
  due ||= requestAnimationFrame(() => {
    due = 0;
    if (state.seen) draw_now();
  });
}

function draw_now() {
  const { seen } = state;
  document.title = `${seen.head.workers} workers, ${seen.head.waiting} waiting · Bulkhead`;
  show(place("headline"), view.headline(seen));
  show(place("pending"), view.pending(seen));
  show(place("workers"), view.workersTools(seen.head.workers, state.query), view.workers(seen, state.query, bounded("workers", view.wanted(seen, state.query).length, view.WORKERS_SHOWN)));
  show(place("queues"), view.queues(seen, now(), bounded("queues", Object.keys(seen.queues).length, view.QUEUES_SHOWN)));
  show(place("deployments"), tables.deployments(Object.values(seen.deployments)));
  draw_jobs();
  show(place("usage"), tables.usageTools(state.usage.by, state.usage.days), tables.usage(state.usage.found, state.usage.by));
  show(place("keys"), tables.keys(state.keys));
}

/** Where a list begins; what it lost must not leave an empty page. */
function bounded(name, total, step) {
  while (state.first[name] > 0 && state.first[name] >= total) state.first[name] -= step;
  return state.first[name];
}

/** The first page of all jobs is the feed's; every other is asked for. */
const live = () => !state.job.state && state.job.page === 0;

function draw_jobs() {
  const { job, seen } = state;
  let rows = job.found;
  if (live()) {
    rows = Object.values(seen.jobs).sort((a, b) => (a.id < b.id ? 1 : -1));
    job.more = rows.length >= JOBS_SHOWN;
  } else if (Array.isArray(rows)) {
    rows = rows.map((one) => seen.jobs[one.id] ?? one);
  }
  if (Array.isArray(rows)) rows = rows.map((one) => ({ ...one, history: job.history[one.id] }));
  show(place("jobs"), tables.jobsTools(job.state), tables.jobs(rows, now(), job));
}

/** One line at the top; `kind` is "lost" (stays until it is replaced), "bad" or "good" (go by themselves). */
function notice(sentence, kind = "good") {
  show(place("notice"), sentence && h("p", { class: kind }, sentence));
  clearTimeout(notice.timer);
  if (sentence && kind !== "lost") notice.timer = setTimeout(() => notice(""), kind === "good" ? 8000 : 30_000);
}

function signed_out(problem = "") {
  Object.assign(state, { signed: false, seen: null, keys: null });
  state.usage.found = null;
  session.forget();
  feed.stop();
  place("dialog").close();
  for (const section of document.querySelectorAll("main section")) show(section);
  document.body.classList.add("out");
  document.body.classList.remove("lost");
  document.title = "Bulkhead coordinator";
  notice("");
  show(place("headline"), view.login(problem));
  show(place("top"), view.top(false, theme.now));
}

function signed_in() {
  state.signed = true;
  document.body.classList.remove("out");
  show(place("headline"), h("p", { class: "quiet" }, "Loading…"));
  show(place("top"), view.top(true, theme.now));
  feed.start();
  look_at_keys();
  look_at_usage();
}

// ---- the feed

let lost = false;

function take({ name, data }) {
  state.ahead = data.now_ms - Date.now();
  if (name === "snapshot") state.seen = { ...nothing(), ...unpacked(data.all) };
  if (name === "change" && state.seen) {
    for (const [section, rows] of Object.entries(data.set)) Object.assign(part(section), rows);
    for (const [section, ids] of Object.entries(data.gone)) for (const id of ids) delete part(section)[id];
    if (data.set.head) state.seen.head = data.set.head[""];
  }
  draw();
}

/** Of a coordinator that cannot look yet there is no more than its trouble. */
const UNKNOWN = { state: "unknown", version: "", workers: 0, workers_shown: 0, waiting: 0 };
const unpacked = (all) => ({ ...all, head: all.head?.[""] ?? { ...UNKNOWN, began_ms: now() } });

function part(section) {
  return (state.seen[section] ??= {});
}

const feed = new Feed({
  event: take,
  open: () => {
    if (!lost) return;
    lost = false;
    document.body.classList.remove("lost");
    notice("Connected again.");
  },
  lost: (problem) => {
    lost = true;
    document.body.classList.add("lost");
    notice(`Connection lost, retrying. ${problem.status ? problem.message : "What is shown may be old."}`, "lost");
  },
  failed: () => signed_out("The session has ended; the key was revoked, or twelve hours are over."),
});

// ---- what is asked for

function failed(problem) {
  if (problem.status === 401) signed_out("The session has ended; the key was revoked, or twelve hours are over.");
  else if (problem instanceof Failed) notice(problem.message, "bad");
  else if (problem.name === "TimeoutError") notice("The coordinator did not answer in time; look whether it happened, and try again.", "bad");
  else throw problem;
}

/** What was asked for, or the sentence that stands in its place. */
async function found_or_why(asked, missing) {
  try {
    return await asked();
  } catch (problem) {
    if (problem.status === 401 || !(problem instanceof Failed)) failed(problem);
    return problem.status === 404 ? missing : problem.message;
  }
}

let jobs_asked = 0;

async function look_at_jobs() {
  const { job } = state;
  if (live()) return draw();
  const number = ++jobs_asked;
  const query = new URLSearchParams({ limit: JOBS_SHOWN });
  if (job.state) query.set("state", job.state);
  if (job.befores[job.page]) query.set("before", job.befores[job.page]);
  const found = await found_or_why(() => ask("GET", `/v1/admin/jobs?${query}`), "This coordinator does not list jobs.");
  if (number !== jobs_asked) return;
  job.found = typeof found === "string" ? found : found.data;
  job.more = Boolean(found.more);
  draw();
}

function turn_jobs(step) {
  const { job } = state;
  if (step > 0) {
    const rows = live() ? Object.keys(state.seen.jobs).sort() : job.found.map((one) => one.id).sort();
    job.befores[job.page + 1] = rows[0];
  }
  job.page = Math.max(0, job.page + step);
  job.found = null;
  return look_at_jobs();
}

async function look_at_history(id) {
  const told = await found_or_why(() => ask("GET", `/v1/admin/jobs/${of(id)}`), "The job is not kept any more.");
  const known = { attempts: typeof told === "string" ? told : told.attempts, log: null };
  state.job.history[id] = known;
  draw();
  if (typeof told === "string") return;
  known.log = await found_or_why(() => ask("GET", `/v1/admin/jobs/${of(id)}/logs?limit=${LINES_SHOWN}`), "This coordinator keeps no lines of jobs.");
  draw();
}

const usage_query = (more = {}) => {
  const begin = new Date(Date.now() - (Number(state.usage.days) - 1) * 86_400_000).toISOString().slice(0, 10);
  return `/v1/usage?${new URLSearchParams({ group_by: state.usage.by, from: begin, ...more })}`;
};

async function look_at_usage() {
  clearTimeout(look_at_usage.timer);
  if (!state.signed) return;
  const asked = usage_query();
  const found = document.hidden ? null : await found_or_why(() => ask("GET", asked), "This coordinator does not count usage.");
  if (found && asked === usage_query()) state.usage.found = typeof found === "string" ? found : found.data;
  look_at_usage.timer = setTimeout(look_at_usage, USAGE_MS);
  draw();
}

async function look_at_keys() {
  const found = await found_or_why(() => ask("GET", "/v1/keys"), "This coordinator does not list keys.");
  state.keys = typeof found === "string" ? found : found.data;
  draw();
}

async function save_usage() {
  const response = await fetched("GET", usage_query({ format: "csv" }));
  const address = URL.createObjectURL(await response.blob());
  h("a", { href: address, download: `usage-by-${state.usage.by}.csv` }).click();
  setTimeout(() => URL.revokeObjectURL(address), 60_000);
}

// ---- orders

const of = encodeURIComponent;

async function order(path, body, sentence) {
  const told = await ask("POST", path, body);
  notice(told.message ?? sentence);
}

const ACTS = {
  theme: () => theme.next(),
  "sign-out": async () => {
    await session.close();
    signed_out("Signed out.");
  },
  workers: ({ step }) => turn("workers", step * view.WORKERS_SHOWN),
  queues: ({ step }) => turn("queues", step * view.QUEUES_SHOWN),
  jobs: ({ step }) => turn_jobs(Number(step)),
  csv: save_usage,
  pause: async ({ worker }) => {
    const wanted = await dialogs.ask_pause(worker);
    if (wanted) await order(`/v1/workers/${of(worker)}/pause`, wanted, `${worker} was told to pause.`);
  },
  resume: ({ worker }) => order(`/v1/workers/${of(worker)}/resume`, {}, `${worker} was told to go on; what its owner holds stays held.`),
  drain: async ({ worker, running }) => {
    if (await dialogs.ask_drain(worker, Number(running))) await order(`/v1/workers/${of(worker)}/drain`, {}, `${worker} was told to drain.`);
  },
  revoke: async ({ worker }) => {
    if (await dialogs.ask_revoke_worker(worker)) await order(`/v1/workers/${of(worker)}/revoke`, {}, `${worker} was put out.`);
    look_at_keys();
  },
  approve: async ({ id }) => {
    const wanted = await dialogs.ask_approve(state.seen.pending[id]);
    if (wanted) await order(`/v1/registrations/${of(id)}/approve`, wanted, "Let in; the worker learns so at its next question.");
  },
  reject: async ({ id }) => {
    const wanted = await dialogs.ask_reject(state.seen.pending[id]);
    if (wanted) await order(`/v1/registrations/${of(id)}/reject`, wanted, "Rejected.");
  },
  cancel: async ({ job, model }) => {
    if (await dialogs.ask_cancel({ id: job, model })) await order(`/v1/jobs/${of(job)}/cancel`, {}, "The job is cancelled.");
    if (!live()) look_at_jobs();
  },
  retry: async ({ job }) => {
    await order(`/v1/jobs/${of(job)}/retry`, {}, "The job waits for another try.");
    delete state.job.history[job];
    if (!live()) look_at_jobs();
  },
  "revoke-key": async ({ prefix }) => {
    const key = state.keys.find((one) => one.prefix === prefix);
    if (await dialogs.ask_revoke_key(key)) await order(`/v1/keys/${of(prefix)}/revoke`, {}, `The key ${prefix}… is good no more.`);
    if (state.signed) look_at_keys();
  },
};

function turn(name, step) {
  state.first[name] = Math.max(0, state.first[name] + step);
  draw();
}

const busy = new WeakSet();

document.addEventListener("click", async (event) => {
  const button = event.target.closest("button[data-act]");
  if (!button || busy.has(button)) return;
  busy.add(button); // and not disabled: what is disabled loses the focus that a closed dialog gives back
  try {
    await ACTS[button.dataset.act](button.dataset);
  } catch (problem) {
    failed(problem);
  } finally {
    busy.delete(button);
    draw();
  }
});

document.addEventListener("submit", async (event) => {
  if (event.target.id !== "login") return;
  event.preventDefault();
  const field = event.target.elements.key;
  const submit = event.target.querySelector("button");
  submit.disabled = true;
  try {
    await session.open(field.value.trim());
    signed_in();
  } catch (problem) {
    show(place("headline"), view.login(problem.message ?? "The coordinator does not answer."));
    const again = place("login").elements.key;
    again.value = "";
    again.focus();
    place("login").querySelector("button").disabled = false;
  }
});

const CHANGES = {
  "job-state": (value) => {
    Object.assign(state.job, { state: value, page: 0, befores: [""], found: null });
    draw();
    return look_at_jobs();
  },
  "usage-by": (value) => {
    Object.assign(state.usage, { by: value, found: null });
    draw();
    return look_at_usage();
  },
  "usage-days": (value) => {
    Object.assign(state.usage, { days: value, found: null });
    draw();
    return look_at_usage();
  },
};

document.addEventListener("change", (event) => CHANGES[event.target.id]?.(event.target.value));

document.addEventListener("input", (event) => {
  if (event.target.id !== "find-worker") return;
  state.query = event.target.value.trim();
  state.first.workers = 0;
  draw();
});

document.addEventListener("toggle", (event) => {
  const id = event.target.dataset?.history;
  if (id && event.target.open) look_at_history(id);
}, true);

setInterval(() => state.signed && !document.hidden && draw(), AGES_MS);

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
    show(place("top"), view.top(state.signed, this.now));
  },
};

// ---- the beginning

theme.apply();
if (session.half) signed_in();
else signed_out();
