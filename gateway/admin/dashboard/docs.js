/** The page to try the API: what its OpenAPI document lists, with a form for each operation. */

import { h } from "./dom.js";

const DOCUMENT = "/admin/v1/openapi.json";

/** Of a stream, as much is shown. */
const LONGEST_TEXT = 100_000;

const OCTETS = "application/octet-stream";

const HINTS = {
  "If-Match": "The revision that you decided on, such as \"7\", or * for any.",
  "Idempotency-Key": "Any text of your own: what is sent twice under it is done once.",
  "x-content-sha256": "SHA-256 of the file in hex; checked where it is given.",
};

/** What a schema refers to, looked up. */
function resolved(schema, root) {
  if (!schema?.$ref) return schema ?? {};
  const names = schema.$ref.slice(2).split("/").map((name) => name.replaceAll("~1", "/").replaceAll("~0", "~"));
  return resolved(names.reduce((at, name) => at[name], root), root);
}

/** A value of a schema's form to begin with: what is required, and nothing else. */
function example(schema, root) {
  const found = resolved(schema, root);
  if (found.default !== undefined) return found.default;
  if (found.const !== undefined) return found.const;
  if (found.enum) return found.enum[0];
  const choice = (found.anyOf ?? found.oneOf)?.[0];
  if (choice) return example(choice, root);
  switch (found.type) {
    case "object":
      return Object.fromEntries((found.required ?? []).map((name) => [name, example(found.properties?.[name], root)]));
    case "array":
      return found.minItems ? [example(found.items ?? found.prefixItems?.[0], root)] : [];
    case "integer":
    case "number":
      return found.minimum ?? 0;
    case "boolean":
      return false;
    case "string":
      return "";
    default:
      return null;
  }
}

/** The fields of a body in words, those of its parts as well. */
function fieldsOf(schema, root, depth = 0) {
  const found = resolved(schema, root);
  const part = found.type === "array" ? resolved(found.items, root) : found;
  const entries = Object.entries(part.properties ?? {});
  if (!entries.length || depth > 3) return null;
  return h("dl", { class: "facts" }, entries.map(([name, field]) => {
    const inner = (field.anyOf ?? [field]).map((each) => fieldsOf(each, root, depth + 1)).find((each) => each);
    const needed = part.required?.includes(name) ? " (needed)" : "";
    const words = field.description ?? resolved(field, root).description ?? "";
    return h("div", {}, h("dt", {}, name + needed), h("dd", {}, words, inner));
  }));
}

function parameterField(parameter, root) {
  const schema = resolved(parameter.schema, root);
  const choices = schema.type === "boolean" ? ["true", "false"] : schema.enum;
  const value = parameter.name === "If-Match" && parameter.required ? "*" : null;
  const input = choices
    ? h("select", { required: parameter.required }, ["", ...choices].map((each) => h("option", { value: each }, each)))
    : h("input", { required: parameter.required, value, autocomplete: "off" });
  const hint = HINTS[parameter.name] ?? parameter.description ?? schema.description;
  const place = parameter.in === "header" ? " (header)" : "";
  const title = h("span", {}, parameter.name + place);
  return { parameter, input, node: h("label", { class: "field" }, title, input, hint && h("small", {}, hint)) };
}

function bodyFields(requestBody, root) {
  const content = resolved(requestBody, root).content ?? {};
  const json = content["application/json"];
  const text = json && h("textarea", { spellcheck: "false" });
  if (json) text.value = JSON.stringify(example(json.schema, root), null, 2);
  const file = content[OCTETS] && h("input", { type: "file" });
  return {
    nodes: [
      json && h("label", { class: "field" }, h("span", {}, "Body"), text),
      json && h("details", {}, h("summary", {}, "What the fields mean"), fieldsOf(json.schema, root)),
      file && h("label", { class: "field" }, h("span", {}, "Or a file as the body"), file),
    ],
    read() {
      if (file?.files.length) return [OCTETS, file.files[0]];
      return text?.value.trim() ? ["application/json", text.value] : [null, undefined];
    },
  };
}

/** An operation of a path, folded; its form is made when it is opened. */
function operationPart(method, path, operation, root) {
  const node = h(
    "details",
    { class: "operation" },
    h(
      "summary",
      {},
      h("span", { class: `method ${method}` }, method),
      h("code", {}, path),
      operation["x-role"] && h("small", {}, operation["x-role"]),
      h("span", { class: "about" }, operation.summary),
    ),
  );
  node.addEventListener("toggle", () => node.append(form(method, path, operation, root)), { once: true });
  return node;
}

function form(method, path, operation, root) {
  const parameters = (operation.parameters ?? []).map((each) => parameterField(resolved(each, root), root));
  const body = bodyFields(operation.requestBody, root);
  const status = h("p", { role: "status" });
  const answer = h("pre", { hidden: true, tabindex: 0, "aria-label": "Answer" });
  const stop = h("button", { type: "button", hidden: true }, "Stop");
  const send = async (event) => {
    event.preventDefault();
    const aborter = new AbortController();
    stop.onclick = () => aborter.abort();
    stop.hidden = false;
    answer.hidden = true;
    status.textContent = "Sending…";
    try {
      const found = await fetch(...requestOf(method, path, parameters, body, aborter.signal));
      const tag = found.headers.get("ETag");
      status.textContent = `${found.status} ${found.statusText}${tag ? `, ETag ${tag}` : ""}`;
      await show(found, answer);
    } catch (error) {
      if (!aborter.signal.aborted) status.textContent = `No answer: ${error.message}`;
    } finally {
      stop.hidden = true;
    }
  };
  return h(
    "form",
    { class: "stack", onsubmit: send },
    parameters.length > 0 && h("div", { class: "fields" }, parameters.map(({ node }) => node)),
    body.nodes,
    h("div", { class: "actions" }, h("button", { class: "primary", type: "submit" }, "Send"), stop),
    status,
    answer,
  );
}

function requestOf(method, path, parameters, body, signal) {
  const headers = { "X-Requested-With": "gateway" };
  const query = new URLSearchParams();
  let target = path;
  for (const { parameter, input } of parameters) {
    if (parameter.in === "path") target = target.replace(`{${parameter.name}}`, encodeURIComponent(input.value));
    else if (input.value === "") continue;
    else if (parameter.in === "query") query.set(parameter.name, input.value);
    else headers[parameter.name] = input.value;
  }
  const [type, content] = body.read();
  if (type) headers["Content-Type"] = type;
  return [query.size ? `${target}?${query}` : target, { method, headers, body: content, signal }];
}

/** Write an answer as it comes: a stream has no end. */
async function show(found, answer) {
  answer.textContent = "";
  answer.hidden = false;
  const reader = found.body?.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  while (reader && text.length < LONGEST_TEXT) {
    const { value, done } = await reader.read();
    if (done) break;
    text += value;
    answer.textContent = text;
  }
  await reader?.cancel();
  if (found.headers.get("Content-Type")?.startsWith("application/json")) answer.textContent = pretty(text);
  answer.hidden = !text;
}

function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}

async function begin() {
  const main = document.getElementById("main");
  try {
    const root = await (await fetch(DOCUMENT)).json();
    const groups = new Map();
    for (const [path, methods] of Object.entries(root.paths)) {
      for (const [method, operation] of Object.entries(methods)) {
        const tag = operation.tags?.[0] ?? "other";
        groups.set(tag, [...(groups.get(tag) ?? []), operationPart(method.toUpperCase(), path, operation, root)]);
      }
    }
    main.append(
      h(
        "p",
        { class: "muted" },
        "Requests are sent from this page, with your session. The description is ",
        h("a", { href: DOCUMENT }, "openapi.json"),
        ".",
      ),
      ...[...groups].map(([tag, parts]) => h("section", {}, h("h2", {}, tag[0].toUpperCase() + tag.slice(1)), parts)),
    );
  } catch (error) {
    const text = `The description of the API could not be read: ${error.message}`;
    main.append(h("p", { class: "problem", role: "alert" }, text));
  }
}

begin();
