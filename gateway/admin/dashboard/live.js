/** What the server says now: the newest document of its live stream, two minutes of history, and events. */

import { ApiError, Stream, request } from "./api.js";
import { HISTORY_S } from "./charts.js";

/** Events that the page keeps; older ones are there for the asking. */
export const KEPT_EVENTS = 300;

const FIELDS = { requests: "requests_per_s", p99: "p99_ms" };

/**
 * Tells, as events of its own: `change` (a new document), `log` (a new event of the server), `connection`,
 * `announce` (words for those who do not see the page change), `denied` (the session has ended).
 */
export class Live extends EventTarget {
  document = null;
  isConnected = false;
  events = [];
  history = new Map();
  ended = new Map();
  lastEvent = 0;

  open() {
    this.streams = [
      new Stream(() => "/live", (document) => this.take(document), (isThere) => this.connection(isThere)),
      new Stream(
        () => `/events?stream=true&${this.lastEvent ? `after=${this.lastEvent}` : `last=${KEPT_EVENTS}`}`,
        (event) => this.log(event),
        () => {},
        true,
      ),
    ];
  }

  close() {
    this.streams?.forEach((stream) => stream.close());
    this.streams = null;
  }

  model(name) {
    return this.document?.models.find((model) => model.name === name);
  }

  sample(model, number) {
    return this.document?.samples.find((sample) => sample.model === model && sample.number === number);
  }

  past(model, number) {
    return this.history.get(`${model} ${number}`) ?? { requests: [], p99: [] };
  }

  /** A rollout: as it runs, or as it was when it was last read. */
  rollout(id) {
    return this.document?.rollouts.find((rollout) => rollout.id === id) ?? this.ended.get(id);
  }

  /** Read a rollout that does not run any more. */
  async read(model, id) {
    const rollout = await request("GET", `/models/${encodeURIComponent(model)}/rollouts/${encodeURIComponent(id)}`);
    this.ended.set(id, rollout);
    this.tell("change");
    return rollout;
  }

  take(document) {
    const before = this.document;
    this.document = document;
    for (const sample of document.samples) this.remember(sample);
    if (before) this.compare(before, document);
    this.tell("change");
  }

  remember(sample) {
    const past = this.past(sample.model, sample.number);
    for (const [name, field] of Object.entries(FIELDS)) {
      past[name] = [...past[name], sample[field] ?? null].slice(-HISTORY_S);
    }
    this.history.set(`${sample.model} ${sample.number}`, past);
  }

  /** Say what changed, and read the last of a rollout that ended. */
  compare(before, after) {
    const states = new Map(before.models.flatMap((m) => m.versions.map((v) => [`${m.name} ${v.number}`, v.state])));
    for (const model of after.models) {
      for (const version of model.versions) {
        const old = states.get(`${model.name} ${version.number}`);
        const now = version.state.toLowerCase();
        if (old !== version.state) this.announce(`${model.name} version ${version.number} is ${now}`);
      }
    }
    for (const old of before.rollouts) {
      const now = after.rollouts.find((rollout) => rollout.id === old.id);
      if (!now) {
        this.ended.set(old.id, old);
        this.read(old.model, old.id)
          .then((rollout) => this.announceRollout(rollout))
          .catch((error) => this.failed(error));
      } else if (now.state !== old.state || now.step !== old.step) this.announceRollout(now);
    }
    for (const now of after.rollouts) if (!before.rollouts.some((old) => old.id === now.id)) this.announceRollout(now);
  }

  announceRollout(rollout) {
    const step = rollout.state === "STEPPING" ? `, step ${rollout.step + 1} of ${rollout.spec.steps.length}` : "";
    this.announce(`Rollout of ${rollout.model} version ${rollout.spec.canary}: ${rollout.state.toLowerCase()}${step}`);
  }

  log(event) {
    if (event.id <= this.lastEvent) return;
    this.lastEvent = event.id;
    this.events = [event, ...this.events].slice(0, KEPT_EVENTS);
    clearTimeout(this.told);
    // A stream that begins tells hundreds at once; the page is drawn once.
    this.told = setTimeout(() => this.tell("log"), 50);
  }

  connection(isThere) {
    if (isThere !== this.isConnected) {
      this.announce(isThere ? "Connected" : "Connection lost");
      if (!isThere) this.history.forEach((past) => Object.values(past).forEach((values) => values.push(null)));
    }
    this.isConnected = isThere;
    this.tell("connection");
    if (isThere) return;
    // An event stream does not say why it was refused.
    request("GET", "/session")
      .then(({ needs_key }) => needs_key && this.tell("denied"))
      .catch((error) => this.failed(error));
  }

  failed(error) {
    if (!(error instanceof ApiError)) throw error;
    if (error.status === 401) this.tell("denied");
  }

  announce(text) {
    this.dispatchEvent(new CustomEvent("announce", { detail: text }));
  }

  tell(name) {
    this.dispatchEvent(new Event(name));
  }
}
