// A response as its tokens, each shaded by its log-prob; the number on hover, focus and touch.
//
// The tokens of a response are one stop of the Tab key; the arrow keys, Home and End go on from
// there.

import { element } from "./element.js";
import { MINUS, letter, number, probability, score, signed } from "./numbers.js";
import { hideTip, showTip } from "./tip.js";

/** Lower bounds of the log-probs of each shade, likely first; page.css has a colour for each. */
const BOUNDS = [-0.1, -0.5, -1, -2, -4, -8];

function shade(logprob) {
  const found = BOUNDS.findIndex((bound) => logprob >= bound);
  return found < 0 ? BOUNDS.length : found;
}

/** What the shades mean. */
export function legend() {
  const spans = BOUNDS.map((bound, i) => {
    const short = score(bound).replace(/\.?0+$/, "");
    return element("span", { class: `swatch shade-${i}` }, i ? short : `≥ ${short}`);
  });
  return element(
    "p",
    { class: "legend quiet" },
    element("span", {}, "log-prob of a token, likely to surprising"),
    element("span", { class: "swatches" },
      ...spans, element("span", { class: `swatch shade-${BOUNDS.length}` }, "below")),
    element("span", {}, element("i", { class: "mark", "data-number": "1" }),
      "where they differ most"),
  );
}

/** How a token is written where it stands alone: spaces and line breaks seen. */
export function visible(text) {
  if (!text) return "(no text)";
  return text.replaceAll(" ", "␣").replaceAll("\n", "↵").replaceAll("\t", "⇥");
}

function describe(token) {
  const parts = [visible(token.text), `log-prob ${score(token.logprob)}`];
  if (token.mark) parts.push(`difference ${token.mark}`);
  return parts.join(", ");
}

/**
 * Its text, with signs beside it that are no text: a line break's, and its mark. A mark stays on
 * the line of what it marks.
 */
function tokenContent({ text, mark }) {
  const [, spaces, word, rest] = /^([^\S\n]*)([^\n]*)([^]*)$/.exec(text);
  const signs = [
    rest ? element("i", { class: "break" }) : null,
    mark ? element("i", { class: "mark", "data-number": mark }) : null,
  ];
  return [spaces, element("span", { class: mark ? "together" : null }, word, ...signs), rest];
}

function tokenElement(token, side, place) {
  const kind = token.text ? "" : "textless";
  const special = token.special ? "special" : ""; // an end token: no part of the text
  return element(
    "span",
    {
      role: "option",
      class: `token shade-${shade(token.logprob)} ${kind} ${special}`,
      tabindex: place === 0 ? "0" : "-1",
      "aria-selected": "false",
      "aria-label": describe(token),
      "data-place": place,
      "data-side": side,
      "data-mark": token.mark,
    },
    ...tokenContent(token),
  );
}

function tipContent(token, names, side) {
  const rows = [
    ["log-prob", number(token.logprob)],
    ["probability", number(Math.exp(token.logprob), probability)],
  ];
  if (token.partner !== null) {
    rows.push([`log-prob in ${names[1 - side]}`, number(token.partner.logprob)]);
  }
  const part = `part of ${names[0]} ${MINUS} ${names[1]}`;
  rows.push([part, number(token.part, signed)]);
  return [
    element("strong", {}, visible(token.text)),
    element("dl", {}, ...rows.flatMap(([term, value]) =>
      [element("dt", {}, term), element("dd", {}, value)])),
  ];
}

/**
 * Tokens of both responses, as two elements.
 *
 * @param sides for each response a list of {text, logprob, part, partner, mark}: part is what it
 *   adds to the difference of rewards, partner the token that it is aligned with as {place,
 *   logprob} or null, mark its number among the largest differences or null.
 * @param pair places of the responses.
 */
export function tokenLists(sides, pair) {
  const names = pair.map(letter);
  const lists = sides.map((tokens, side) =>
    element(
      "div",
      { role: "listbox", class: "tokens", "aria-label": `Tokens of response ${names[side]}`,
        "aria-orientation": "horizontal" },
      ...tokens.map((token, place) => tokenElement(token, side, place)),
    ),
  );

  function light(side, place, on) {
    const partner = sides[side][place].partner;
    if (partner) lists[1 - side].children[partner.place].classList.toggle("partner", on);
  }

  function show(target) {
    const [side, place] = [Number(target.dataset.side), Number(target.dataset.place)];
    showTip(target, ...tipContent(sides[side][place], names, side));
    light(side, place, true);
  }

  function hide(target) {
    light(Number(target.dataset.side), Number(target.dataset.place), false);
    hideTip();
    const focused = document.activeElement;
    if (focused !== target && focused?.matches(".token")) show(focused);
  }

  const tokenOf = (event) => event.target.closest?.(".token");
  for (const list of lists) {
    list.addEventListener("pointerover", (event) => tokenOf(event) && show(tokenOf(event)));
    list.addEventListener("pointerout", (event) => tokenOf(event) && hide(tokenOf(event)));
    list.addEventListener("focusin", (event) => {
      for (const token of list.children) {
        token.tabIndex = token === event.target ? 0 : -1;
        token.ariaSelected = String(token === event.target);
      }
      if (tokenOf(event)) show(tokenOf(event));
    });
    list.addEventListener("focusout", (event) => {
      if (!tokenOf(event)) return;
      tokenOf(event).ariaSelected = "false";
      light(Number(event.target.dataset.side), Number(event.target.dataset.place), false);
      hideTip();
    });
    list.addEventListener("keydown", (event) => move(list, event));
  }
  return lists;
}

const STEPS = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };

function move(list, event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const last = list.children.length - 1;
  const place = Number(event.target.dataset.place);
  const next = { Home: 0, End: last }[event.key] ?? place + (STEPS[event.key] ?? NaN);
  if (Number.isNaN(next)) return;
  event.preventDefault();
  list.children[Math.min(Math.max(next, 0), last)].focus();
}
