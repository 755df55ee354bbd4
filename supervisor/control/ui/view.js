// From what the supervisor told to elements. Nothing here asks, remembers or changes anything.

import { h } from "./dom.js";
import { clock, day, gib, plural, span, utc } from "./words.js";

// Shapes, so that colour is never alone.
const SHAPES = {
  starting: "M8 2a6 6 0 1 0 6 6h-2a4 4 0 1 1-4-4z",
  idle: "M8 2a6 6 0 1 0 0 12A6 6 0 0 0 8 2zm0 2a4 4 0 1 1 0 8 4 4 0 0 1 0-8z",
  busy: "M4 2l10 6-10 6z",
  draining: "M2 4h12L8 13z",
  paused: "M3 2h4v12H3zm6 0h4v12H9z",
  done: "M2 8.5L6 12.5 14 4.5 12.5 3 6 9.5 3.5 7z",
  offline: "M3 2l5 4.5L13 2l1 1-4.5 5L14 13l-1 1-5-4.5L3 14l-1-1 4.5-5L2 3z",
};
const LOOKS = { ready: "idle", busy: "busy", starting: "starting", loading: "starting", draining: "draining",
  stopping: "draining", backoff: "offline", quarantined: "offline", cold: "none" };

function shape(name) {
  return SHAPES[name] && h("svg", { viewBox: "0 0 16 16", class: "shape", "aria-hidden": "true" }, h("path", { d: SHAPES[name] }));
}

function badge(look, word) {
  return h("span", { class: `badge look-${look}` }, shape(look), word);
}

function button(word, act, more = {}) {
  const { label, kind, ...data } = more;
  const attributes = { type: "button", class: kind ?? null, "data-act": act, "aria-label": label ?? null };
  for (const [name, value] of Object.entries(data)) attributes[`data-${name}`] = value;
  return h("button", attributes, word);
}

function time(seconds, text) {
  return h("time", { title: utc(seconds) }, text);
}

function heading(word, ...more) {
  return h("div", { class: "heading" }, h("h2", null, word), h("div", { class: "tools" }, more));
}

const none = (sentence) => h("p", { class: "quiet" }, sentence);

// ---- the top

export function top(seen, theme) {
  return h("div", { class: "bar" },
    h("strong", { class: "name" }, seen?.worker || "Bulkhead"),
    seen && h("span", { class: "quiet about" }, `supervisor ${seen.version}, up ${span(seen.uptime_s)}`),
    h("span", { class: "spring" }),
    button(`Theme: ${theme}`, "theme", { kind: "plain", label: `Theme: ${theme}; press for the next` }),
    seen && button("Sign out", "sign-out", { kind: "plain" }));
}

export function headline(seen) {
  const paused = seen.holds.some((hold) => hold.source === "operator" && !hold.gpu && !hold.kind);
  const freed = seen.holds.some((hold) => !hold.gpu && !hold.kind && hold.mode !== "stop accepting");
  const { link } = seen;
  return [
    h("div", { class: `state look-${seen.state}` }, shape(seen.state), h("h1", null, seen.state)),
    h("p", { class: "why" }, seen.why || `${plural(seen.jobs, "job")} running.`),
    h("p", { class: "quiet" },
      link.connected ? `Connected to ${link.url}.` : `Not connected${link.url ? ` to ${link.url}` : ""}${link.reason ? `: ${link.reason}` : ""}.`),
    seen.draining
      ? none(`The supervisor ends when its jobs are done${seen.drain_until ? `, at ${clock(seen.drain_until)} at the latest` : ""}.`)
      : h("div", { class: "tools" },
          paused ? button("Resume", "resume", { kind: "main" }) : button("Pause…", "pause", { kind: "main" }),
          !freed && seen.gpus.length > 0 && button("Free GPU memory now", "free"),
          button("Stop or restart…", "drain")),
  ];
}

// ---- holds

export function holds(seen) {
  if (!seen.holds.length && !seen.coming?.length) return [];
  const rows = seen.holds.map((hold) => h("li", { "data-key": `${hold.source}/${hold.gpu}/${hold.kind}` },
    h("div", { class: "grow" },
      h("strong", null, hold.source), scope(hold, seen), hold.reason ? `: ${hold.reason}` : "",
      h("div", { class: "quiet" },
        hold.mode, ", since ", time(hold.since, day(hold.since)), ", ",
        hold.until === null ? "until it is lifted"
          : ["until ", time(hold.until, day(hold.until)), ` (${span(hold.until - seen.now)} left)`],
        hold.warm?.length ? `; comes back: ${hold.warm.join(", ")}` : "")),
    lift(hold)));
  const coming = (seen.coming ?? []).map((one) => h("li", { "data-key": `coming/${one.source}/${one.at}` },
    h("div", { class: "grow quiet" }, `${one.source}: ${one.text}, from `, time(one.at, day(one.at)))));
  return [heading("Why it takes no jobs, or fewer"), h("ul", { class: "rows" }, rows, coming)];
}

function scope(hold, seen) {
  const gpu = seen.gpus.find((one) => one.uuid === hold.gpu);
  return [hold.gpu && ` on ${gpu?.name || hold.gpu}`, hold.kind && ` for ${hold.kind}`];
}

function lift(hold) {
  if (hold.source !== "operator") return null;
  return button("Lift", "lift", { gpu: hold.gpu, kind_of_job: hold.kind, label: `Lift the hold of the operator ${hold.gpu}${hold.kind}` });
}

// ---- GPUs

export function gpus(seen) {
  if (!seen.gpus.length) return [heading("GPUs"), none(seen.gpu_reason || "This machine has no GPU.")];
  return [heading("GPUs"), seen.gpus.map((gpu) => card(gpu, seen))];
}

function card(gpu, seen) {
  const cordoned = seen.holds.some((hold) => hold.gpu === gpu.uuid && hold.source === "operator" && !hold.kind);
  const name = gpu.name || gpu.uuid;
  const facts = [
    gpu.busy !== null && `${Math.round(gpu.busy * 100)} % busy`,
    gpu.temperature_c !== null && `${Math.round(gpu.temperature_c)} °C`,
    gpu.power_w !== null && `${Math.round(gpu.power_w)} W`,
  ].filter(Boolean);
  return h("article", { class: "card", "data-key": gpu.uuid, "aria-label": `GPU ${name}` },
    h("div", { class: "line" },
      h("strong", { title: gpu.uuid }, name),
      h("span", { class: "quiet" }, facts.join(" · ")),
      h("span", { class: "spring" }),
      cordoned
        ? button("Use again", "uncordon", { gpu: gpu.uuid, label: `Use GPU ${name} again` })
        : button("Keep free…", "cordon", { gpu: gpu.uuid, name, label: `Keep GPU ${name} free` })),
    memory(gpu),
    (gpu.why || gpu.tainted) && h("p", { class: gpu.fault || gpu.tainted ? "bad" : "quiet" }, [gpu.why, gpu.tainted].filter(Boolean).join(" ")));
}

/** Where the memory of a GPU is: ours, promised to loads, other programs', free. */
function memory(gpu) {
  if (!gpu.total_bytes) return none("How much memory it has is not known.");
  const known = gpu.foreign_bytes !== null;
  const used = gpu.free_bytes === null ? gpu.ours_bytes : gpu.total_bytes - gpu.free_bytes;
  const parts = [
    ["ours", "our models", gpu.ours_bytes],
    ["promised", "loading", Math.min(gpu.promised_bytes, gpu.total_bytes)],
    ["foreign", known ? "other programs" : "others, or unknown", known ? gpu.foreign_bytes : Math.max(0, used - gpu.ours_bytes)],
  ].filter(([, , bytes]) => bytes > 0);
  let x = 0;
  const bars = parts.map(([name, , bytes]) => {
    const width = Math.min(100 - x, (100 * bytes) / gpu.total_bytes);
    const rect = h("rect", { class: name, x: x.toFixed(2), y: 0, width: width.toFixed(2), height: 10 });
    x += width;
    return rect;
  });
  const free = gpu.free_bytes === null ? null : Math.max(0, gpu.free_bytes - gpu.promised_bytes);
  const words = [...parts, ["free", "free", free]];
  return [
    h("svg", { class: "memory", viewBox: "0 0 100 10", preserveAspectRatio: "none", role: "img",
      "aria-label": `Of ${gib(gpu.total_bytes)}: ${words.map(([, word, bytes]) => `${word} ${gib(bytes)}`).join(", ")}` }, bars),
    h("p", { class: "legend" },
      words.map(([name, word, bytes]) => h("span", null, h("i", { class: name, "aria-hidden": "true" }), `${word} ${gib(bytes)}`)),
      h("span", { class: "quiet" }, `of ${gib(gpu.total_bytes)}`)),
  ];
}

// ---- models

export function models(seen) {
  if (!seen.models.length) {
    return [heading("Models"), none("No model is configured; `supervisor models pull` adds one.")];
  }
  return [heading("Models"), h("table", { class: "stacked" },
    h("thead", null, h("tr", null, ["Model", "State", "Jobs", "Memory", "GPU memory", ""].map((word) => h("th", { scope: "col" }, word)))),
    h("tbody", null, seen.models.map(model)))];
}

function model(one) {
  const why = one.waits || one.unserved || one.slow || one.reason || (one.pid ? "" : one.last_end);
  const idle = one.idle_s === null ? "" : ` for ${span(one.idle_s)}`;
  const loaded = one.state !== "cold";
  const act = (word, act) => button(word, act, { model: one.name, label: `${word} ${one.name}` });
  return h("tr", { "data-key": one.name },
    h("td", { class: "first" }, h("strong", null, one.name),
      h("span", { class: "quiet" }, ` ${[one.engine, one.device].filter(Boolean).join(", ")}`),
      why && h("div", { class: LOOKS[one.state] === "offline" ? "bad" : "quiet" }, why)),
    h("td", { "data-word": "State" }, badge(LOOKS[one.state] ?? "none", one.state === "ready" ? `ready, idle${idle}` : one.state)),
    h("td", { "data-word": "Jobs", class: "number" }, `${one.running} of ${one.slots}`, one.queued ? ` + ${one.queued} wait` : ""),
    h("td", { "data-word": "Memory", class: "number" }, one.rss_bytes ? gib(one.rss_bytes) : "–"),
    h("td", { "data-word": "GPU memory", class: "number" }, one.vram_bytes ? gib(one.vram_bytes) : "–"),
    h("td", { class: "acts" },
      !loaded && act("Load", "load"), loaded && act("Unload", "unload"), loaded && act("Restart", "restart")));
}

// ---- jobs

export function jobs(found, now) {
  if (found === null) return [];
  if (typeof found === "string") return [heading("Jobs"), none(found)];
  if (!found.length) return [heading("Jobs"), none("There were no jobs since the supervisor started.")];
  return [heading("Jobs"), h("table", { class: "stacked" },
    h("thead", null, h("tr", null, ["Job", "State", "Began", "Took", ""].map((word) => h("th", { scope: "col" }, word)))),
    h("tbody", null, found.map((one) => job(one, now))))];
}

function job(one, now) {
  const open = !one.ended;
  const word = one.outcome || (one.state === "waiting" ? `waiting (${one.phase})` : one.phase === "run" ? "running" : one.phase);
  const look = { running: "busy", waiting: "starting", succeeded: "done", failed: "offline", cancelled: "none" }[one.outcome || one.state];
  const part = one.total ? ` ${Math.floor((100 * one.done) / one.total)} %` : one.done ? ` ${one.done}` : "";
  return h("tr", { "data-key": `${one.job}/${one.attempt}` },
    h("td", { class: "first" }, h("strong", null, one.model), h("span", { class: "quiet" }, ` ${one.kind}`),
      h("div", { class: "quiet id" }, one.job, one.attempt > 1 ? `, try ${one.attempt}` : ""),
      one.fault && one.outcome !== "cancelled" && h("div", { class: "bad" }, `${one.fault}${one.owner ? ` (${one.owner})` : ""}`)),
    h("td", { "data-word": "State" }, badge(look, word + (open ? part : ""))),
    h("td", { "data-word": "Began", class: "number" }, time(one.accepted, clock(one.accepted))),
    h("td", { "data-word": "Took", class: "number" }, span((one.ended ?? now) - (one.started ?? one.accepted))),
    h("td", { class: "acts" }, open && button("Cancel", "cancel", { job: one.job, label: `Cancel job ${one.job}` })));
}

// ---- log, incidents, configuration

const LEVELS = ["debug", "info", "warning", "error"];

export function logTools(level, query) {
  return heading("Log",
    h("label", null, "Level ", h("select", { name: "level", id: "level" },
      LEVELS.map((word) => h("option", { value: word, selected: word === level }, word)))),
    h("input", { id: "query", type: "search", placeholder: "Find", "aria-label": "Find in the log", value: query }));
}

export function logLine(entry) {
  const about = [entry.model, entry.job].filter(Boolean).join(" ");
  return h("li", { class: `level-${entry.level}` },
    h("time", { title: utc(entry.time) }, clock(entry.time)), " ",
    h("b", null, entry.level), " ", entry.message, about && h("span", { class: "quiet" }, ` [${about}]`),
    entry.traceback && h("pre", null, entry.traceback));
}

export function incidents(seen) {
  if (!seen.incidents.length) return [];
  const rows = seen.incidents.slice(0, 20).map((one) => h("li", { "data-key": one.time + one.model },
    h("div", { class: "grow" }, h("strong", null, one.model), ` ${one.code}`,
      h("div", null, one.message || one.how), one.diagnosis && h("div", { class: "quiet" }, one.diagnosis),
      h("div", { class: "quiet" }, day(Date.parse(one.time) / 1000)))));
  return folded(`Incidents (${seen.incidents.length})`, h("ul", { class: "rows" }, rows));
}

/** What somebody has set, and where; the defaults one step further away. */
export function config(found) {
  if (found === null) return [];
  if (typeof found === "string") return folded("Configuration", none(found));
  const set = found.rows.filter(([, , origin]) => origin !== "default");
  const defaults = found.rows.filter(([, , origin]) => origin === "default");
  return folded("Configuration",
    found.path && none(found.path),
    found.problems.map((problem) => h("p", { class: "bad" }, problem)),
    h("ul", { class: "config", tabindex: "0", "aria-label": "What is set" }, set.map(setting)),
    defaults.length > 0 && h("details", null,
      h("summary", { class: "quiet" }, `${plural(defaults.length, "setting")} at the default`),
      h("ul", { class: "config", tabindex: "0", "aria-label": "Defaults" }, defaults.map(setting))));
}

function folded(word, ...inside) {
  return [h("details", null, h("summary", null, h("h2", null, word)), inside)];
}

function setting([key, value, origin]) {
  return h("li", { "data-key": key }, h("span", { class: "quiet" }, `${key} = `), value,
    origin && origin !== "default" && h("span", { class: "quiet from" }, origin));
}

export function login(problem) {
  return h("div", { class: "login" },
    h("h1", null, "Bulkhead"),
    problem && h("p", { class: "bad" }, problem),
    h("p", null, "To open this page, run ", h("code", null, "supervisor ui"), " on this machine, as the user of the supervisor."),
    h("p", { class: "quiet" }, "It hands a code to your browser that works once and for a minute. A session belongs to one tab, and ends after twelve hours without use."));
}
