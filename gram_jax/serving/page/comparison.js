// What is asked of the server for one comparison, by what kind of reward it has.
//
// A likelihood and a head rate every response (score); a judge only compares. More than two
// responses are ranked. Two of them, the best two unless others are chosen, are compared.

import * as api from "./api.js";

/** The places of the two to compare: those chosen, else the first two of the ranking. */
function choosePair(chosen, ranking) {
  return chosen ?? (ranking ? [ranking[0].index, ranking[1].index] : [0, 1]);
}

/**
 * The two responses of `pair` compared, in the words of the server.
 *
 * @throws ApiError, with a field of the whole question where it names one.
 */
export async function comparePair({ prompt, responses }, pair, signal) {
  const [a, b] = pair.map((place) => responses[place]);
  try {
    return await api.compare({ prompt, a, b }, signal);
  } catch (error) {
    if (error instanceof api.ApiError) error.field = fieldOf(error.field, pair);
    throw error;
  }
}

function fieldOf(field, pair) {
  const side = /^[ab]\b/.exec(field)?.[0];
  return side ? `responses[${pair[side === "a" ? 0 : 1]}]` + field.slice(1) : field;
}

/**
 * All that the page shows of a question {prompt, responses}.
 *
 * Returns {pair, comparison, ranking, scores, cut}: ranking is null for two responses, scores
 * (rewards, logprobs, num_tokens and tokens by response) is null of a judge, cut says whether
 * something did not fit, in any of them.
 *
 * @throws ApiError.
 */
export async function ask(model, question, chosen, signal) {
  const all = { prompt: question.prompt, responses: question.responses };
  const tokens = model.reading === "likelihood";
  const scoring = model.reading === "judge" ? null : api.score({ ...all, tokens }, signal);
  const ranking = all.responses.length > 2 ? api.rank(all, signal) : null;
  const comparing = (async () => {
    const pair = choosePair(chosen, (await ranking)?.results);
    return { pair, comparison: await comparePair(question, pair, signal) };
  })();
  const [scored, ranked, compared] = await Promise.all([scoring, ranking, comparing]);
  const scores = scored?.results[0] ?? null;
  const cut = [compared.comparison, ranked, scores].some((part) => part?.truncated);
  return { ...compared, ranking: ranked?.results ?? null, scores, cut };
}
