// Calls of the reward server, and what it answers when it cannot.

const PREFIX = "gram/v1/";
const STORED_KEY = "api-key";
const PATIENCE = 120; // seconds that a question waits, in all, for the server to have room

/**
 * An answer that is no result.
 *
 * status: of HTTP, 0 where there was no answer. field: what the server names, as in
 * "responses[1]"; "" where it names nothing. wait: seconds after which it may work, 0 where the
 * server does not say.
 */
export class ApiError extends Error {
  constructor(message, { status = 0, field = "", wait = 0 } = {}) {
    super(message);
    this.status = status;
    this.field = field;
    this.wait = wait;
  }

  get isBusy() {
    return (this.status === 429 || this.status === 503) && this.wait > 0;
  }

  get needsKey() {
    return this.status === 401 || this.status === 403;
  }
}

let key = sessionStorage.getItem(STORED_KEY) ?? "";

/** The key to send from now on; forgotten with the tab. */
export function useKey(given) {
  key = given.trim();
  sessionStorage.setItem(STORED_KEY, key);
}

/** Headers hold bytes, each written as a character; the server reads UTF-8. */
function asBytes(text) {
  return String.fromCharCode(...new TextEncoder().encode(text));
}

let heard = () => {};

/** `told(seconds)` is called when a question waits so long to be asked again; with 0 when it is. */
export function whenBusy(told) {
  heard = told;
}

function pause(seconds, signal) {
  return new Promise((done, failed) => {
    const timer = setTimeout(done, 1000 * seconds);
    const stop = () => {
      clearTimeout(timer);
      failed(signal.reason);
    };
    signal.addEventListener("abort", stop, { once: true });
  });
}

/** Asks, and asks again where the server has no room and says when it will. */
async function call(route, body, signal) {
  for (let waited = 0; ;) {
    try {
      return await once(route, body, signal);
    } catch (error) {
      if (!(error instanceof ApiError && error.isBusy && signal)) throw error;
      signal.throwIfAborted();
      waited += error.wait;
      if (waited > PATIENCE) throw error;
      heard(error.wait);
      await pause(error.wait, signal);
      heard(0);
    }
  }
}

async function once(route, body, signal) {
  const headers = { Accept: "application/json" };
  if (key) headers.Authorization = `Bearer ${asBytes(key)}`;
  if (body) headers["Content-Type"] = "application/json";
  let answer;
  let text;
  try {
    answer = await fetch(PREFIX + route, {
      method: body ? "POST" : "GET", body: body && JSON.stringify(body), headers, signal,
    });
    text = await answer.text();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server does not answer. Is it running?");
  }
  return read(answer, text);
}

function read(answer, text) {
  let content = null;
  try {
    content = JSON.parse(text);
  } catch (error) {
    if (!(error instanceof SyntaxError)) throw error;
  }
  if (answer.ok && content !== null) return content;
  const described = content?.error ?? {};
  let message = described.message ?? `The server answers ${answer.status} ${answer.statusText}`;
  const wait = Number(answer.headers.get("Retry-After")) || 0; // a proxy may send a date
  if (wait) message = `${message.replace("; try again later", "")}. Try again in ${wait} s.`;
  throw new ApiError(message, { status: answer.status, field: described.field ?? "", wait });
}

export const model = (signal) => call("model", null, signal);
export const score = (body, signal) => call("score", body, signal);
export const rank = (body, signal) => call("rank", body, signal);
export const compare = (body, signal) => call("compare", body, signal);
