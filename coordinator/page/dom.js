// Elements from data, and the smallest change from what is shown to what shall be.
// What is focused, typed or selected survives, because elements stay and only what differs is touched.

const SVG = new Set(["svg", "path", "rect", "title"]);

/** An element; `children` are elements, texts, or nothing (null, false, ""). */
export function h(tag, attributes, ...children) {
  const element = SVG.has(tag)
    ? document.createElementNS("http://www.w3.org/2000/svg", tag)
    : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    element.setAttribute(name, value === true ? "" : value);
  }
  for (const child of children.flat(9)) {
    if (child === null || child === undefined || child === false || child === "") continue;
    element.append(child);
  }
  return element;
}

/** Make the children of `place` equal to `wanted`. Elements with a `data-key` stay themselves when they move. */
export function show(place, ...wanted) {
  const next = h("div", null, ...wanted);
  match(place, next);
}

function match(old, next) {
  const keyed = new Map();
  for (const child of old.children) if (child.dataset?.key) keyed.set(child.dataset.key, child);
  let at = old.firstChild;
  for (const child of [...next.childNodes]) {
    const key = child.dataset?.key;
    let mine = key ? keyed.get(key) : at;
    if (mine?.dataset?.key && mine.dataset.key !== key) mine = null; // it belongs to another
    if (mine && alike(mine, child)) {
      if (mine !== at) old.insertBefore(mine, at);
      else at = at.nextSibling;
      become(mine, child);
    } else {
      old.insertBefore(child, at);
    }
  }
  while (at) {
    const gone = at;
    at = at.nextSibling;
    gone.remove();
  }
}

function alike(one, other) {
  return one.nodeType === other.nodeType && one.nodeName === other.nodeName;
}

function become(mine, next) {
  if (mine.nodeType === Node.TEXT_NODE) {
    if (mine.data !== next.data) mine.data = next.data;
    return;
  }
  for (const name of mine.getAttributeNames()) {
    if (!next.hasAttribute(name) && !(mine.nodeName === "DETAILS" && name === "open")) mine.removeAttribute(name);
  }
  for (const name of next.getAttributeNames()) {
    if (mine.getAttribute(name) !== next.getAttribute(name)) mine.setAttribute(name, next.getAttribute(name));
  }
  match(mine, next);
}
