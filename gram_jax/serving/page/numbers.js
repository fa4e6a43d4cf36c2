// Numbers for people: as many digits as mean something, a real minus sign, the exact value kept.

import { element } from "./element.js";

export const MINUS = "\u2212";
const NOTHING = "\u2013";

function fixed(value, digits, signed = false) {
  const text = Math.abs(value).toFixed(digits);
  const isZero = Number(text) === 0;
  const sign = isZero ? "" : value < 0 ? MINUS : signed ? "+" : "";
  return sign + text;
}

/** A reward or a log-prob: three digits after the point below 10, two below 1000, else one. */
export function score(value, { signed = false } = {}) {
  if (value === null || value === undefined) return NOTHING;
  const size = Math.abs(value);
  return fixed(value, size < 10 ? 3 : size < 1000 ? 2 : 1, signed);
}

/** A score with its sign, for differences. */
export const signed = (value) => score(value, { signed: true });

/** A probability, to three digits; one that would be written as 0 or 1 says on which side. */
export function probability(value) {
  if (value === null || value === undefined) return NOTHING;
  if (value < 0.0005) return "< 0.001";
  if (value > 0.9995) return "> 0.999";
  return value.toFixed(3);
}

/** A <data> element: what is shown, with the exact number as its value. */
export function number(value, show = score) {
  const known = value !== null && value !== undefined;
  return element("data", { value: known ? String(value) : "" }, show(value));
}

/** The name of the n-th response: A to Z, then AA and on. */
export function letter(n) {
  const last = String.fromCharCode(65 + (n % 26));
  return n < 26 ? last : letter(Math.floor(n / 26) - 1) + last;
}
