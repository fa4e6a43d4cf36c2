// The page: what happens when something is pressed, opened or answered.

import * as api from "./api.js";
import { ask, comparePair } from "./comparison.js";
import { byId } from "./element.js";
import { FieldFault, QuestionForm } from "./form.js";
import { resultParts } from "./result.js";
import { fromFragment, toFragment } from "./share.js";
import { hideTip } from "./tip.js";
import { sentence } from "./verdict.js";

const EXAMPLE = {
  prompt: "What is 2 + 2?",
  as: "text",
  responses: ["2 + 2 is 4.", "2 + 2 is 5, as everybody knows."],
};

let model = null;
let shown = null; // {state, question, result} of what the page shows
let running = null; // AbortController of the comparison under way
const form = new QuestionForm(noteChange);

function say(text) {
  byId("status").textContent = text;
}

function announce(text) {
  byId("announced").textContent = text;
}

function noteChange() {
  byId("link").hidden = true;
  if (!shown) return;
  const stale = JSON.stringify(form.state) !== JSON.stringify(shown.state);
  byId("result").classList.toggle("stale", stale);
  if (!running) say(stale ? "The texts have changed since this comparison." : "");
}

async function loadModel() {
  model = await api.model();
  const { checkpoint, reading, average, beta, max_length: longest, dtype, version } = model;
  const facts = [checkpoint, reading === "likelihood" ? `likelihood, ${average}` : reading];
  if (reading !== "judge") facts.push(`beta ${beta}`);
  facts.push(`at most ${longest} tokens`, dtype, `gram_jax ${version}`);
  byId("model").textContent = facts.join(" · ");
  form.limit(model.limits.candidates);
}

function complain(message) {
  byId("problem").textContent = message;
  byId("problem").hidden = false;
}

function showProblem(error) {
  if (!(error instanceof api.ApiError || error instanceof FieldFault)) {
    console.error(error);
    complain(`This page failed (${error}). Reload it.`);
  } else if (error.needsKey) {
    complain(error.message);
    byId("key").hidden = false;
    byId("api-key").focus();
  } else if (!form.fault(error.field, error.message)) complain(error.message);
}

/** One thing at a time: what is under way is dropped, its answer too. */
async function run(work) {
  running?.abort();
  const mine = (running = new AbortController());
  form.clearFaults();
  byId("problem").hidden = true;
  byId("result").setAttribute("aria-busy", "true");
  hideTip();
  say("Comparing …");
  announce("");
  try {
    await work(mine.signal);
  } catch (error) {
    if (running !== mine) return;
    running = null;
    mine.abort(); // what else was asked for it
    say("");
    noteChange();
    showProblem(error);
  } finally {
    if (running === mine) running = null;
    if (!running) byId("result").removeAttribute("aria-busy");
  }
}

api.whenBusy((seconds) => {
  say(seconds ? `The server is busy. Asking again in ${seconds} s …` : "Comparing …");
});

async function show(state, question, result) {
  shown = { state, question, result };
  const parts = resultParts(result, question, model, choosePair);
  byId("result").replaceChildren(...parts);
  byId("result").classList.remove("stale");
  say("");
  announce(`${sentence(result.comparison.p_a_better, result.pair)}.`);
  const fragment = await toFragment(linked(state, result.pair));
  if (shown.result === result) history.replaceState(null, "", `#${fragment}`);
}

function linked(state, pair) {
  return { ...state, pair, model: model?.checkpoint ?? null };
}

function compare(chosen = null) {
  const state = form.state;
  return run(async (signal) => {
    const question = form.question();
    if (!model) await loadModel();
    const result = await ask(model, question, chosen, signal);
    if (!signal.aborted) await show(state, question, result);
  });
}

/** Another two of the responses that were ranked. */
function choosePair(pair) {
  const { state, question, result } = shown;
  const focused = document.activeElement;
  return run(async (signal) => {
    const comparison = await comparePair(question, pair, signal);
    if (signal.aborted) return;
    await show(state, question, { ...result, pair, comparison });
    byId("result").querySelector(`input[name=${focused.name}]:checked`)?.focus();
  });
}

async function share() {
  const same = shown && JSON.stringify(form.state) === JSON.stringify(shown.state);
  const pair = same ? shown.result.pair : null;
  const link = new URL(`#${await toFragment(linked(form.state, pair))}`, location.href).href;
  const box = byId("link-text");
  box.value = link;
  byId("link").hidden = false;
  let copied = true;
  try {
    await navigator.clipboard.writeText(link);
  } catch {
    copied = false; // no clipboard without https, or it was refused: the link is there to be copied
  }
  byId("link-note").textContent = copied ? "Link (copied)" : "Link, to be copied";
  box.focus();
  box.select();
}

async function openLink() {
  let state;
  try {
    state = await fromFragment(location.hash);
  } catch (error) {
    complain(error.message);
    return;
  }
  if (!state) return;
  const { pair, model: made, ...question } = state;
  delete question.v;
  form.state = question;
  await compare(pair);
  if (shown && made && model && made !== model.checkpoint) {
    say(`This link was made with the model ${made}; the numbers are those of this one.`);
  }
}

byId("question").addEventListener("submit", (event) => {
  event.preventDefault();
  compare();
});
byId("question").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
  event.preventDefault();
  compare();
});
byId("share").addEventListener("click", share);
byId("example").addEventListener("click", () => (form.state = EXAMPLE));
byId("key").addEventListener("submit", async (event) => {
  event.preventDefault();
  api.useKey(byId("api-key").value);
  byId("key").hidden = true;
  await start();
});
addEventListener("hashchange", openLink);

async function start() {
  try {
    await loadModel();
  } catch (error) {
    byId("model").textContent = "The model of this server is not known.";
    showProblem(error);
    return;
  }
  byId("problem").hidden = true;
  await openLink();
}

start();
