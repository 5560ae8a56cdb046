/** What the metrics of a rollout say, with the numbers and bounds that decide it. */

import { intervalPlot } from "./charts.js";
import { badge, h, NOTHING, number, setText } from "./dom.js";

const TITLES = {
  errors: "Failed requests (500 and above)",
  refusals: "Refused requests (400 to 499)",
  latency: "Time from request to answer",
  compute: "Time of runs of as many rows",
  agreement: "Outputs that agree with the stable version's",
  prometheus: "Query",
};

const UNITS = {
  errors: [100, "%"],
  refusals: [100, "%"],
  latency: [1000, "ms"],
  compute: [1000, "ms"],
  agreement: [100, "%"],
  prometheus: [1, ""],
};

/** One metric of a rollout. `update(metric, verdict, rollout)`; no verdict before the first look. */
export function verdictCard(metric) {
  const outcome = badge();
  const text = h("p", {});
  const drawings = h("div", { class: "stack" });
  const note = metric.critical ? null : h("p", { class: "muted" }, "Not critical: it never rolls back.");
  let shown = "";
  return {
    node: h(
      "li",
      { class: "card verdict" },
      h(
        "div",
        { class: "head" },
        h("div", {}, h("h4", {}, metric.name), h("p", { class: "muted" }, TITLES[metric.source])),
        outcome.node,
      ),
      text,
      drawings,
      note,
    ),
    update(verdict, spec) {
      outcome.update((verdict?.outcome ?? "no_data").toUpperCase());
      setText(text, verdict?.text ?? "Nothing was measured in this step yet.");
      const now = JSON.stringify(verdict ?? null);
      if (now === shown) return;
      shown = now;
      drawings.replaceChildren(...(verdict ? figures(verdict, spec) : []));
    },
  };
}

function figures(verdict, spec) {
  const [scale, unit] = UNITS[verdict.source];
  const show = (value) => `${number(value * scale)}\u00a0${unit}`.trim();
  const arms = [{ kind: "canary", name: `v${spec.canary}`, ...verdict.canary }];
  if (verdict.baseline) arms.push({ kind: "stable", name: `v${spec.stable}`, ...verdict.baseline });
  if (arms.every((arm) => arm.value === null)) return [];
  const isAlone = !verdict.baseline;
  const isHigherBetter = verdict.source === "agreement" || verdict.direction === "higher";
  const of = isAlone ? { limit: verdict.limit, bad: isHigherBetter ? "below" : "above" } : {};
  const found = [figure("Measured", arms, { ...of, shown: show }, isAlone && `limit ${show(verdict.limit)}`)];
  const { change } = verdict;
  if (change && change.value !== null) {
    const isRate = verdict.source === "errors" || verdict.source === "refusals";
    // Of durations the change is a quotient; people read by how much they are longer.
    const shift = isRate ? 0 : 1;
    const moved = (value) => (value === null ? null : value - shift);
    const [value, low, high] = [change.value, change.low, change.high].map(moved);
    const rows = [{ kind: "change", name: "change", value, low, high, samples: null }];
    const changed = (value) => `${value > 0 ? "+" : ""}${number(100 * value)}\u00a0${isRate ? "pp" : "%"}`;
    const title = isRate ? "Canary less stable" : "Canary against stable";
    const options = { limit: verdict.limit, bad: "above", origin: 0, shown: changed };
    found.push(figure(title, rows, options, `limit ${changed(verdict.limit)}`));
  }
  return found;
}

function figure(title, rows, options, limit) {
  const words = rows.map(({ name, value, low, high }) => `${name} ${bounds(value, low, high, options.shown)}`);
  const label = [title, ...words, limit].filter(Boolean).join(", ");
  const keys = rows.map(({ kind, name, value, low, high, samples }) => h(
    "li",
    {},
    h("span", { class: `mark ${kind}`, "aria-hidden": "true" }),
    h("strong", {}, `${name} ${value === null ? NOTHING : options.shown(value)}`),
    h("span", { class: "muted" }, between(low, high, options.shown) + (samples ? ` of ${number(samples)}` : "")),
  ));
  if (limit) keys.push(h("li", {}, h("span", { class: "mark limit", "aria-hidden": "true" }), limit));
  const plot = intervalPlot(rows, { ...options, label });
  return h("figure", {}, h("figcaption", {}, title), plot, h("ul", { class: "keys", "aria-hidden": "true" }, keys));
}

function bounds(value, low, high, shown) {
  return value === null ? "nothing measured" : `${shown(value)} ${between(low, high, shown)}`;
}

function between(low, high, shown) {
  if (low === null && high === null) return "";
  return `${low === null ? "…" : shown(low)} to ${high === null ? "…" : shown(high)}`;
}
