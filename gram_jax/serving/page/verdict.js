// Which of two responses is better, how sure that is, and both orders of a judge.

import { element } from "./element.js";
import { MINUS, letter, number, probability, signed } from "./numbers.js";

/** A bar from 0 to 1, filled up to p, with a line at 0.5. */
function bar(p) {
  const fill = element("span", { class: "fill" });
  fill.style.width = `${100 * p}%`;
  return element("span", { class: "bar", "aria-hidden": "true" }, fill);
}

/** One line for people and for screen readers. */
export function sentence(p, [a, b]) {
  const [nameA, nameB] = [letter(a), letter(b)];
  const sure = Math.max(p, 1 - p);
  if (probability(sure) === "0.500") return `No preference between ${nameA} and ${nameB}`;
  const [better, worse] = p > 0.5 ? [nameA, nameB] : [nameB, nameA];
  const written = probability(sure).replace(">", "above");
  return `${better} is better than ${worse} with probability ${written}`;
}

/** The headline: who is better, and p on a bar between the two names. */
export function headline(comparison, pair) {
  const [nameA, nameB] = pair.map(letter);
  const p = comparison.p_a_better;
  return element(
    "div",
    { class: "verdict" },
    element("h2", {}, sentence(p, pair)),
    element(
      "div",
      { class: "odds" },
      element("span", {}, `${nameA} `, number(p, probability)),
      bar(p),
      element("span", {}, `${nameB} `, number(1 - p, probability)),
    ),
  );
}

function orderRow(name, difference, p) {
  return element(
    "tr",
    {},
    element("th", { scope: "row" }, name),
    element("td", { class: "number" }, difference === null ? "" : number(difference, signed)),
    element("td", { class: "number" }, number(p, probability)),
    element("td", { class: "wide" }, bar(p)),
  );
}

function agreement(forward, backward, [nameA, nameB]) {
  if ((forward - 0.5) * (backward - 0.5) > 0) {
    return `Both orders prefer ${forward > 0.5 ? nameA : nameB}.`;
  }
  if ((forward - 0.5) * (backward - 0.5) === 0) return "One order has no preference.";
  const place = forward > 0.5 ? "first" : "second";
  return (
    `The orders disagree: each prefers the response shown ${place}, so place counts more than` +
    " content here."
  );
}

/** A judge's two readings of a pair, and whether they agree. */
export function bothOrders(comparison, pair) {
  const names = pair.map(letter);
  const [nameA, nameB] = names;
  const { forward, backward, p_forward: first, p_backward: second } = comparison;
  const heads = ["Order", `z of the first ${MINUS} z of the second`, `p(${nameA} better)`];
  const table = element(
    "table",
    { class: "orders" },
    element("thead", {}, element("tr", {}, ...heads.map((head, i) =>
      element("th", { scope: "col", class: i ? "number" : null }, head)), element("td"))),
    element(
      "tbody",
      {},
      orderRow(`${nameA} first`, forward, first),
      orderRow(`${nameB} first`, backward, second),
      orderRow("mean of both", null, comparison.p_a_better),
    ),
  );
  return element(
    "section",
    {},
    element("h3", {}, "Both orders"),
    element("p", {}, agreement(first, second, names)),
    element("div", { class: "scroll" }, table),
    element("p", { class: "quiet" },
      "A judge reads both responses in one prompt and answers with one label, so it has no",
      " log-prob of each token; what it has is a preference in each order."),
  );
}
