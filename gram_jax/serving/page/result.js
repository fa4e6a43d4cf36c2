// The result of a comparison: verdict, ranking, orders of a judge, tokens and where they differ.

import { differences, largest } from "./align.js";
import { element } from "./element.js";
import { MINUS, letter, number, signed } from "./numbers.js";
import { rankingTable } from "./ranking.js";
import { legend, tokenLists, visible } from "./tokens.js";
import { bothOrders, headline } from "./verdict.js";

/** What is known of one response: [name, number] of each. */
function facts({ scores, comparison, pair }, side, { reading, average }) {
  const count = comparison.num_tokens[side];
  const tokens = ["tokens", number(count, String)];
  if (reading === "judge") return [tokens];
  const reward = number(scores.rewards[pair[side]]);
  if (reading === "head") return [["reward", reward], tokens];
  const logprob = scores.logprobs[pair[side]];
  if (average === "mean") {
    return [["reward = log-prob per token", reward], ["log-prob", number(logprob)], tokens];
  }
  return [["reward = log-prob", reward], ["per token", number(logprob / count)], tokens];
}

function factList(rows) {
  return element("dl", { class: "facts" }, ...rows.map(([term, value]) =>
    element("div", {}, element("dt", {}, term), element("dd", {}, value))));
}

function column(result, side, model, body) {
  const name = letter(result.pair[side]);
  return element("article", { class: "response", "aria-label": `Response ${name}` },
    element("h3", {}, `Response ${name}`), factList(facts(result, side, model)), body);
}

/** Tokens of both sides with what each adds to the difference, and the marked parts. */
function annotate(tokens, average) {
  const { parts, whole } = differences(tokens[0], tokens[1], average);
  const sides = tokens.map((all) => all.map((token) => ({ ...token, mark: null, partner: null })));
  const marked = largest(parts);
  for (const part of parts) {
    const mark = marked.indexOf(part) + 1 || null;
    const places = [part.a, part.b];
    places.forEach((place, side) => {
      if (place === null) return;
      const token = sides[side][place];
      const other = places[1 - side];
      token.part = part.value;
      token.mark = mark;
      if (other !== null) {
        token.partner = { place: other, logprob: sides[1 - side][other].logprob };
      }
    });
  }
  return { sides, marked, whole };
}

function differenceRow(part, place, sides, names, lists) {
  const cells = [part.a, part.b].map((at, side) => {
    if (at === null) return element("td", {}, "–");
    const { text, logprob } = sides[side][at];
    const shown = element("code", {}, visible(text));
    return element("td", { class: "text" }, shown, number(logprob));
  });
  const side = part.a === null ? 1 : 0;
  const button = element("button", { type: "button", class: "plain",
    "aria-label": `Go to difference ${place + 1}` }, String(place + 1));
  button.addEventListener("click", () => {
    const token = lists[side].children[part.a ?? part.b];
    token.scrollIntoView({ block: "nearest" });
    token.focus();
  });
  return element("tr", {}, element("td", {}, button), ...cells,
    element("td", { class: "number" }, number(part.value, signed)),
    element("td", {}, names[part.value > 0 ? 0 : 1]));
}

function differenceTable({ sides, marked, whole }, result, lists) {
  const names = result.pair.map(letter);
  const [first, second] = result.pair.map((at) => result.scores.rewards[at]);
  const part = `part of ${names[0]} ${MINUS} ${names[1]}`;
  const heads = [null, [names[0]], [names[1]], [part, "number"], ["favours"]];
  const table = element(
    "table",
    { class: "differences" },
    element("thead", {}, element("tr", {}, ...heads.map((head) =>
      head ? element("th", { scope: "col", class: head[1] }, head[0]) : element("td")))),
    element("tbody", {}, ...marked.map((part, i) =>
      differenceRow(part, i, sides, names, lists))),
  );
  return element(
    "section",
    {},
    element("h3", {}, "Where they differ most"),
    element("p", {}, `Reward ${names[0]} ${MINUS} reward ${names[1]} is `,
      number(first - second, signed), ", the sum of what each token adds. A token that stands in both, in the same order, adds the",
      " difference of its two log-probs; one that stands alone adds its own. The largest parts:"),
    whole ? null : element("p", { class: "notice" },
      "These are too long to be aligned in the middle; there, every token counts as standing",
      " alone."),
    element("div", { class: "scroll" }, table),
  );
}

function likelihoodParts(result, model) {
  const tokens = result.pair.map((place) => result.scores.tokens[place]);
  const annotated = annotate(tokens, model.average);
  const lists = tokenLists(annotated.sides, result.pair);
  const columns = lists.map((list, side) => column(result, side, model, list));
  return [
    element("section", { "aria-label": "Tokens" }, legend(),
      element("div", { class: "columns" }, ...columns)),
    annotated.marked.length ? differenceTable(annotated, result, lists)
      : element("p", {}, "No token differs."),
  ];
}

function plainParts(result, question, model) {
  const columns = result.pair.map((place, side) => {
    const text = element("div", { class: "tokens", tabindex: "0", role: "region",
      "aria-label": `Text of response ${letter(place)}` }, question.responses[place]);
    return column(result, side, model, text);
  });
  return element("div", { class: "columns" }, ...columns);
}

/**
 * The elements of a result, as `ask` (comparison.js) returns it.
 *
 * @param choose is called with the places of two other responses to compare.
 */
export function resultParts(result, question, model, choose) {
  const { comparison, ranking, pair, cut } = result;
  const parts = [headline(comparison, pair)];
  if (cut) {
    parts.push(element("p", { class: "notice" },
      `Something was cut to fit max_length=${model.max_length}:`,
      " not all that stands in the fields was scored."));
  }
  if (ranking) parts.push(rankingTable(ranking, question, model.reading, pair, choose));
  if (model.reading === "judge") parts.push(bothOrders(comparison, pair));
  if (model.reading === "likelihood") return [...parts, ...likelihoodParts(result, model)];
  if (model.reading === "head") {
    parts.push(element("p", { class: "quiet" },
      "A head gives a response one number, read at its last token, and none to each token."));
  }
  return [...parts, plainParts(result, question, model)];
}
