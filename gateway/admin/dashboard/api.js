/** The admin API: requests, and streams that come back when they are lost. */

export const ROOT = "/admin/v1";

/** A stream says something once a second; silence for so long means that it is lost. */
const SILENCE_MS = 6000;
const SHORTEST_RETRY_MS = 500;
const LONGEST_RETRY_MS = 8000;

/** An answer that is no success; `status` is 0 where there was none. */
export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** A key for `Idempotency-Key`. `crypto.randomUUID` is not there on plain HTTP of another host. */
export function makeKey() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (n) => n.toString(16).padStart(2, "0")).join("");
}

/**
 * Ask the API. Gives the answer's document; throws ApiError, with the server's own words where it has any.
 * `match` is the revision for `If-Match`, `key` an idempotency key.
 */
export async function request(method, path, { body, match, key } = {}) {
  const headers = { Accept: "application/json", "X-Requested-With": "gateway" };
  if (body !== undefined) headers["Content-Type"] = "application/json";
  if (match !== undefined) headers["If-Match"] = match === "*" ? "*" : `"${match}"`;
  if (key !== undefined) headers["Idempotency-Key"] = key;
  let answer;
  try {
    answer = await fetch(ROOT + path, { method, headers, body: body === undefined ? undefined : JSON.stringify(body) });
  } catch {
    throw new ApiError(0, "The server does not answer. Try again when the connection is back.");
  }
  const text = await answer.text();
  let document = null;
  try {
    document = text ? JSON.parse(text) : null;
  } catch {
    if (answer.ok) throw new ApiError(answer.status, "The answer is no JSON.");
  }
  if (!answer.ok) throw new ApiError(answer.status, document?.error ?? `The server answered ${answer.status}.`);
  return document;
}

/**
 * Server-sent events. `path()` is asked at each attempt; `onState` is told true and false as the stream comes
 * and goes. Only an error says of a stream that `isQuiet` that it is lost, of others silence does as well.
 */
export class Stream {
  constructor(path, onMessage, onState, isQuiet = false) {
    Object.assign(this, { path, onMessage, onState, isQuiet, attempts: 0 });
    this.open();
  }

  open() {
    const source = new EventSource(ROOT + this.path());
    this.source = source;
    this.watch();
    source.onopen = () => {
      this.attempts = 0;
      this.onState(true);
    };
    source.onmessage = (event) => {
      this.watch();
      this.onMessage(JSON.parse(event.data), event.lastEventId);
    };
    source.onerror = () => this.lost();
  }

  watch() {
    clearTimeout(this.silence);
    if (!this.isQuiet) this.silence = setTimeout(() => this.lost(), SILENCE_MS);
  }

  lost() {
    this.close();
    this.onState(false);
    const wait = Math.min(LONGEST_RETRY_MS, SHORTEST_RETRY_MS * 2 ** this.attempts);
    this.attempts += 1;
    this.retry = setTimeout(() => this.open(), wait);
  }

  close() {
    clearTimeout(this.silence);
    clearTimeout(this.retry);
    this.source.close();
  }
}
