// Calls of the reward server, and what it answers when it cannot.

const PREFIX = "gram/v1/";
const STORED_KEY = "api-key";

/**
 * An answer that is no result.
 *
 * status: of HTTP, 0 where there was no answer. field: what the server names, as in
 * "responses[1]"; "" where it names nothing.
 */
export class ApiError extends Error {
  constructor(message, { status = 0, field = "" } = {}) {
    super(message);
    this.status = status;
    this.field = field;
  }

  get needsKey() {
    return this.status === 401 || this.status === 403;
  }
}

let key = sessionStorage.getItem(STORED_KEY) ?? "";

/** The key to send from now on; forgotten with the tab. */
export function useKey(given) {
  key = given;
  sessionStorage.setItem(STORED_KEY, given);
}

async function call(route, body, signal) {
  const headers = { Accept: "application/json" };
  if (key) headers.Authorization = `Bearer ${key}`;
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
  let message = described.message ?? `The server answers ${answer.status} ${answer.statusText}.`;
  const wait = answer.headers.get("Retry-After");
  if (wait) message += ` Try again in ${wait} s.`;
  throw new ApiError(message, { status: answer.status, field: described.field ?? "" });
}

export const model = (signal) => call("model", null, signal);
export const score = (body, signal) => call("score", body, signal);
export const rank = (body, signal) => call("rank", body, signal);
export const compare = (body, signal) => call("compare", body, signal);
