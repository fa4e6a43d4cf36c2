// A comparison as a link. It stands behind the #, which browsers do not send to any server.
//
// JSON, deflated, in URL-safe base64. Version 1:
//   {v, prompt, as, responses, pair, model}

const KEY = "c=";
const VERSION = 1;
const AS = ["text", "chat", "messages"];

async function through(bytes, transform) {
  const stream = new Blob([bytes]).stream().pipeThrough(transform);
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

function toBase64(bytes) {
  let text = "";
  for (let i = 0; i < bytes.length; i += 0x8000) {
    text += String.fromCharCode(...bytes.subarray(i, i + 0x8000));
  }
  return btoa(text).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
}

function fromBase64(text) {
  const plain = atob(text.replaceAll("-", "+").replaceAll("_", "/"));
  return Uint8Array.from(plain, (character) => character.charCodeAt(0));
}

/** What goes behind the # for a state {prompt, as, responses, pair, model}. */
export async function toFragment(state) {
  const bytes = new TextEncoder().encode(JSON.stringify({ v: VERSION, ...state }));
  return KEY + toBase64(await through(bytes, new CompressionStream("deflate-raw")));
}

function isState(state) {
  const { v, prompt, as, responses, pair } = state ?? {};
  const texts = Array.isArray(responses) && responses.every((text) => typeof text === "string");
  const places =
    Array.isArray(pair) &&
    pair.length === 2 &&
    pair.every((place) => Number.isInteger(place) && place >= 0 && place < responses.length);
  return (
    v === VERSION && typeof prompt === "string" && AS.includes(as) && texts &&
    responses.length >= 2 && (pair === null || places)
  );
}

/**
 * The state of a fragment; null where it holds none.
 *
 * @throws Error where it is damaged or of another version.
 */
export async function fromFragment(fragment) {
  const text = fragment.replace(/^#/, "");
  if (!text.startsWith(KEY)) return null;
  let state;
  try {
    const bytes = await through(
      fromBase64(text.slice(KEY.length)), new DecompressionStream("deflate-raw"),
    );
    state = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(bytes));
  } catch (error) {
    throw new Error("This link is damaged: it may have been cut off. Copy it again.", {
      cause: error,
    });
  }
  if (!isState(state)) throw new Error("This link was made by another version of this page.");
  return state;
}
