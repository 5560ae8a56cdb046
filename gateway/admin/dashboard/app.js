/** The page: who is signed in, what is shown, and whether the connection holds. */

import { Actions } from "./actions.js";
import { request } from "./api.js";
import { h, icon, setText } from "./dom.js";
import { eventsView } from "./events.js";
import { Live } from "./live.js";
import { modelView, overview } from "./models.js";
import { rolloutsView, rolloutView } from "./rollouts.js";

const byId = (id) => document.getElementById(id);
const RETRY_MS = 2000;

let session = null;
let view = null;
let live = null;
let actions = null;

/** The view of an address such as `#/models/NAME`. */
function viewOf(hash) {
  const [kind, ...rest] = hash.replace(/^#\/?/, "").split("/").map(decodeURIComponent);
  const page = { live, actions };
  if (kind === "models" && rest[0]) return modelView(page, rest[0]);
  if (kind === "rollouts" && rest.length === 2) return rolloutView(page, rest[0], rest[1]);
  if (kind === "rollouts") return rolloutsView(page);
  if (kind === "events") return eventsView(page);
  return overview(page);
}

function show(isNavigation) {
  view?.close?.();
  view = viewOf(location.hash);
  document.title = `${view.title} · inference-gateway`;
  byId("main").replaceChildren(view.node);
  const kind = location.hash.split("/")[1] || "models";
  for (const link of document.querySelectorAll("nav a")) {
    if (link.hash === `#/${kind === "models" ? "" : kind}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  draw();
  // Whoever follows a link hears where it led; whoever opens the page is where they expect to be.
  if (isNavigation) view.node.querySelector("h1").focus();
}

function draw() {
  if (live.document) view?.update(live.document);
}

function showConnection() {
  let [word, drawing] = ["Connecting", "wait"];
  if (live.isConnected) [word, drawing] = ["Live", "check"];
  else if (live.document) [word, drawing] = ["Connection lost, trying again", "warn"];
  const node = byId("connection");
  if (node.textContent !== word) node.replaceChildren(icon(drawing), word);
  node.className = live.isConnected ? "good" : "warn";
  document.body.classList.toggle("stale", !live.isConnected && live.document !== null);
}

function announce(text) {
  byId("announcer").append(h("p", {}, text));
  while (byId("announcer").childElementCount > 5) byId("announcer").firstElementChild.remove();
}

function open() {
  live = new Live();
  actions = new Actions(live, () => session);
  live.addEventListener("change", draw);
  live.addEventListener("connection", showConnection);
  live.addEventListener("announce", (event) => announce(event.detail));
  live.addEventListener("denied", () => signIn("Your session has ended. Sign in again."));
  byId("bar").hidden = false;
  const key = session.actor === "loopback" ? "no key needed" : session.actor;
  setText(byId("actor"), `${key} (${session.role})`);
  byId("sign-out").hidden = session.actor === "loopback";
  showConnection();
  show(false);
  live.open();
}

function signIn(message = "") {
  live?.close();
  view?.close?.();
  live = view = null;
  document.querySelectorAll("dialog").forEach((dialog) => dialog.close());
  document.body.classList.remove("stale");
  byId("bar").hidden = true;
  document.title = "Sign in · inference-gateway";
  const key = h("input", { type: "password", name: "key", required: true, autocomplete: "current-password" });
  const hint = "It is exchanged for a session of 12 hours and not kept.";
  const problem = h("p", { class: "problem", role: "alert" }, message);
  const form = h("form", { class: "card stack sign-in", onsubmit: async (event) => {
    event.preventDefault();
    try {
      session = await request("POST", "/session", { body: { key: key.value.trim() } });
      open();
      view.node.querySelector("h1").focus();
    } catch (error) {
      problem.textContent = error.message;
      key.select();
    }
  } },
  h("h1", {}, "Sign in"),
  h("label", { class: "field" }, h("span", {}, "API key"), key, h("small", {}, hint)),
  problem,
  h("button", { class: "primary", type: "submit" }, "Sign in"));
  byId("main").replaceChildren(form);
  key.focus();
}

async function begin() {
  try {
    session = await request("GET", "/session");
  } catch (error) {
    byId("main").replaceChildren(h("p", { role: "alert" }, error.message));
    setTimeout(begin, RETRY_MS);
    return;
  }
  if (session.needs_key) signIn();
  else open();
}

byId("skip").addEventListener("click", (event) => {
  // The part of the address behind # says which view is shown.
  event.preventDefault();
  byId("main").focus();
});
byId("sign-out").addEventListener("click", async () => {
  await request("DELETE", "/session").catch(() => {});
  signIn();
});
addEventListener("hashchange", () => live && show(true));
begin();
