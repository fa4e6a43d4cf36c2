// More than two responses: all of them in order, and which two of them are compared.

import { element } from "./element.js";
import { letter, number } from "./numbers.js";

const LONGEST = 300; // more than a line holds; result.css cuts it where the line ends

function beginning(text) {
  return text.slice(0, LONGEST).trim().replace(/\s+/g, " ");
}

function choice(side, place, chosen) {
  const label = `Compare ${letter(place)} on the ${side}`;
  return element("td", { class: "choice" }, element("input", {
    type: "radio", name: side, value: place, checked: chosen, "aria-label": label,
  }));
}

/**
 * A table of the ranking; `choose` is called with another pair when one is chosen.
 *
 * @param ranking {index, reward, rank}, best first.
 */
export function rankingTable(ranking, question, reading, pair, choose) {
  const reward = reading === "judge" ? "Rating (log-odds)" : "Reward";
  const rows = ranking.map(({ index, reward: value, rank }) =>
    element(
      "tr",
      {},
      element("td", { class: "number" }, String(rank)),
      element("th", { scope: "row" }, letter(index)),
      element("td", { class: "wide beginning" }, beginning(question.responses[index])),
      element("td", { class: "number" }, number(value)),
      choice("left", index, index === pair[0]),
      choice("right", index, index === pair[1]),
    ),
  );
  const heads = [["Rank", "number"], ["Response"], null, [reward, "number"],
    ["Left", "choice"], ["Right", "choice"]];
  const table = element(
    "table",
    { class: "ranking" },
    element("thead", {}, element("tr", {}, ...heads.map((head) =>
      head ? element("th", { scope: "col", class: head[1] }, head[0]) : element("td")))),
    element("tbody", {}, ...rows),
  );
  table.addEventListener("change", ({ target }) => {
    const [side, place] = [target.name === "left" ? 0 : 1, Number(target.value)];
    const next = [...pair];
    if (pair[1 - side] === place) next[1 - side] = pair[side]; // the two change places
    next[side] = place;
    choose(next);
  });
  return element("section", {}, element("h3", {}, "Ranking"),
    element("div", { class: "scroll" }, table));
}
