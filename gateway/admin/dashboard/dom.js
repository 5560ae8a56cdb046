/** Elements, lists that keep their nodes, and numbers for people. Data reaches the page as text only. */

const SVG = "http://www.w3.org/2000/svg";

/** An HTML element. Properties are attributes; functions under `on…` listen; false and null are left out. */
export function h(tag, properties, ...children) {
  return fill(document.createElement(tag), properties, children);
}

/** The same for SVG. */
export function s(tag, properties, ...children) {
  return fill(document.createElementNS(SVG, tag), properties, children);
}

function fill(node, properties, children) {
  for (const [name, value] of Object.entries(properties ?? {})) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else setAttribute(node, name, value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

/** Write an attribute where it changed; true writes it empty, false and null remove it. */
export function setAttribute(node, name, value) {
  if (value === null || value === undefined || value === false) node.removeAttribute(name);
  else if (node.getAttribute(name) !== String(value)) node.setAttribute(name, value === true ? "" : value);
}

/** Write text where it changed, so that a selection in it lives on. */
export function setText(node, text) {
  if (node.textContent !== String(text)) node.textContent = text;
}

const kept = new WeakMap();

/**
 * Make the children of `parent` follow `items`. `make(item)` gives `{node, update(item)}`, once for each
 * key: a node stays the same while its key is there, and with it focus and what is unfolded.
 */
export function keyed(parent, items, keyOf, make) {
  const old = kept.get(parent) ?? new Map();
  const parts = new Map(items.map((item) => [String(keyOf(item)), old.get(String(keyOf(item))) ?? make(item)]));
  for (const [key, part] of old) if (!parts.has(key)) part.node.remove();
  let next = parent.firstElementChild;
  for (const part of parts.values()) {
    if (part.node === next) next = next.nextElementSibling;
    else parent.insertBefore(part.node, next);
  }
  kept.set(parent, parts);
  for (const item of items) parts.get(String(keyOf(item))).update?.(item);
}

const ICONS = {
  back: "M4.5 2 2 4.5 4.5 7M2 4.5h5a2.5 2.5 0 0 1 0 5H5",
  check: "M2 6.5 5 9.5 10 3",
  cross: "M3 3l6 6M9 3 3 9",
  dash: "M2.5 6h7",
  half: "M6 2a4 4 0 1 0 0 8zM6 2a4 4 0 0 1 0 8",
  pause: "M4 2.5v7M8 2.5v7",
  play: "M4 2.5 9.5 6 4 9.5z",
  ring: "M6 2a4 4 0 1 0 0 8 4 4 0 0 0 0-8z",
  up: "M6 10V2M2.5 5.5 6 2l3.5 3.5",
  wait: "M6 2a4 4 0 1 0 0 8 4 4 0 0 0 0-8zM6 4v2.2L7.5 7.5",
  warn: "M6 2 11 10.5H1zM6 5.5V7.5M6 9v.2",
};

/** A small drawing beside a word; it says nothing that the word does not. */
export function icon(name) {
  const path = s("path", { d: ICONS[name] });
  return s("svg", { class: "icon", viewBox: "0 0 12 12", "aria-hidden": "true" }, path);
}

const TONES = {
  READY: ["good", "check"],
  LOADING: ["busy", "wait"],
  WARMING: ["busy", "wait"],
  DRAINING: ["quiet", "half"],
  REGISTERED: ["quiet", "ring"],
  RETIRED: ["quiet", "dash"],
  FAILED: ["bad", "cross"],
  PENDING: ["busy", "wait"],
  STEPPING: ["busy", "play"],
  PAUSED: ["warn", "pause"],
  PROMOTING: ["busy", "up"],
  SUCCEEDED: ["good", "check"],
  ABORTING: ["bad", "back"],
  ABORTED: ["bad", "back"],
  PASS: ["good", "check"],
  FAIL: ["bad", "cross"],
  INCONCLUSIVE: ["quiet", "half"],
  NO_DATA: ["quiet", "ring"],
};

/** A word with a shape and a colour for a state of a version, a rollout or a verdict. */
export function badge() {
  const node = h("span", { class: "badge" });
  let shown = "";
  return {
    node,
    update(state, more = "") {
      if (shown === state + more) return;
      shown = state + more;
      const [tone, drawing] = TONES[state] ?? ["quiet", "ring"];
      node.className = `badge ${tone}`;
      const word = state.toLowerCase().replaceAll("_", " ");
      node.replaceChildren(icon(drawing), more ? `${word} (${more.replaceAll("_", " ")})` : word);
    },
  };
}

export const NOTHING = "–";
const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

/** About three digits; a dash for what is not known. */
export function number(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return NOTHING;
  const size = Math.abs(value);
  if (size >= 100 || Number.isInteger(value)) return whole.format(value);
  return value.toFixed(size >= 10 ? 1 : size >= 0.01 ? 2 : 4);
}

export const milliseconds = (value) => (value === null || value === undefined ? NOTHING : `${number(value)}\u00a0ms`);

/** Hundredths of a percent. */
export const basisPoints = (value) => `${number(value / 100)}\u00a0%`;

export function bytes(value) {
  if (!value) return NOTHING;
  const power = Math.min(4, Math.floor(Math.log2(value) / 10));
  return `${number(value / 2 ** (10 * power))}\u00a0${["B", "KiB", "MiB", "GiB", "TiB"][power]}`;
}

/** A length of time in its two largest units. Numbers and units stay on one line. */
export function duration(seconds) {
  const left = Math.max(0, Math.round(seconds));
  if (left < 60) return `${left}\u00a0s`;
  let [size, unit, part, smaller] = [86400, "d", 3600, "h"];
  if (left < 3600) [size, unit, part, smaller] = [60, "min", 1, "s"];
  else if (left < 86400) [size, unit, part, smaller] = [3600, "h", 60, "min"];
  const rest = Math.floor((left % size) / part);
  return `${Math.floor(left / size)}\u00a0${unit}` + (rest ? ` ${rest}\u00a0${smaller}` : "");
}

/** A moment: the time, with the date where that is not today. */
export function moment(seconds) {
  const at = new Date(seconds * 1000);
  const text = at.toDateString() === new Date().toDateString()
    ? at.toLocaleTimeString("en-GB")
    : at.toLocaleString("en-GB", { dateStyle: "medium", timeStyle: "medium" });
  return h("time", { datetime: at.toISOString() }, text);
}

/** An entry of a `dl` for `keyed`, of a name and what it is: text, or an element. */
export function fact([name]) {
  const value = h("dd", {});
  return {
    node: h("div", {}, h("dt", {}, name), value),
    update([, now]) {
      if (typeof now === "string") setText(value, now);
      else if (value.textContent !== now.textContent) value.replaceChildren(now);
    },
  };
}
