/** Small charts in SVG. Each is `{node, update(…)}` and says in words what it draws. */

import { basisPoints, h, keyed, number, s, setAttribute, setText } from "./dom.js";

/** Seconds that sparklines show. */
export const HISTORY_S = 120;

const SPARK_HEIGHT = 32;
const SPARK_PAD = 2;

/** A line of the last two minutes, newest at the right; null is a gap. */
export function sparkline(what, shown) {
  const area = s("path", { class: "spark-area" });
  const line = s("path", { class: "spark-line", "vector-effect": "non-scaling-stroke" });
  const node = s("svg", {
    class: "spark", role: "img", viewBox: `0 0 ${HISTORY_S - 1} ${SPARK_HEIGHT}`, preserveAspectRatio: "none",
  }, area, line);
  return {
    node,
    update(values) {
      const known = values.filter((value) => value !== null);
      const top = Math.max(...known, Number.MIN_VALUE);
      const x = (at) => HISTORY_S - values.length + at;
      const y = (value) => SPARK_HEIGHT - SPARK_PAD - (value / top) * (SPARK_HEIGHT - 2 * SPARK_PAD);
      let strokes = "";
      let fills = "";
      let start = null;
      values.forEach((value, at) => {
        if (value === null) return;
        if (start === null) start = at;
        strokes += `${at === start ? "M" : "L"}${x(at)} ${y(value).toFixed(2)}`;
        if (at + 1 < values.length && values[at + 1] !== null) return;
        if (at === start) strokes += "h.5";
        const edge = values.slice(start, at + 1).map((v, n) => `L${x(start + n)} ${y(v).toFixed(2)}`).join("");
        fills += `M${x(start)} ${SPARK_HEIGHT}${edge}L${x(at)} ${SPARK_HEIGHT}z`;
        start = null;
      });
      setAttribute(line, "d", strokes);
      setAttribute(area, "d", fills);
      const range = known.length ? `from ${shown(Math.min(...known))} to ${shown(Math.max(...known))}` : "nothing yet";
      setAttribute(node, "aria-label", `${what} in the last two minutes: ${range}`);
    },
  };
}

/** Upper bounds of the histogram of rows; one more bucket has all above. */
const ROW_BOUNDS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512];
const ROW_NAMES = [...ROW_BOUNDS.map((bound, at) => {
  const low = at ? ROW_BOUNDS[at - 1] + 1 : 1;
  return low === bound ? `${bound}` : `${low}–${bound}`;
}), "more"];
const BAR_HEIGHT = 32;

/** How many batches had how many rows. */
export function batchHistogram() {
  const bars = ROW_NAMES.map((name, at) => ({
    bar: s("rect", { class: "bar", x: at * 10 + 1, width: 8 }),
    title: s("title", {}),
    name,
  }));
  const base = s("path", {
    class: "axis", d: `M0 ${BAR_HEIGHT}h${10 * bars.length}`, "vector-effect": "non-scaling-stroke",
  });
  const drawing = s("svg", {
    class: "spark", role: "img", viewBox: `0 0 ${10 * bars.length} ${BAR_HEIGHT}`, preserveAspectRatio: "none",
  }, base, bars.map(({ bar, title }) => (bar.append(title), bar)));
  const ticks = h("div", { class: "ticks", "aria-hidden": "true" }, ["1", "16", ">512"].map((text) => h("span", {}, text)));
  return {
    node: h("div", {}, drawing, ticks),
    update(counts) {
      const top = Math.max(...counts, 1);
      bars.forEach(({ bar, title, name }, at) => {
        const count = counts[at] ?? 0;
        // One batch among thousands is still to be seen.
        const height = count ? Math.max(2, (count / top) * (BAR_HEIGHT - 2)) : 0;
        setAttribute(bar, "height", height.toFixed(2));
        setAttribute(bar, "y", (BAR_HEIGHT - height).toFixed(2));
        setText(title, `${name} rows: ${number(count)} batches`);
      });
      const words = ROW_NAMES.map((name, at) => counts[at] && `${name} rows ${counts[at]}`).filter(Boolean);
      setAttribute(drawing, "aria-label", `Batches by rows: ${words.join(", ") || "none"}`);
    },
  };
}

/** Who gets which part of a model's requests. `update(model)` takes a model's document. */
export function trafficBar() {
  const bar = h("div", { class: "split", "aria-hidden": "true" });
  const legend = h("ul", { class: "legend" });
  const empty = h("p", { class: "muted", hidden: true }, "No version can answer.");
  return {
    node: h("div", {}, bar, legend, empty),
    update(model) {
      const shares = model.route ? partsOf(model) : [];
      keyed(bar, shares.filter((part) => part.weight_bp), (part) => part.key, segment);
      keyed(legend, shares, (part) => part.key, legendEntry);
      empty.hidden = shares.length > 0;
      bar.hidden = shares.length === 0;
    },
  };
}

function partsOf({ route }) {
  const main = route.shares.at(-1).version;
  const role = (version) => (version === main ? "stable" : "canary");
  const parts = route.shares.map((share) => ({
    key: `${share.version}${share.is_slice ? " slice" : ""}`,
    kind: share.is_slice ? "slice" : role(share.version),
    weight_bp: share.weight_bp,
    text: `v${share.version} ${basisPoints(share.weight_bp)}`,
    more: share.is_slice ? "counted apart, to compare with" : "",
  }));
  route.pins.forEach((pin, at) => parts.push({
    key: `pin ${at}`,
    kind: `${role(pin.version)} ring`,
    weight_bp: 0,
    text: `v${pin.version}`,
    more: `where ${pin.header} is ${pin.value}`,
  }));
  if (route.shadow) {
    const { version, share_bp } = route.shadow;
    parts.push({
      key: "shadow",
      kind: `${role(version)} ring`,
      weight_bp: 0,
      text: `v${version}`,
      more: `gets copies of ${basisPoints(share_bp)} of the others' requests`,
    });
  }
  return parts;
}

function segment(part) {
  const node = h("div", { class: `segment ${part.kind}` });
  return {
    node,
    update({ weight_bp, text }) {
      node.style.setProperty("--weight", weight_bp);
      setText(node, weight_bp >= 1200 ? text : "");
    },
  };
}

function legendEntry(part) {
  const text = h("span", {});
  const more = h("span", { class: "muted" });
  return {
    node: h("li", {}, h("span", { class: `swatch ${part.kind}`, "aria-hidden": "true" }), text, more),
    update(now) {
      setText(text, now.text);
      setText(more, now.more);
    },
  };
}

const ROW_PX = 22;
const AXIS_PX = 18;

/**
 * Intervals above one axis. `rows` are `{kind, low, value, high}`, null for an end that is open; `limit` is
 * a line, with the side that is bad (`above` or `below`) shaded; `origin` is a value that the axis shows.
 */
export function intervalPlot(rows, { limit, bad, origin, shown, label }) {
  const known = rows.flatMap(({ low, value, high }) => [low, value, high]);
  const ends = [...known, limit, origin].filter((x) => x !== null && x !== undefined);
  const least = Math.min(...ends);
  const room = (Math.max(...ends) - least || Math.abs(least) || 1) * 1.16;
  const below = least - room * 0.07;
  // Nothing that is measured here is less than nothing.
  const from = least >= 0 ? Math.max(0, below) : below;
  const percent = (value) => Math.min(100, Math.max(0, ((value - from) / room) * 100));
  const x = (value) => `${percent(value).toFixed(2)}%`;
  const bottom = rows.length * ROW_PX;
  const parts = [];
  if (limit !== undefined) {
    const at = percent(limit);
    parts.push(s("rect", {
      class: "bad-side",
      x: bad === "above" ? `${at}%` : 0,
      y: 0,
      width: `${bad === "above" ? 100 - at : at}%`,
      height: bottom,
    }));
    parts.push(s("line", { class: "limit", x1: x(limit), x2: x(limit), y1: 0, y2: bottom }));
  }
  parts.push(s("line", { class: "axis", x1: 0, x2: "100%", y1: bottom, y2: bottom }));
  if (origin !== undefined) parts.push(s("line", { class: "axis", x1: x(origin), x2: x(origin), y1: 0, y2: bottom }));
  rows.forEach((row, at) => parts.push(interval(row, (at + 0.5) * ROW_PX, x)));
  parts.push(tick(from, "start", shown, bottom), tick(from + room, "end", shown, bottom));
  const middle = percent(limit ?? NaN);
  if (middle > 22 && middle < 78) parts.push(tick(limit, "middle", shown, bottom, `${middle}%`));
  const height = bottom + AXIS_PX;
  return s("svg", { class: "intervals", role: "img", "aria-label": label, width: "100%", height }, parts);
}

function interval({ kind, low, value, high }, y, x) {
  if (value === null) return s("g", {});
  // A query's value has no bounds, which is not the same as one that is open.
  const line = (low !== null || high !== null) && s("line", {
    class: "range", y1: y, y2: y, x1: low === null ? 0 : x(low), x2: high === null ? "100%" : x(high),
  });
  const caps = [low, high].filter((end) => end !== null)
    .map((end) => s("line", { class: "cap", x1: x(end), x2: x(end), y1: y - 5, y2: y + 5 }));
  const point = kind === "stable"
    ? s("rect", { class: "point", x: x(value), y: y - 4, width: 8, height: 8, transform: "translate(-4 0)" })
    : s("circle", { class: "point", cx: x(value), cy: y, r: 4.5 });
  return s("g", { class: kind }, line, caps, point);
}

function tick(value, anchor, shown, bottom, x = anchor === "end" ? "100%" : 0) {
  return s("text", { class: "tick", x, y: bottom + 13, "text-anchor": anchor }, shown(value));
}
