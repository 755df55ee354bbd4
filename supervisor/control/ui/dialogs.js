// Questions before an order: for how long, why, and whether it is meant.

import { h, show } from "./dom.js";

const HOW_LONG = [["", "until I resume"], ["900", "15 minutes"], ["3600", "1 hour"], ["7200", "2 hours"], ["14400", "4 hours"], ["28800", "8 hours"], ["86400", "1 day"]];

const how_long = () => h("label", { class: "field" }, "For",
  h("select", { name: "for_s" }, HOW_LONG.map(([value, word]) => h("option", { value }, word))));
const why = () => h("label", { class: "field" }, "Reason, for others to read",
  h("input", { name: "reason", maxlength: "200", autocomplete: "off" }));
const check = (name, word) => h("label", { class: "check" }, h("input", { type: "checkbox", name }), word);

/** Ask; the form's values, or null when it was called off. `choices` are [value, word], the first is the default. */
function question(title, parts, choices) {
  const dialog = document.getElementById("dialog");
  show(dialog, h("form", { method: "dialog" },
    h("h2", { id: "dialog-title" }, title), parts,
    h("div", { class: "tools" },
      choices.map(([value, word], at) => h("button", { type: "submit", value, class: at ? null : "main" }, word)),
      h("button", { type: "submit", value: "", formnovalidate: true }, "Cancel"))));
  dialog.querySelector("form").reset();
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      const form = new FormData(dialog.querySelector("form"));
      resolve(dialog.returnValue ? { choice: dialog.returnValue, ...Object.fromEntries(form) } : null);
    }, { once: true });
  });
}

/** The body of POST /v1/pause, or null. */
export async function ask_pause() {
  const told = await question("Pause the worker",
    [h("p", null, "Jobs that run are finished; new ones are not taken."), how_long(), why(), check("free_vram", "Also end loaded models, and free their memory")],
    [["pause", "Pause"]]);
  if (!told) return null;
  const order = { reason: told.reason, free_vram: Boolean(told.free_vram) };
  return told.for_s ? { ...order, for_s: Number(told.for_s) } : order;
}

/** The body of POST /v1/gpus/{uuid}/cordon, or null. */
export async function ask_cordon(name) {
  const told = await question(`Keep ${name} free`,
    [h("p", null, "No new jobs run on this GPU; the others go on."), how_long(), why(), check("unload", "Also end the models that are loaded on it")],
    [["cordon", "Keep it free"]]);
  if (!told) return null;
  const order = { reason: told.reason, unload: Boolean(told.unload) };
  return told.for_s ? { ...order, for_s: Number(told.for_s) } : order;
}

/** The body of POST /v1/drain, or null. */
export async function ask_drain(jobs) {
  const told = await question("Stop or restart the supervisor",
    [h("p", null, jobs ? `${jobs} ${jobs === 1 ? "job is" : "jobs are"} finished first.` : "No job is running."),
     h("p", { class: "quiet" }, "After a stop this page is gone until the supervisor is started again. A restart needs a service manager that starts it again."), why()],
    [["restart", "Restart"], ["stop", "Stop"]]);
  return told && { reason: told.reason, restart: told.choice === "restart" };
}
