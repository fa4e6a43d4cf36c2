// Where two likelihoods part: their tokens side by side, and what each adds to the difference.
//
// A reward is a sum over tokens (or their mean), so a difference of rewards is one, too. Tokens
// with the same text, in the same order in both responses, are taken together, the rest alone:
//
//   reward_a - reward_b  =  sum over aligned (w_a l_a - w_b l_b)
//                           + sum over the rest of a (w_a l_a)  -  sum over the rest of b (w_b l_b)
//
// where l is a log-prob and w is 1, or 1 / number of tokens where the reward is a mean.

/** Cells of the table of an alignment; larger middles are taken as wholly different. */
const MOST_CELLS = 2 ** 24;

/**
 * A longest common subsequence of two lists of texts.
 *
 * Returns {partners, whole}: for each place of a its place in b, or -1; whole is false where the
 * middle was too long to be aligned.
 */
export function align(a, b) {
  const partners = new Array(a.length).fill(-1);
  let start = 0;
  while (start < Math.min(a.length, b.length) && a[start] === b[start]) {
    partners[start] = start;
    start += 1;
  }
  let [endA, endB] = [a.length, b.length];
  while (endA > start && endB > start && a[endA - 1] === b[endB - 1]) {
    endA -= 1;
    endB -= 1;
    partners[endA] = endB;
  }
  const [rows, columns] = [endA - start, endB - start];
  if ((rows + 1) * (columns + 1) > MOST_CELLS) return { partners, whole: false };
  const width = columns + 1;
  const longest = new Uint16Array((rows + 1) * width); // of what follows place i of a, j of b
  for (let i = rows - 1; i >= 0; i -= 1) {
    for (let j = columns - 1; j >= 0; j -= 1) {
      const at = i * width + j;
      longest[at] =
        a[start + i] === b[start + j]
          ? longest[at + width + 1] + 1
          : Math.max(longest[at + width], longest[at + 1]);
    }
  }
  for (let i = 0, j = 0; i < rows && j < columns; ) {
    const at = i * width + j;
    if (a[start + i] === b[start + j]) {
      partners[start + i] = start + j;
      i += 1;
      j += 1;
    } else if (longest[at + width] >= longest[at + 1]) i += 1;
    else j += 1;
  }
  return { partners, whole: true };
}

/**
 * The parts of reward_a - reward_b, for lists of {text, logprob}.
 *
 * Returns {parts, whole}: parts are {a, b, value}, where a and b are places of tokens, or null for
 * one that stands alone. Their values add up to the difference.
 */
export function differences(tokensA, tokensB, average) {
  const texts = (tokens) => tokens.map((token) => token.text);
  const { partners, whole } = align(texts(tokensA), texts(tokensB));
  const weights = [tokensA, tokensB].map((all) => (average === "mean" ? 1 / all.length : 1));
  const inA = partners.map((b, a) => {
    const value = weights[0] * tokensA[a].logprob;
    if (b < 0) return { a, b: null, value };
    return { a, b, value: value - weights[1] * tokensB[b].logprob };
  });
  const taken = new Set(partners);
  const inB = tokensB
    .map((token, b) => ({ a: null, b, value: -weights[1] * token.logprob }))
    .filter((part) => !taken.has(part.b));
  return { parts: [...inA, ...inB], whole };
}

/** The largest parts, at most `most`, and none under a quarter of the largest. */
export function largest(parts, most = 5) {
  const size = (part) => Math.abs(part.value);
  const sorted = parts.filter((part) => size(part) > 0).sort((x, y) => size(y) - size(x));
  return sorted.slice(0, most).filter((part) => size(part) >= size(sorted[0]) / 4);
}
