"""Texts that come whole, as classifiers are given them, instead of a prompt and a response.

Where the prompt is known and the text begins with it, the text is split there. Else it is taken as
a response to the empty prompt: after BOS, with an end token where responses have one. A judge reads
a judge prompt that was written with its template, and adds no end token. Token ids are read as
they are.

A likelihood gives the first token no number unless something stands before it. A head and a judge
read the last token only, so that it does not matter where a text is split.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gram_jax.encoding import Cut, Encoded, Encoder, fit
from gram_jax.rows import IntArray
from gram_jax.serving.errors import invalid


def split_text(text: str, prompt: str | None, bos: str = "") -> tuple[str, str] | None:
    """The prompt and the response of a text that begins with its prompt, else None.

    A ``bos`` that the text spells out before its prompt is passed over: prompts get one anyway.
    """
    for before in ("", bos):
        whole = f"{before}{prompt}"
        if prompt and len(text) > len(whole) and text.startswith(whole):
            return prompt, text[len(whole) :]
    return None


def encode_text(encoder: Encoder, text: str, field: str, *, special: bool = True) -> Encoded:
    """A text without a prompt; without ``special``, nothing is put before it.

    Raises:
      RequestError: it is empty, or too long; or it needs something before it, and there is nothing.
      UserError: the tokenizer has no end token.
    """
    tokenizer = encoder.tokenizer
    add_eos = encoder.add_eos and encoder.reading != "judge"
    ids = tokenizer.encode_prompt(text, rendered=not special)
    if add_eos:
        end = tokenizer.encode_response("", add_eos=True)
        ids = ids if ids[-len(end) :] == end else [*ids, *end]
    before = len(tokenizer.prefix_ids) if special else 1
    if not before and encoder.reading == "likelihood":
        raise invalid(
            field,
            "has no prompt, and the tokenizer has no BOS to stand in for one; send a prompt and a"
            " response to /gram/v1/score",
        )
    return encode_ids(encoder, ids, before, field)


def encode_ids(encoder: Encoder, ids: Sequence[int], before: int, field: str) -> Encoded:
    """Token ids as they are; the first ``before`` of them, at least one, are the prompt.

    Raises:
      RequestError: there are fewer than two, or too many.
    """
    before = max(before, 1)
    if len(ids) <= before:
        raise invalid(field, f"is {len(ids)} tokens; at least {before + 1} are needed")
    array = np.asarray(ids, np.int32)
    return continuations(encoder, array[:before], [array[before:]], field)


def continuations(
    encoder: Encoder, prompt: IntArray, responses: Sequence[IntArray], field: str
) -> Encoded:
    """A prompt and its responses as ids, cut or refused if they are too long.

    Raises:
      RequestError: they are too long.
    """
    longest = max(map(len, responses))
    length = len(prompt) + longest
    if length > encoder.max_length and encoder.too_long == "error":
        raise invalid(
            field,
            f"is {length} tokens, more than max_length={encoder.max_length}; serve with a larger"
            " --max_length (and --row_length), or with --too_long=truncate",
        )
    prompt, short, cut = fit(prompt, responses, encoder.max_length, encoder.tokenizer.prefix_ids)
    return Encoded([(prompt, rest) for rest in short], tuple(map(len, short)), Cut(*cut))
