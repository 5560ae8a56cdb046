/** The views of models: all of them, and one with its versions. */

import { batchHistogram, sparkline, trafficBar } from "./charts.js";
import {
  badge, basisPoints, bytes, fact, h, icon, keyed, milliseconds, moment, NOTHING, number, setText,
} from "./dom.js";
import { eventList } from "./events.js";
import { pastRollouts, rolloutPanel } from "./rollouts.js";

const DECIDED = {
  policy: "Decided by the model's settings.", hand: "Set by hand.", rollout: "Decided by the rollout.",
};

const perSecond = (value) => `${number(value)}/s`;
const address = (name) => `#/models/${encodeURIComponent(name)}`;

/** All models. */
export function overview({ live }) {
  const list = h("ul", { class: "models" });
  const empty = h("p", { class: "muted", hidden: true }, "No models yet. Register one with the API or the command line.");
  return {
    title: "Models",
    node: h("div", {}, h("h1", { tabindex: -1 }, "Models"), list, empty),
    update({ models }) {
      keyed(list, models, (model) => model.name, () => modelRow(live));
      empty.hidden = models.length > 0;
    },
  };
}

function modelRow(live) {
  const link = h("a", {});
  const ready = h("span", { class: "muted" });
  const rollout = h("span", { class: "row", hidden: true });
  const state = badge();
  rollout.append("rollout ", state.node);
  const traffic = trafficBar();
  const figures = figureList(["Requests", "Errors", "p99", "Queue"]);
  return {
    node: h(
      "li",
      { class: "card model-row" },
      h("div", {}, h("h2", {}, link), h("p", { class: "row" }, ready, rollout)),
      traffic.node,
      figures.node,
    ),
    update(model) {
      link.href = address(model.name);
      setText(link, model.name);
      const count = model.versions.filter((version) => version.state === "READY").length;
      setText(ready, `${count} of ${model.versions.length} versions ready`);
      const running = model.rollout && live.rollout(model.rollout);
      rollout.hidden = !running;
      if (running) state.update(running.state, running.pause ?? "");
      traffic.update(model);
      const samples = live.document.samples.filter((sample) => sample.model === model.name);
      const sum = (field) => samples.reduce((total, sample) => total + (sample[field] ?? 0), 0);
      const slowest = samples.map((sample) => sample.p99_ms).filter((value) => value !== null && value !== undefined);
      figures.update([
        perSecond(sum("requests_per_s")),
        perSecond(sum("errors_per_s")),
        slowest.length ? milliseconds(Math.max(...slowest)) : NOTHING,
        number(sum("queue_depth")),
      ]);
    },
  };
}

/** Named figures in a row. */
function figureList(names) {
  const values = names.map(() => h("dd", {}));
  return {
    node: h("dl", { class: "figures" }, names.map((name, at) => h("div", {}, h("dt", {}, name), values[at]))),
    update(texts) {
      texts.forEach((text, at) => setText(values[at], text));
    },
  };
}

/** One model: traffic, its rollout, versions and events. */
export function modelView(page, name) {
  const { live, actions } = page;
  const found = h("div", { class: "stack" });
  const missing = h("p", { hidden: true }, "There is no model of this name.");
  const start = h("button", { class: "primary", onclick: () => actions.start(name) }, "Start a rollout");
  const decided = h("p", { class: "muted" });
  const traffic = trafficBar();
  const panel = rolloutPanel(page, true);
  const versions = h("ul", { class: "versions" });
  const past = pastRollouts(page, name);
  const log = eventList(live, (event) => event.model === name, false);
  found.append(
    section("Traffic", decided, traffic.node),
    panel.node,
    section("Versions", versions),
    past.node,
    section("Events", log.node),
  );
  return {
    title: name,
    node: h("div", { class: "stack" }, h("div", { class: "head" }, h("h1", { tabindex: -1 }, name), start), missing, found),
    close: log.close,
    update() {
      const model = live.model(name);
      missing.hidden = Boolean(model);
      found.hidden = !model;
      start.hidden = !model || !actions.mayDeploy || Boolean(model.rollout) || model.versions.length < 2;
      if (!model) return;
      setText(decided, DECIDED[model.route_by] ?? "");
      traffic.update(model);
      const rollout = model.rollout && live.rollout(model.rollout);
      panel.node.hidden = !rollout;
      if (rollout) panel.update(rollout);
      const sorted = [...model.versions].sort((a, b) => isLoaded(b) - isLoaded(a) || b.number - a.number);
      keyed(versions, sorted, (version) => version.number, (version) => versionCard(live, name, version.number));
      past.update(model);
      log.update();
    },
  };
}

/** Whether a version has processes. */
const isLoaded = ({ state }) => ["READY", "LOADING", "WARMING", "DRAINING"].includes(state);

function section(title, ...content) {
  return h("section", { class: "stack" }, h("h2", {}, title), ...content);
}

function versionCard(live, model, number_) {
  const state = badge();
  const labels = h("span", { class: "labels" });
  const reason = h("p", { class: "problem", hidden: true });
  const share = h("span", { class: "muted" });
  const requests = chart("Requests", sparkline(`Requests a second of version ${number_}`, perSecond));
  const latency = chart("p99", sparkline(`99th percentile of version ${number_}`, milliseconds));
  const rows = chart("Rows of a batch", batchHistogram());
  const figures = figureList(["Errors", "Error rate", "p50", "Queue", "Memory"]);
  const workers = h("ul", { class: "workers" });
  const details = h("dl", { class: "facts" });
  const unfolded = h("details", {}, h("summary", {}, `About version ${number_}`), details);
  const measured = h("div", { class: "charts" }, requests.node, latency.node, rows.node, figures.node);
  return {
    node: h(
      "li",
      { class: "card version" },
      h("div", { class: "head" }, h("h3", {}, `Version ${number_}`), h("span", { class: "row" }, labels, state.node)),
      reason,
      share,
      measured,
      workers,
      unfolded,
    ),
    update(version) {
      state.update(version.state);
      keyed(labels, [...version.labels], (label) => label, (label) => ({ node: h("span", { class: "label" }, label) }));
      reason.hidden = !version.reason;
      setText(reason, version.reason);
      const part = `Gets ${basisPoints(version.traffic_bp)} of the requests`;
      setText(share, version.traffic_bp ? part : "Gets no plain requests");
      measured.hidden = !isLoaded(version);
      const sample = live.sample(model, number_) ?? {};
      const past = live.past(model, number_);
      requests.update(perSecond(sample.requests_per_s), past.requests);
      latency.update(milliseconds(sample.p99_ms), past.p99);
      rows.update(batches(sample.batch_rows), sample.batch_rows ?? []);
      const rate = sample.requests_per_s ? `${number((100 * sample.errors_per_s) / sample.requests_per_s)}\u00a0%` : NOTHING;
      figures.update([
        perSecond(sample.errors_per_s),
        rate,
        milliseconds(sample.p50_ms),
        number(sample.queue_depth),
        bytes(version.memory_bytes),
      ]);
      keyed(workers, version.workers, (worker) => worker.instance, workerEntry);
      keyed(details, factsOf(version), ([name]) => name, fact);
    },
  };
}

function batches(counts) {
  const count = counts?.reduce((total, each) => total + each, 0) ?? 0;
  return count ? `${number(count)} batches` : "none";
}

function chart(title, drawing) {
  const value = h("strong", {});
  return {
    node: h("div", { class: "chart" }, h("div", { class: "chart-head" }, h("span", {}, title), value), drawing.node),
    update(text, values) {
      setText(value, text);
      drawing.update(values);
    },
  };
}

function workerEntry() {
  const text = h("span", {});
  const mark = h("span", { class: "mark" });
  let shown = null;
  return {
    node: h("li", {}, mark, text),
    update(worker) {
      if (shown !== worker.is_ready) mark.replaceChildren(icon(worker.is_ready ? "check" : "wait"));
      shown = worker.is_ready;
      const process = worker.pid === null ? "no process" : `process ${worker.pid}`;
      const again = worker.restarts ? `, restarted ${worker.restarts} ×` : "";
      setText(text, `${worker.device} ${worker.instance} ${worker.is_ready ? "ready" : "not ready"}, ${process}${again}`);
    },
  };
}

function factsOf(version) {
  const dims = (shape) => (shape === null ? "of any rank" : `[${shape.map((dim) => dim ?? "?").join(", ")}]`);
  const tensors = (list) => list.map(({ name, datatype, shape }) => `${name} ${datatype} ${dims(shape)}`).join("; ");
  const signature = version.signature;
  return [
    ["Since", moment(version.since_s)],
    ["Registered", moment(version.registered_s)],
    ["Source", version.source],
    ["SHA-256", version.digest || NOTHING],
    ["Size", bytes(version.nbytes)],
    ["Loaded", { true: "by hand", false: "not, by hand", null: "as the settings say" }[version.is_wanted]],
    ...(signature
      ? [
          ["Inputs", tensors(signature.inputs)],
          ["Outputs", tensors(signature.outputs)],
          ["Batches", signature.max_batch_size ? `up to ${signature.max_batch_size} rows` : "one request at a time"],
        ]
      : []),
  ];
}
