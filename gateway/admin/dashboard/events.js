/** The log of events: of everything, of a model or of a rollout. */

import { h, keyed, moment, number } from "./dom.js";

const SHOWN_EVENTS = 100;

/** Those events that `isShown`, newest first. Older ones, which the stream did not tell, come by `add`. */
export function eventList(live, isShown, names = true) {
  const list = h("ol", { class: "events" });
  const empty = h("p", { class: "muted" }, "Nothing yet.");
  let older = [];
  const update = () => {
    const known = new Map([...older, ...live.events].filter(isShown).map((event) => [event.id, event]));
    const shown = [...known.values()].sort((a, b) => b.id - a.id).slice(0, SHOWN_EVENTS);
    keyed(list, shown, (event) => event.id, (event) => ({ node: entry(event, names) }));
    empty.hidden = shown.length > 0;
  };
  live.addEventListener("log", update);
  return {
    node: h("div", {}, empty, list),
    update,
    add(events) {
      older = events;
      update();
    },
    close: () => live.removeEventListener("log", update),
  };
}

/** The page of all events. */
export function eventsView({ live }) {
  const log = eventList(live, () => true);
  return {
    title: "Events",
    node: h("div", { class: "stack" }, h("h1", { tabindex: -1 }, "Events"), log.node),
    update: log.update,
    close: log.close,
  };
}

function entry(event, names) {
  const address = `#/models/${encodeURIComponent(event.model)}`;
  const subject = names && event.model ? h("a", { href: address }, event.model) : null;
  const isNamed = event.actor === "gateway" || event.text.includes(`by ${event.actor}`);
  const numbers = Object.entries(event.numbers ?? {});
  return h(
    "li",
    {},
    h("span", { class: "when" }, moment(event.at_s)),
    h("span", { class: "kind" }, event.kind),
    h(
      "div",
      { class: "what" },
      h("p", {}, subject, subject && " ", event.text, !isNamed && h("span", { class: "muted" }, ` by ${event.actor}`)),
      numbers.length > 0 && h("details", {}, h("summary", {}, "Numbers"), tree(event.numbers)),
    ),
  );
}

/** Plain values of any depth, as lists of names and values. */
function tree(value) {
  if (typeof value === "number") return h("span", {}, number(value));
  if (value === null || typeof value !== "object") return h("span", {}, String(value));
  const parts = Object.entries(value).map(([name, part]) => (
    h("div", {}, h("dt", {}, name.replaceAll("_", " ")), h("dd", {}, tree(part)))
  ));
  return h("dl", { class: "facts" }, parts);
}
