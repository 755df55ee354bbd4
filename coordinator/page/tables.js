// Deployments, jobs, usage and keys as tables.

import { h } from "./dom.js";
import { badge, button, cell, heading, moment, none, table, tags } from "./parts.js";
import { span } from "./words.js";

const STATES = ["", "queued", "running", "succeeded", "failed", "cancelled"];
const LOOKS = { queued: "starting", running: "busy", succeeded: "done", failed: "offline", cancelled: "none" };

const option = (value, word, chosen) => h("option", { value, selected: value === chosen }, word);

export function jobsTools(state) {
  return heading("Jobs", h("label", null, "Show ", h("select", { id: "job-state" }, STATES.map((one) => option(one, one || "all", state)))));
}

/** @param found rows, a sentence in their place, or null while they come; `page` counts from 0, `more` come behind it */
export function jobs(found, now, { page, more, state }) {
  if (found === null) return none("Loading…");
  if (typeof found === "string") return h("p", { class: "bad" }, found);
  const turn = (page > 0 || more) && h("nav", { class: "pager", "aria-label": "Pages of jobs" },
    button("Newer", "jobs", { step: -1, disabled: page === 0 }),
    h("span", { class: "quiet" }, `Page ${page + 1}`),
    button("Older", "jobs", { step: 1, disabled: !more }));
  if (!found.length) return [none(page ? "There are no older jobs." : state ? `No job is ${state} now.` : "No job was submitted yet."), turn];
  const columns = [["Job", ""], ["State", ""], ["Made", "n"], ["Took", "n"], ["Tries", "n"], ["Orders", "unseen"]];
  return [table(columns, found.map((one) => job(one, now)), "Jobs"), turn];
}

function job(one, now) {
  const open = one.state === "queued" || one.state === "running";
  const took = one.started_ms ? span(((one.finished_ms ?? now) - one.started_ms) / 1000) : open ? "–" : "not begun";
  const act = (word, name, what) => button(word, name, { job: one.id, model: one.model, label: `${what} ${one.id}` });
  return h("tr", { "data-key": one.id },
    h("td", { class: "first" }, h("strong", null, one.model), h("span", { class: "quiet" }, ` ${one.kind}`),
      h("div", { class: "quiet id" }, one.id),
      h("div", { class: "quiet id" }, [`tenant ${one.tenant}`, one.worker && `on ${one.worker}`, one.priority !== 0 && `priority ${one.priority}`, one.alone && "must run alone"].filter(Boolean).join(" · ")),
      Object.keys(one.labels).length > 0 && h("div", null, tags(one.labels)),
      one.fault && one.state !== "cancelled" && h("div", { class: "bad" }, `${one.fault.code} (${one.fault.owner}): ${one.fault.message}`),
      one.tries > 0 && h("details", { "data-history": one.id }, h("summary", { class: "quiet" }, "attempts and log"), one.history ? [history(one.history.attempts), one.history.log && log(one.history.log)] : none("Loading…"))),
    cell("State", "", badge(LOOKS[one.state] ?? "none", one.state)),
    cell("Made", "number right", moment(one.created_ms)),
    cell("Took", "number right", took),
    cell("Tries", "number right", `${one.tries} of ${one.max_attempts}`),
    h("td", { class: "acts" }, open && act("Cancel…", "cancel", "Cancel job"), one.state === "failed" && act("Retry", "retry", "Retry job")));
}

/** @param told a sentence, or the attempts of a job */
function history(told) {
  if (typeof told === "string") return none(told);
  if (!told.length) return none("No attempt has ended yet.");
  return h("ol", null, told.map((one) => h("li", { class: "quiet wraps", "data-key": `${one.n}` },
    `${one.n}: ${one.outcome || "runs"} on ${one.worker || "nobody"}`, one.ended_ms ? [", ", moment(one.ended_ms)] : "", one.fault ? `: ${one.fault.code}, ${one.fault.message}` : "")));
}

/** @param told a sentence, or what workers' logs said of a job */
function log(told) {
  if (typeof told === "string") return none(told);
  const gaps = [
    told.more > 0 && `${told.more} older ones: coordinator jobs logs ${told.job}`,
    told.since_ms > told.created_ms && "maybe those of its beginning",
    ...Object.entries(told.lost).map(([worker, count]) => `${count} lines of ${worker} were lost, of whatever job`),
    ...told.not_asked.map((name) => `replica ${name} did not answer`),
  ].filter(Boolean);
  return [
    told.data.length ? h("ol", { "aria-label": "Log" }, told.data.map((one, number) => h("li", { class: "quiet wraps", "data-key": `${number}` },
      moment(one.told_ms), ` ${one.level}, ${one.worker}: ${one.message}`))) : none("No line of a worker's log is kept about it."),
    gaps.length > 0 && none(`Missing here: ${gaps.join("; ")}.`)];
}

// ---- deployments

const PLACED = { wanted: "starting", fetching: "starting", ready: "done", failed: "offline", leaving: "draining", away: "none" };

/** What the fleet is told to serve, and of each worker why it does not yet. */
export function deployments(found) {
  if (!found.length) return [heading("Deployments"), none("The fleet is not told what to serve; “coordinator deploy MODEL --replicas 2” does.")];
  const columns = [["Model", ""], ["Wanted", "n"], ["Ready", "n"], ["Workers", ""]];
  return [heading(`Deployments (${found.length})`), table(columns, found.map(deployment), "Deployments")];
}

function deployment(one) {
  const why = (each) => h("li", { class: "wraps", "data-key": each.worker },
    h("strong", null, each.worker), " ", each.state && badge(PLACED[each.state] ?? "none", each.state),
    each.state && each.revision !== one.revision && h("span", { class: "quiet" }, ` revision ${each.revision}`),
    each.why && h("div", { class: each.state === "failed" ? "bad" : "quiet" }, each.why));
  const hidden = one.workers_total - one.workers.length;
  const unlisted = one.not_chosen_total - one.not_chosen.length;
  return h("tr", { "data-key": one.name },
    h("td", { class: "first" }, h("strong", null, one.name), h("span", { class: "quiet" }, ` ${one.engine}`),
      h("div", { class: "quiet id" }, one.source),
      h("div", { class: "quiet id" }, `revision ${one.revision}`, one.serving && one.serving !== one.revision && `; ${one.serving} answers until it is ready`),
      Object.keys(one.on).length > 0 && h("div", null, tags(one.on)),
      one.leaving && h("div", { class: "warn" }, "Is let go of by all workers.")),
    cell("Wanted", "number right", String(one.wanted)),
    cell("Ready", "number right", h("span", { class: one.ready < one.wanted ? "warn" : null }, String(one.ready))),
    h("td", { "data-word": "Workers", class: "placed" },
      h("ul", null, one.workers.map(why)),
      hidden > 0 && none(`${hidden} more`),
      one.not_chosen_total > 0 && h("details", null, h("summary", { class: "quiet" }, `${one.not_chosen_total} not chosen`),
        h("ul", null, one.not_chosen.map(why)), unlisted > 0 && none(`${unlisted} more; coordinator deployments ${one.name} lists them.`))));
}

// ---- usage

const GROUPS = [["tenant", "tenant"], ["worker", "worker"], ["model", "model"], ["key", "key"], ["day", "day"]];
const DAYS = [["1", "today"], ["7", "7 days"], ["30", "30 days"]];
const NUMBER = new Intl.NumberFormat(undefined, { maximumFractionDigits: 1 });
const AMOUNTS = [["jobs", "Jobs"], ["failed", "Failed"], ["tokens_in", "Tokens in"], ["tokens_out", "Tokens out"], ["audio_s", "Audio"], ["images", "Images"], ["gpu_s", "GPU time"]];

export function usageTools(by, days) {
  return heading("Usage",
    h("label", null, "By ", h("select", { id: "usage-by" }, GROUPS.map(([value, word]) => option(value, word, by)))),
    h("label", null, "Of ", h("select", { id: "usage-days" }, DAYS.map(([value, word]) => option(value, word, days)))),
    button("Save as CSV", "csv"));
}

export function usage(found, by) {
  if (found === null) return none("Loading…");
  if (typeof found === "string") return h("p", { class: "quiet" }, found);
  if (!found.length) return none("No job has ended in this time.");
  const shown = (name, value) => (name.endsWith("_s") ? span(value) : NUMBER.format(value));
  const column = GROUPS.find(([value]) => value === by)[1];
  return table([[column[0].toUpperCase() + column.slice(1), ""], ...AMOUNTS.map(([, word]) => [word, "n"])], found.map((row) => {
    const name = String(row[by] ?? row[`${by}_id`] ?? "") || "none";
    return h("tr", { "data-key": name }, h("td", { class: "first" }, h("strong", null, name)),
      AMOUNTS.map(([field, word]) => cell(word, "number right", row[field] ? shown(field, row[field]) : "–")));
  }), "Usage");
}

// ---- keys

export function keys(found) {
  if (found === null) return [heading("Keys"), none("Loading…")];
  if (typeof found === "string") return [heading("Keys"), none(found)];
  const live = found.filter((one) => one.revoked_ms === null);
  const ended = found.length - live.length;
  return [heading(`Keys (${live.length})`),
    table([["Key", ""], ["Opens", ""], ["Tenant", ""], ["Made", "n"], ["Orders", "unseen"]], live.map((one) => h("tr", { "data-key": one.prefix },
      h("td", { class: "first" }, h("code", null, `${one.prefix}…`), ` ${one.name}`),
      cell("Opens", "", one.scope, one.worker && h("span", { class: "quiet" }, ` as ${one.worker}`)),
      cell("Tenant", "number", one.tenant),
      cell("Made", "number right", one.created_ms ? moment(one.created_ms) : "–"),
      h("td", { class: "acts" }, button("Revoke…", "revoke-key", { prefix: one.prefix, label: `Revoke key ${one.prefix}` })))), "Keys"),
    ended > 0 && none(`${ended} ${ended === 1 ? "key was" : "keys were"} revoked.`)];
}
