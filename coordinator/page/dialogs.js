// Questions before an order: for how long, why, and whether it is meant.

import { h, show } from "./dom.js";

const HOW_LONG = [["", "until it is resumed"], ["900", "15 minutes"], ["3600", "1 hour"], ["14400", "4 hours"], ["86400", "1 day"], ["604800", "1 week"]];

/** Ask; the form's values, or null when it was called off. `destroys` marks the button red. */
function question(title, parts, word, destroys = false) {
  const dialog = document.getElementById("dialog");
  show(dialog, h("form", { method: "dialog" },
    h("h2", { id: "dialog-title" }, title), parts,
    h("div", { class: "tools" },
      h("button", { type: "submit", value: "yes", class: destroys ? "danger" : "main" }, word),
      h("button", { type: "submit", value: "", formnovalidate: true }, "Keep as it is"))));
  dialog.querySelector("form").reset();
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      const form = new FormData(dialog.querySelector("form"));
      resolve(dialog.returnValue ? Object.fromEntries(form) : null);
    }, { once: true });
  });
}

const why = () => h("label", { class: "field" }, "Reason, for others to read",
  h("input", { name: "reason", maxlength: "200", autocomplete: "off" }));

/** The body of POST /v1/workers/{id}/pause, or null. */
export async function ask_pause(worker) {
  const told = await question(`Pause ${worker}`, [
    h("p", null, "Jobs that run are finished; new ones are not given to it."),
    h("label", { class: "field" }, "For", h("select", { name: "for_s" }, HOW_LONG.map(([value, word]) => h("option", { value }, word)))),
    why()], "Pause");
  if (!told) return null;
  return told.for_s ? { reason: told.reason, for_s: Number(told.for_s) } : { reason: told.reason };
}

export const ask_drain = (worker, running) => question(`Drain ${worker}`, [
  h("p", null, running ? `It finishes the ${running === 1 ? "job" : `${running} jobs`} that it has, and takes no other until Resume.` : "It takes no job until Resume.")], "Drain");

export const ask_revoke_worker = (worker) => question(`Revoke ${worker}`, [
  h("p", null, "Its session ends at once, and what it runs is given to others. It cannot come back with the same key: another has to be made for it."),
  h("p", { class: "quiet" }, "Every other worker that came with the same key is put out as well.")], "Revoke", true);

export const ask_revoke_key = (key) => question(`Revoke the key ${key.prefix}`, [
  h("p", null, `Whoever uses it (${key.scope}${key.name ? `, ${key.name}` : ""}) is refused from now on. This cannot be undone.`)], "Revoke", true);

export const ask_cancel = (job) => question("Cancel the job", [
  h("p", { class: "wraps" }, `${job.id} of ${job.model} ends without a result, and its client is told so.`)], "Cancel the job", true);

/** The body of POST /v1/registrations/{id}/approve, or null. */
export async function ask_approve(one) {
  const told = await question("Let the worker in", [
    h("p", { class: "wraps" }, `${one.machine || one.install} (${one.user || "no user"}) from ${one.address} gets jobs of every tenant from now on.`),
    h("p", null, "Compare what the worker shows with the beginning of its secret: ", h("code", null, one.secret_begins))], "Approve");
  return told && { secret_begins: one.secret_begins };
}

/** The body of POST /v1/registrations/{id}/reject, or null. */
export async function ask_reject(one) {
  const told = await question("Reject the worker", [h("p", { class: "wraps" }, `${one.machine || one.install} from ${one.address} is told no.`), why()], "Reject", true);
  return told && { reason: told.reason };
}
