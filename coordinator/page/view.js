// From what the feed told to elements: the head, who asks to be let in, the workers, the queue.
// Nothing here asks, remembers or changes anything.

import { h } from "./dom.js";
import { badge, button, heading, moment, none, pager, shape, table, tags, cell } from "./parts.js";
import { gib, plural, span } from "./words.js";

export const WORKERS_SHOWN = 20;
export const QUEUES_SHOWN = 20;
const HOT_C = 85;
const SECTIONS = [["workers", "Workers"], ["queues", "Queue"], ["deployments", "Deployments"], ["jobs", "Jobs"], ["usage", "Usage"], ["keys", "Keys"]];

export function top(signed, theme) {
  return h("div", { class: "bar" },
    h("strong", { class: "name" }, "Bulkhead coordinator"),
    signed && h("nav", { class: "links", "aria-label": "Parts of this page" }, SECTIONS.map(([id, word]) => h("a", { href: `#${id}` }, word))),
    h("span", { class: "spring" }),
    button(`Theme: ${theme}`, "theme", { kind: "plain", label: `Theme: ${theme}; press for the next` }),
    signed && button("Sign out", "sign-out", { kind: "plain" }));
}

export function login(problem) {
  return h("form", { class: "login", id: "login" },
    h("h1", null, "Bulkhead coordinator"),
    problem && h("p", { class: "bad", role: "alert" }, problem),
    h("label", { class: "field" }, "Admin key",
      h("input", { name: "key", type: "password", class: "wide", required: true, autocomplete: "off", autocapitalize: "off", spellcheck: "false" })),
    h("div", { class: "tools" }, h("button", { type: "submit", class: "main" }, "Open the dashboard")),
    h("p", { class: "quiet" }, "Make one on the coordinator's machine:"),
    h("pre", { class: "command" }, "coordinator keys create --scope admin"),
    h("p", { class: "quiet" }, "The key is not kept in this browser: it opens a session that ends after twelve hours, or with the key."));
}

// ---- the head

const WORDS = { ok: ["idle", "serving"], draining: ["draining", "draining"], failed: ["offline", "failed"] };

export function headline(seen) {
  const { head, workers, queues, trouble } = seen;
  const rows = Object.values(workers);
  const taking = rows.filter((one) => one.state === "idle" || one.state === "busy").length;
  const running = rows.reduce((sum, one) => sum + one.running, 0);
  const slots = rows.reduce((sum, one) => sum + one.slots, 0);
  const unserved = Object.values(queues).filter((one) => one.waiting && one.why).length;
  const [look, word] = WORDS[head.state] ?? ["none", head.state];
  const busy = look === "idle" && running > 0 ? "busy" : look;
  return [
    h("div", { class: `state look-${busy}` }, shape(busy), h("h1", null, word)),
    ...Object.values(trouble).map((one) => h("p", { class: "bad" }, one.message)),
    head.state === "draining" && h("p", { class: "why" }, "New jobs are refused; what runs is finished."),
    h("p", { class: "facts" },
      h("span", null, plural(head.workers, "worker"), head.workers !== taking && rows.length ? `, ${taking || "none"} taking jobs` : ""),
      h("span", null, `${running} of ${slots} slots busy`),
      h("span", null, `${plural(head.waiting, "job")} waiting`),
      unserved > 0 && h("span", { class: "warn" }, `${plural(unserved, "model")} that nobody can take now`)),
    h("p", { class: "quiet" }, `Version ${head.version}, up since `, moment(head.began_ms)),
  ];
}

// ---- who asks to be let in

export function pending(seen) {
  const rows = Object.values(seen.pending).sort((a, b) => a.created_ms - b.created_ms);
  if (!rows.length) return [];
  return [heading(`Ask to be let in (${rows.length})`), h("ul", { class: "rows" }, rows.map((one) => {
    const name = one.machine || one.install;
    return h("li", { "data-key": one.id },
      h("div", { class: "grow" },
        h("strong", null, name), ` ${one.user}`,
        h("div", { class: "quiet" }, `From ${one.address}, with ${one.agent || "a program without a name"}, since `, moment(one.created_ms), "; secret begins ", h("code", null, one.secret_begins)),
        one.models.length > 0 && h("div", null, one.models.map((model) => h("span", { class: "tag" }, model)))),
      h("div", { class: "tools" },
        button("Approve…", "approve", { id: one.id, kind: "main", label: `Approve ${name}` }),
        button("Reject…", "reject", { id: one.id, label: `Reject ${name}` })));
  }))];
}

// ---- workers

const REASONS_LOOK = { idle: "idle", busy: "busy", paused: "paused", draining: "draining" };

export function workersTools(count, query) {
  return heading(`Workers${count ? ` (${count})` : ""}`,
    count > 0 && h("input", { id: "find-worker", class: "filter", type: "search", placeholder: "Find a worker", "aria-label": "Find a worker by its name, model, label or state", value: query }));
}

const matches = (one, query) => [one.id, one.state, one.machine, one.reason, ...one.models.map((model) => model.name), ...Object.entries(one.labels).flat()]
  .some((text) => text.toLowerCase().includes(query));

/** The workers that are wanted, those that need a look first. */
export function wanted(seen, query) {
  const rank = (one) => (one.state === "paused" || one.state === "draining" ? 0 : 1);
  return Object.values(seen.workers)
    .filter((one) => !query || matches(one, query.toLowerCase()))
    .sort((a, b) => rank(a) - rank(b) || a.id.localeCompare(b.id, undefined, { numeric: true }));
}

export function workers(seen, query, first) {
  if (!seen.head.workers) return join();
  const rows = wanted(seen, query);
  const more = seen.head.workers - seen.head.workers_shown;
  return [
    rows.length ? rows.slice(first, first + WORKERS_SHOWN).map(worker) : none("No worker is like that."),
    pager("workers", first, WORKERS_SHOWN, rows.length),
    more > 0 && none(`${more} more are not shown here; GET /v1/workers lists them all.`),
  ];
}

function join() {
  return h("div", { class: "begin" },
    h("p", null, "No worker is connected. To let one join:"),
    h("ol", null,
      h("li", null, "On the coordinator's machine, make a token that admits one worker:", h("pre", { class: "command" }, "coordinator workers enrol")),
      h("li", null, "On the worker's machine, swap it there for a key of its own; the token is asked for:", h("pre", { class: "command" }, `supervisor enrol ${location.origin}`)),
      h("li", null, "Start the worker; it shows up here by itself:", h("pre", { class: "command" }, "supervisor run"))));
}

function worker(one) {
  const temperatures = one.gpus.map((gpu) => gpu.temperature_c).filter((c) => c !== null);
  const hottest = temperatures.length ? Math.max(...temperatures) : null;
  const weak = one.models.filter((model) => weakness(model).length).length;
  const held = one.state === "paused" || one.state === "draining";
  const act = (word, name, more = {}) => button(word, name, { worker: one.id, label: `${word.replace("…", "")} ${one.id}`, ...more });
  return h("article", { class: "worker", "data-key": one.id, "aria-label": `Worker ${one.id}` },
    h("div", { class: "line" },
      h("strong", null, one.id), badge(REASONS_LOOK[one.state] ?? "none", one.state),
      h("span", { class: "quiet" }, `${one.running} of ${one.slots} slots`),
      hottest !== null && h("span", { class: hottest >= HOT_C ? "bad" : "quiet" }, `${hottest} °C`),
      h("span", { class: "spring" }),
      h("span", { class: "tools" },
        (held || one.resting.length > 0) && act("Resume", "resume"),
        !held && act("Pause…", "pause"),
        one.state !== "draining" && act("Drain…", "drain", { running: one.running }),
        act("Revoke…", "revoke"))),
    one.reason && h("p", { class: held ? "warn wraps" : "quiet wraps" }, one.reason),
    one.declined.length > 0 && h("p", { class: "warn wraps" }, `Takes nothing for a while of: ${one.declined.join(", ")}`),
    one.resting.map((why) => h("p", { class: "bad wraps" }, why)),
    one.gpus.length > 0 && h("div", { class: "gpus" }, one.gpus.map(gpu)),
    h("details", null,
      h("summary", null, `${plural(one.models.length, "model")}${weak ? `, ${weak} in a weak sandbox` : ""}; details`),
      h("div", { class: "inside" },
        h("p", { class: "quiet wraps" }, [one.machine, one.version && `version ${one.version}`, `speaks ${one.protocol}`].filter(Boolean).join(" · ")),
        Object.keys(one.labels).length > 0 && h("p", null, tags(one.labels)),
        one.models.map(model),
        one.jobs.length > 0 && h("p", { class: "quiet id wraps" }, `Has ${one.jobs.join(", ")}`))));
}

function gpu(one) {
  const known = one.total_bytes > 0 && one.free_bytes !== null;
  const used = known ? Math.max(0, one.total_bytes - one.free_bytes) : null;
  const facts = [
    known ? `${gib(used)} of ${gib(one.total_bytes)} used` : one.free_bytes !== null ? `${gib(one.free_bytes)} free` : one.total_bytes ? gib(one.total_bytes) : "memory not known",
    one.busy !== null && `${Math.round(one.busy * 100)} % busy`,
    one.temperature_c !== null && `${one.temperature_c} °C`,
    one.power_w !== null && `${one.power_w} W`,
  ].filter(Boolean).join(" · ");
  return h("div", { "data-key": one.uuid },
    h("p", { class: "quiet wraps" }, `${one.name || one.uuid}: ${facts}`),
    known && h("svg", { class: "memory", viewBox: "0 0 100 10", preserveAspectRatio: "none", role: "img", "aria-label": `${one.name || one.uuid}: ${gib(used)} of ${gib(one.total_bytes)} used` },
      h("rect", { class: "ours", x: 0, y: 0, width: Math.min(100, (100 * used) / one.total_bytes).toFixed(2), height: 10 })));
}

/** Layers of the sandbox that do not hold. */
const weakness = (model) => Object.entries(model.sandbox).filter(([, word]) => word !== "verified" && word !== "off");

function model(one) {
  const layers = Object.entries(one.sandbox);
  return h("div", { "data-key": one.name },
    h("p", { class: "wraps" }, h("strong", null, one.name), ` ${one.kinds.join(", ") || "serves nothing now"}`,
      h("span", { class: "quiet" }, ` ${[one.engine, one.device, one.vram_bytes ? gib(one.vram_bytes) : "", one.resident ? "loaded" : "not loaded", plural(one.slots, "slot")].filter(Boolean).join(" · ")}`)),
    layers.length
      ? h("p", { class: weakness(one).length ? "warn wraps" : "quiet wraps" }, `Sandbox: ${layers.map(([layer, word]) => `${layer} ${word}`).join(", ")}`)
      : none("Sandbox: not known before the first load."));
}

// ---- the queue

export function queues(seen, now, first) {
  const rows = Object.values(seen.queues).sort((a, b) => b.waiting - a.waiting || b.running - a.running || a.model.localeCompare(b.model));
  if (!rows.length) return [heading("Queue per model"), none("No model is served, and nothing waits.")];
  const columns = [["Model", ""], ["Waiting", "n"], ["Oldest", "n"], ["Running", "n"], ["Slots", "n"], ["Workers", "n"]];
  return [heading("Queue per model"), table(columns, rows.slice(first, first + QUEUES_SHOWN).map((one) => h("tr", { "data-key": one.id },
    h("td", { class: "first" }, h("strong", null, one.model), h("span", { class: "quiet" }, ` ${one.kind}`), one.why && h("div", { class: "warn" }, one.why)),
    cell("Waiting", "number right", String(one.waiting)),
    cell("Oldest", "number right", one.oldest_ms ? span((now - one.oldest_ms) / 1000) : "–"),
    cell("Running", "number right", String(one.running)),
    cell("Slots", "number right", String(one.slots)),
    cell("Workers", "number right", String(one.workers)))), "Queue per model"),
  pager("queues", first, QUEUES_SHOWN, rows.length)];
}
