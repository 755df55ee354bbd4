// Small pieces that every view is made of.

import { h } from "./dom.js";
import { day, utc } from "./words.js";

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

export function shape(name) {
  return SHAPES[name] && h("svg", { viewBox: "0 0 16 16", class: "shape", "aria-hidden": "true" }, h("path", { d: SHAPES[name] }));
}

export function badge(look, word) {
  return h("span", { class: `badge look-${look}` }, shape(look), word);
}

/** `more` is {label, kind} and what the act needs to know. */
export function button(word, act, more = {}) {
  const { label, kind, disabled, ...data } = more;
  const attributes = { type: "button", class: kind ?? null, "data-act": act, "aria-label": label ?? null, disabled };
  for (const [name, value] of Object.entries(data)) attributes[`data-${name}`] = value;
  return h("button", attributes, word);
}

/** A moment in the viewer's zone; in UTC as a tooltip. */
export function moment(ms) {
  return h("time", { datetime: new Date(ms).toISOString(), title: utc(ms / 1000) }, day(ms / 1000));
}

export function heading(word, ...more) {
  return h("div", { class: "heading" }, h("h2", null, word), h("div", { class: "tools" }, more));
}

export const none = (sentence) => h("p", { class: "quiet" }, sentence);

export const tags = (labels) => Object.entries(labels).map(([name, value]) => h("span", { class: "tag" }, value ? `${name}=${value}` : name));

/** Rows that become cards on a phone. `columns` are [word, "n" for numbers or "unseen" for readers of screens alone]. */
export function table(columns, rows, label) {
  return h("table", { "aria-label": label },
    h("thead", null, h("tr", null, columns.map(([word, kind]) => h("th", { scope: "col", class: kind === "n" ? "right" : null }, kind === "unseen" ? h("span", { class: "unseen" }, word) : word)))),
    h("tbody", null, rows));
}

export function cell(word, kind, ...inside) {
  return h("td", { "data-word": word, class: kind || null }, inside);
}

/** Which part of a long list is shown; `act` turns the page. */
export function pager(act, first, shown, total) {
  if (total <= shown) return null;
  const last = Math.min(first + shown, total);
  return h("nav", { class: "pager", "aria-label": `Pages of ${act}` },
    button("Before", act, { step: -1, disabled: first === 0 }),
    h("span", { class: "quiet" }, `${first + 1} to ${last} of ${total}`),
    button("After", act, { step: 1, disabled: last >= total }));
}
