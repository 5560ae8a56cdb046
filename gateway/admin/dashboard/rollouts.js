/** The views of rollouts: one as it runs, a model's past ones, and all of them. */

import { request } from "./api.js";
import { badge, basisPoints, duration, fact, h, icon, keyed, moment, number, setAttribute, setText } from "./dom.js";
import { eventList } from "./events.js";
import { verdictCard } from "./verdicts.js";

const PAGE = 20;

/** Events of a rollout that its page reads. */
const EVENTS = 1000;

const RUNS = ["STEPPING", "PAUSED"];
const ENDS = ["SUCCEEDED", "ABORTED", "FAILED"];

/** Whether a rollout in this state takes a verb. */
const TAKES = {
  pause: ({ state, pause }) => state === "STEPPING" || (state === "PAUSED" && pause !== "manual"),
  resume: ({ state, pause }) => state === "PAUSED" && (pause === "manual" || pause === "inconclusive"),
  promote: ({ state }) => RUNS.includes(state),
  promote_full: ({ state }) => RUNS.includes(state),
  abort: ({ state }) => !ENDS.includes(state) && state !== "ABORTING",
  retry: ({ state }) => state === "ABORTED" || state === "FAILED",
};

const NAMES = {
  pause: "Pause",
  resume: "Resume",
  promote: "Promote",
  promote_full: "Promote fully",
  abort: "Abort",
  retry: "Retry",
};

const linkTo = (rollout) => `#/rollouts/${encodeURIComponent(rollout.model)}/${encodeURIComponent(rollout.id)}`;

/** A rollout's state, steps, verdicts and what can be done to it. `isLinked`: its title leads to its page. */
export function rolloutPanel({ live, actions }, isLinked) {
  const title = h("h2", { tabindex: -1 });
  const state = badge();
  const reason = h("p", {});
  const steps = h("ol", { class: "steps" });
  const progress = h("dl", { class: "figures" });
  const verdicts = h("ul", { class: "verdicts" });
  const none = h("p", { class: "muted", hidden: true }, "No metrics: only the kill-switch rolls back.");
  let rollout = null;
  const buttons = Object.entries(NAMES).map(([verb, name]) => {
    const kind = verb === "abort" ? "danger" : verb === "resume" ? "primary" : null;
    return { verb, button: h("button", { class: kind, onclick: () => actions.command(rollout, verb) }, name) };
  });
  const bar = h(
    "div",
    { class: "actions", role: "group", "aria-label": "What to do with the rollout" },
    buttons.map(({ button }) => button),
  );
  const node = h(
    "section",
    { class: "card stack rollout" },
    h("div", { class: "head" }, title, state.node),
    reason, bar, steps, progress, h("h3", {}, "Verdicts of this step"), none, verdicts,
  );
  return {
    node,
    update(now) {
      rollout = now;
      const { spec } = now;
      const words = `Rollout of version ${spec.canary}`;
      if (isLinked) {
        if (!title.firstElementChild) title.append(h("a", {}));
        title.firstElementChild.href = linkTo(now);
        setText(title.firstElementChild, words);
      } else setText(title, `${words}, to replace version ${spec.stable}`);
      state.update(now.state, now.pause ?? "");
      setText(reason, now.reason);
      reason.hidden = !now.reason;
      const held = document.activeElement;
      for (const { verb, button } of buttons) button.hidden = !actions.mayDeploy || !TAKES[verb](now);
      // Focus never falls back to the begin of the page because a button went.
      if (held?.hidden && bar.contains(held)) title.focus();
      bar.hidden = buttons.every(({ button }) => button.hidden);
      keyed(steps, spec.steps.map((step, at) => ({ step, at, now })), ({ at }) => at, stepEntry);
      keyed(progress, progressOf(now, live.document.at_s), ([name]) => name, fact);
      keyed(verdicts, spec.metrics, (metric) => metric.name, (metric) => {
        const card = verdictCard(metric);
        return { node: card.node, update: () => card.update(rollout.verdicts[metric.name], rollout.spec) };
      });
      none.hidden = spec.metrics.length > 0;
    },
  };
}

function stepEntry({ step, at }) {
  const mark = h("span", { class: "mark" });
  const word = h("span", { class: "muted" });
  const mirror = step.mirror_percent ? `, copies of ${number(step.mirror_percent)} %` : "";
  const least = [
    step.min_duration_s && duration(step.min_duration_s),
    step.min_requests && `${number(step.min_requests)} requests`,
  ].filter(Boolean).join(" and ");
  const wants = [least && `at least ${least}`, step.pause && "then waits for you"].filter(Boolean).join(", ");
  const title = h("strong", {}, `${basisPoints(step.weight_bp)}${mirror}`);
  const node = h("li", {}, mark, title, word, h("span", { class: "muted wants" }, wants));
  let shown = null;
  return {
    node,
    update({ now }) {
      const state = stepState(now, at);
      if (state === shown) return;
      shown = state;
      node.className = state;
      setAttribute(node, "aria-current", state === "now" ? "step" : null);
      mark.replaceChildren(icon({ done: "check", now: "play", stopped: "back", next: "ring" }[state]));
      setText(word, { done: "done", now: "now", stopped: "stopped here", next: "to come" }[state]);
    },
  };
}

function stepState({ state, step }, at) {
  if (state === "SUCCEEDED" || state === "PROMOTING" || at < step) return "done";
  if (at > step || ["PENDING", "LOADING", "WARMING"].includes(state)) return "next";
  return RUNS.includes(state) ? "now" : "stopped";
}

function progressOf(rollout, now) {
  const step = rollout.spec.steps[rollout.step];
  const { canary, baseline, compared, agreed } = rollout.seen;
  const isRunning = RUNS.includes(rollout.state);
  const answered = number(rollout.answered);
  const least = step.min_requests ? ` (at least ${number(step.min_requests)})` : "";
  return [
    ["Attempt", `${rollout.attempt}`],
    ["Started", moment(rollout.created_s)],
    ...(isRunning ? [["In this step for", duration(now - rollout.step_started_s)]] : []),
    ["Canary's requests", `${answered}${least}, ${number(rollout.failed)} failed`],
    ["Compared", `${number(canary.requests)} with ${number(baseline.requests)}`],
    ...(compared ? [["Copies that agree", `${number(agreed)} of ${number(compared)}`]] : []),
  ];
}

/** One rollout, with its events. */
export function rolloutView(page, model, id) {
  const { live } = page;
  const panel = rolloutPanel(page, false);
  const missing = h("p", { hidden: true }, "There is no such rollout.");
  const log = eventList(live, (event) => event.rollout === id, false);
  const chosen = h("dl", { class: "facts" });
  const content = h("div", { class: "stack", hidden: true }, panel.node,
    h("section", { class: "stack" }, h("h2", {}, "What it was asked to do"), chosen),
    h("section", { class: "stack" }, h("h2", {}, "Events"), log.node));
  if (!live.rollout(id)) {
    live.read(model, id).catch((error) => {
      live.failed(error);
      missing.hidden = error.status !== 404;
    });
  }
  const query = `model=${encodeURIComponent(model)}&rollout=${encodeURIComponent(id)}&last=${EVENTS}`;
  request("GET", `/events?${query}`).then(({ events }) => log.add(events)).catch((error) => live.failed(error));
  return {
    title: `Rollout of ${model}`,
    node: h("div", { class: "stack" }, h("p", {}, h("a", { href: `#/models/${encodeURIComponent(model)}` }, `← ${model}`)),
      h("h1", { tabindex: -1 }, `Rollout of ${model}`), missing, content),
    close: log.close,
    update() {
      const rollout = live.rollout(id);
      content.hidden = !rollout;
      if (!rollout) return;
      panel.update(rollout);
      keyed(chosen, chosenOf(rollout), ([name]) => name, fact);
      log.update();
    },
  };
}

function chosenOf({ id, spec }) {
  const kill = spec.kill_switch;
  const killed = kill
    ? `${number(100 * kill.error_rate)} % errors after ${number(kill.min_requests)} requests`
    : "none";
  return [
    ["Id", id],
    ["Who stays on a version", spec.sticky ? `by ${spec.sticky.key}` : "nobody: each request is drawn by lot"],
    ["Requests that choose", spec.match.map((pin) => `${pin.header}: ${pin.value} to the ${pin.to}`).join("; ") || "none"],
    ["Compared with", spec.baseline === "stable" ? "all that the stable version answers" : "as many of its requests"],
    ["Confidence", `${number(100 * spec.confidence)} % of the whole rollout`],
    ["Kill-switch", killed],
    ["Longest step", duration(spec.progress_deadline_s)],
    ["Gates", spec.gates.map((gate) => gate.name).join(", ") || "none"],
  ];
}

function rolloutRow(rollout, names) {
  const state = badge();
  const about = h("span", { class: "muted reason" });
  const subject = `${names ? `${rollout.model}: ` : ""}version ${rollout.spec.stable} to ${rollout.spec.canary}`;
  return {
    node: h(
      "li",
      {},
      h("a", { href: linkTo(rollout) }, subject),
      state.node,
      h("span", { class: "when" }, moment(rollout.created_s)),
      about,
    ),
    update(now) {
      state.update(now.state, now.pause ?? "");
      setText(about, now.reason);
    },
  };
}

/** A model's rollouts that have ended. */
export function pastRollouts({ live }, name) {
  const list = h("ul", { class: "rollouts" });
  const node = h("section", { class: "stack", hidden: true }, h("h2", {}, "Past rollouts"), list);
  let active;
  return {
    node,
    update(model) {
      if (model.rollout === active) return;
      active = model.rollout;
      request("GET", `/models/${encodeURIComponent(name)}/rollouts?limit=${PAGE}`).then(({ rollouts }) => {
        const ended = rollouts.filter((rollout) => ENDS.includes(rollout.state));
        node.hidden = ended.length === 0;
        keyed(list, ended, (rollout) => rollout.id, (rollout) => rolloutRow(rollout, false));
      }).catch((error) => live.failed(error));
    },
  };
}

/** All rollouts, newest first. */
export function rolloutsView({ live }) {
  const list = h("ul", { class: "rollouts" });
  const empty = h("p", { class: "muted", hidden: true }, "No rollouts yet. Start one on the page of a model.");
  const more = h("button", { hidden: true, onclick: () => read() }, "Show older ones");
  let found = [];
  let next = null;
  const show = () => {
    const newest = found.map((rollout) => live.rollout(rollout.id) ?? rollout);
    keyed(list, newest, (rollout) => rollout.id, (rollout) => rolloutRow(rollout, true));
  };
  const read = async () => {
    const page = await request("GET", `/rollouts?limit=${PAGE}${next ? `&after=${encodeURIComponent(next)}` : ""}`);
    found = [...found, ...page.rollouts];
    next = page.next;
    more.hidden = next === null;
    empty.hidden = found.length > 0;
    show();
  };
  read().catch((error) => live.failed(error));
  return {
    title: "Rollouts",
    node: h("div", { class: "stack" }, h("h1", { tabindex: -1 }, "Rollouts"), empty, list, more),
    update() {
      const known = new Set(found.map((rollout) => rollout.id));
      found = [...live.document.rollouts.filter((rollout) => !known.has(rollout.id)), ...found];
      if (found.length > 0) empty.hidden = true;
      show();
    },
  };
}
