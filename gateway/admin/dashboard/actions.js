/** What changes something: each asks first, in a dialog. */

import { makeKey, request } from "./api.js";
import { basisPoints, h, number } from "./dom.js";

/** What is tried again without being asked whether the rollout moved meanwhile: it only ever stops things. */
const ANYWAY = ["abort", "pause"];

const STICKY = [
  ["", "nobody: each request is drawn by lot"],
  ["header", "by a header"],
  ["cookie", "by a cookie"],
  ["ip", "by the client's address"],
];

const COMPARE = [
  ["", "only run"],
  ["top1", "compared: largest element"],
  ["exact", "compared: exactly"],
  ["tolerance", "compared: but for rounding"],
  ["cosine", "compared: by cosine"],
];

/** Percentages of at most two digits behind the point, separated by commas. */
const WEIGHTS = "\\s*\\d+(\\.\\d{1,2})?(\\s*,\\s*\\d+(\\.\\d{1,2})?)*\\s*";

const PRESETS = {
  careful: ["Careful: 1, 5, 25, 50 %", "1, 5, 25, 50", 300, 500],
  steady: ["Steady: 5, 25, 50 %", "5, 25, 50", 60, 200],
  quick: ["Quick: 10, 50 %", "10, 50", 10, 100],
};

/** Dialogs that confirm and send. `live` knows the revisions; `session()` gives who is signed in. */
export class Actions {
  constructor(live, session) {
    Object.assign(this, { live, session });
  }

  get mayDeploy() {
    return ["deployer", "admin"].includes(this.session()?.role);
  }

  /** Ask whether to carry out a verb on a rollout, then do it. */
  command(rollout, verb) {
    const { title, text, name } = words(rollout, verb);
    const path = `/models/${encodeURIComponent(rollout.model)}/rollouts/${encodeURIComponent(rollout.id)}`;
    const target = verb === "promote_full" ? `${path}:promote?full=true` : `${path}:${verb}`;
    const revision = () => this.live.model(rollout.model)?.revision ?? "*";
    // What was read when the dialog opened: if it is no longer so, the server says it and asks again.
    let match = ANYWAY.includes(verb) ? "*" : revision();
    const key = makeKey();
    openDialog({
      title,
      body: [h("p", {}, text)],
      submit: name,
      isDanger: verb === "abort",
      send: async () => {
        try {
          await request("POST", target, { match, key });
        } catch (error) {
          if (error.status !== 412) throw error;
          match = revision();
          throw new Error(
            "The model has changed since this dialog opened. Look at it again, then confirm once more.",
          );
        }
        this.live.announce(`${name}: done`);
      },
    });
  }

  /** The form that starts a rollout. */
  start(name) {
    const model = this.live.model(name);
    const { fields, spec } = startForm(model);
    const key = keeper();
    const path = `/models/${encodeURIComponent(name)}/rollouts`;
    const result = h("p", { class: "muted", role: "status" });
    const check = async () => {
      await request("POST", path, { body: { ...spec(), dry_run: true }, key: makeKey() });
      result.textContent = "The server would take it. Nothing was started.";
    };
    openDialog({
      title: `Start a rollout of ${name}`,
      body: [...fields, result],
      submit: "Start",
      other: ["Check only", check],
      send: async () => {
        result.textContent = "";
        const body = spec();
        await request("POST", path, { body, key: key(JSON.stringify(body)) });
      },
    });
  }
}

/** An idempotency key that stays while what is sent does: a lost answer does not start two. */
function keeper() {
  let last = null;
  let key = null;
  return (text) => {
    if (text !== last) key = makeKey();
    last = text;
    return key;
  };
}

function words(rollout, verb) {
  const { spec, step } = rollout;
  const canary = `Version ${spec.canary}`;
  const now = basisPoints(spec.steps[step].weight_bp);
  const next = spec.steps[step + 1];
  const promoted = next
    ? `The step ends now, whatever it still waits for. ${canary} of ${rollout.model} gets `
      + `${basisPoints(next.weight_bp)} of the requests instead of ${now}.`
    : `This is the last step. ${canary} of ${rollout.model} gets all requests.`;
  return {
    pause: {
      title: "Pause the rollout?",
      name: "Pause",
      text: `${canary} keeps its ${now} of the requests until somebody resumes. `
        + "Judging goes on: a failed verdict still rolls back.",
    },
    resume: {
      title: "Resume the rollout?",
      name: "Resume",
      text: `Step ${step + 1} of ${spec.steps.length} goes on, and further steps follow by themselves.`,
    },
    promote: { title: "Promote to the next step?", name: "Promote", text: promoted },
    promote_full: {
      title: "Promote fully?",
      name: "Promote fully",
      text: `${canary} of ${rollout.model} gets all requests at once, whatever the verdicts say. `
        + "Steps that are left are skipped.",
    },
    abort: {
      title: "Abort the rollout?",
      name: "Abort",
      text: `All requests of ${rollout.model} go to version ${spec.stable} at once. `
        + `${canary} stays loaded for ${number(spec.abort_keep_warm_s)} s.`,
    },
    retry: {
      title: "Retry the rollout?",
      name: "Retry",
      text: "It begins again with its first step: "
        + `${basisPoints(spec.steps[0].weight_bp)} of the requests for version ${spec.canary}.`,
    },
  }[verb];
}

/**
 * A modal dialog with a form. `send` is called when it is submitted; what it throws is shown, and the dialog
 * stays. `other` is a name and a function of a second button that does not close it.
 */
function openDialog({ title, body, submit, isDanger = false, other, send }) {
  const opener = document.activeElement;
  const problem = h("p", { class: "problem", role: "alert", hidden: true });
  const confirm = h("button", {
    class: isDanger ? "danger" : "primary", type: "submit", autofocus: body.length === 1 && !isDanger,
  }, submit);
  const cancel = h("button", { type: "button", autofocus: isDanger, onclick: () => dialog.close() }, "Cancel");
  const second = other && h("button", {
    type: "button", onclick: () => form.reportValidity() && attempt(other[1], false),
  }, other[0]);
  const form = h("form", { class: "stack", onsubmit: (event) => {
    event.preventDefault();
    attempt(send, true);
  } }, h("h2", { id: "dialog-title" }, title), body, problem, h("div", { class: "actions" }, cancel, second, confirm));
  const dialog = h("dialog", { "aria-labelledby": "dialog-title", onclose: () => {
    dialog.remove();
    if (opener.isConnected && !opener.hidden) opener.focus();
    else document.querySelector("h1").focus();
  } }, form);
  const attempt = async (what, closes) => {
    if (form.ariaBusy === "true") return;
    form.ariaBusy = "true";
    problem.hidden = true;
    try {
      await what();
      if (closes) dialog.close();
    } catch (error) {
      problem.textContent = error.message;
      problem.hidden = false;
    } finally {
      form.ariaBusy = "false";
    }
  };
  document.body.append(dialog);
  dialog.showModal();
}

function field(label, input, hint) {
  return h("label", { class: "field" }, h("span", {}, label), input, hint && h("small", {}, hint));
}

function select(options, chosen) {
  return h("select", {}, options.map(([value, text]) => h("option", { value, selected: value === chosen }, text)));
}

/** The fields of a rollout, and a function that makes a specification of them. */
function startForm(model) {
  const main = model.route?.shares.at(-1).version ?? null;
  const numbers = model.versions.map((version) => version.number).sort((a, b) => b - a);
  const newest = numbers.find((number_) => number_ !== main);
  const named = (number_) => {
    const { state, labels } = model.versions.find((version) => version.number === number_);
    return [String(number_), `${number_} (${[state.toLowerCase(), ...labels].join(", ")})`];
  };
  const canary = select(numbers.map(named), String(newest));
  const answering = main === null ? "the one that answers now" : `${main} (answers now)`;
  const stable = select([["", answering], ...numbers.filter((n) => n !== main).map(named)], "");
  const preset = select(Object.entries(PRESETS).map(([value, [text]]) => [value, text]), "steady");
  const weights = h("input", { required: true, inputmode: "decimal", pattern: WEIGHTS });
  const seconds = h("input", { type: "number", min: 0, max: 2678400, required: true });
  const requests = h("input", { type: "number", min: 0, required: true });
  const waits = h("input", { type: "checkbox" });
  const sticky = select(STICKY, "");
  const stickyName = h("input", { pattern: "[A-Za-z0-9_.\\-]{1,64}" });
  const stickyField = field("Its name", stickyName);
  const mirror = h("input", { type: "number", min: 0, max: 100, step: "any", value: 0, required: true });
  const agree = select(COMPARE, "top1");
  const agreeField = field("Copies are", agree, "At least 99 % of those compared must agree.");
  const fill = () => [weights.value, seconds.value, requests.value] = PRESETS[preset.value].slice(1);
  const fold = () => {
    stickyField.hidden = !["header", "cookie"].includes(sticky.value);
    stickyName.required = !stickyField.hidden;
    agreeField.hidden = !(Number(mirror.value) > 0);
  };
  preset.addEventListener("change", fill);
  sticky.addEventListener("change", fold);
  mirror.addEventListener("input", fold);
  fill();
  fold();
  const spec = () => {
    const minima = {
      min_duration_s: Number(seconds.value), min_requests: Number(requests.value), pause: waits.checked,
    };
    const steps = weights.value.split(",").map((text) => ({ weight_bp: Math.round(Number(text) * 100), ...minima }));
    const made = { canary: Number(canary.value), steps };
    if (stable.value) made.stable = Number(stable.value);
    if (sticky.value) made.sticky = { key: sticky.value === "ip" ? "ip" : `${sticky.value}:${stickyName.value}` };
    if (Number(mirror.value) > 0) {
      steps.unshift({ weight_bp: 0, mirror_percent: Number(mirror.value), ...minima });
      if (agree.value) {
        const agreement = { name: "agreement", source: "agreement", compare: agree.value };
        made.metrics = [{ name: "errors", source: "errors" }, { name: "compute", source: "compute" }, agreement];
      }
    }
    return made;
  };
  const fields = [
    h("div", { class: "fields" }, field("New version (canary)", canary), field("Replaces", stable)),
    field("Steps", preset),
    field(
      "Canary's part of the requests, in percent",
      weights,
      "One number for each step, rising. After the last it gets everything.",
    ),
    h(
      "div",
      { class: "fields" },
      field("Seconds at least, each step", seconds),
      field("Requests at least, each step", requests),
    ),
    h("label", { class: "check" }, waits, "Wait for me after each step"),
    h("div", { class: "fields" }, field("Who stays on a version", sticky), stickyField),
    h("div", { class: "fields" }, field("First mirror, percent", mirror, "0: no step of copies."), agreeField),
    h("p", { class: "muted" }, "Judged by errors and compute time. For metrics, gates and header pins use the API."),
  ];
  return { fields, spec };
}
