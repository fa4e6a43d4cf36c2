"""From a question and responses to the token ids that a judge reads, in both orders.

A comparison of responses a and b is two judge prompts, one that shows a first and one that shows b
first. Each is tokenised as a whole, exactly as transformers tokenises the rendered text; that
includes special tokens that a text spells out, so a response with `<|im_end|>` in it holds that
token. The two are then cut at a token where they are still the same and no response has begun, so
that all comparisons of a question share their beginning.

What is too long is cut by rule, and the template's own words never are: question and responses
share the room that the template leaves. Responses give first, at their ends, the longer one down to
the shorter, then both alike, until they have half of the room; then the question gives, from its
left. Both orders hold the same cut texts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from gram_jax.data.judge import (
    JudgeTemplate,
    Texts,
    fill,
    question_text,
    render_comparison,
    response_text,
)
from gram_jax.data.prompts import (
    ExampleError,
    TokenIds,
    check_candidates,
    encode_candidates,
    render_candidates,
    shared_length,
)
from gram_jax.data.sources import Prompt, Response
from gram_jax.data.tokenizer import Tokenizer
from gram_jax.errors import UserError

# Question and responses get at least this many tokens together, half of them the responses.
SMALLEST_ROOM = 16


class Lost(NamedTuple):
    """Tokens cut from the question and from each response of a comparison."""

    question: int
    response_a: int
    response_b: int


class JudgePrompts(NamedTuple):
    """The two judge prompts of a comparison of a and b.

    Attributes:
      prefix: [T] int32, what both begin with; ends before the first response.
      forward: [T_ab] int32, the rest of the prompt that shows a first.
      backward: [T_ba] int32, the rest of the prompt that shows b first. Equal to `forward` if the
        responses are, at least once they are cut; such a comparison says nothing.
      lost: what was cut.
    """

    prefix: TokenIds
    forward: TokenIds
    backward: TokenIds
    lost: Lost


class PretrainExample(NamedTuple):
    """Stage 1 on a response pair: [T] int32 `prompt`, [T] int32 `response`, and what was cut."""

    prompt: TokenIds
    response: TokenIds
    lost: Lost


# Two lists of ids for each comparison.
_Encoder = Callable[[Sequence[Texts]], list[tuple[list[int], list[int]]]]


def encode_comparison(
    template: JudgeTemplate,
    question: Prompt,
    response_a: Response,
    response_b: Response,
    tokenizer: Tokenizer,
    *,
    max_length: int,
    too_long: str = "error",
) -> JudgePrompts:
    """Token ids of one comparison; see `encode_comparisons`."""
    return encode_comparisons(
        template,
        question,
        [response_a, response_b],
        [(0, 1)],
        tokenizer,
        max_length=max_length,
        too_long=too_long,
    )[0]


def encode_comparisons(
    template: JudgeTemplate,
    question: Prompt,
    responses: Sequence[Response],
    pairs: Sequence[tuple[int, int]],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    too_long: str = "error",
) -> list[JudgePrompts]:
    """Token ids of comparisons among responses to one question.

    A comparison's ids do not depend on the other ones. Where the prefix ends may; it is the same
    for all comparisons whose question is not cut, or cut alike.

    Args:
      question: text or chat messages (see `question_text`).
      responses: N of them, each text or an assistant message.
      pairs: (a, b), the places in `responses` of the two to compare.
      max_length: most tokens of a judge prompt, BOS included.
      too_long: "error", or "truncate" to cut by the module's rule.

    Returns:
      One `JudgePrompts` for each pair.

    Raises:
      ExampleError: a response is none or is empty; or, with "error", a comparison is too long.
      UserError: the chat template fails, or the template leaves no room in max_length.
    """
    check_candidates(question, responses)
    asked, answers = question_text(question), [response_text(response) for response in responses]
    texts = [Texts(asked, answers[a], answers[b]) for a, b in pairs]

    def encode(batch: Sequence[Texts]) -> list[tuple[list[int], list[int]]]:
        rendered = [
            render_comparison(template, order, tokenizer)
            for given in batch
            for order in (given, given.swapped())
        ]
        ids = tokenizer.encode_prompts(
            [prompt.text for prompt in rendered], rendered=tokenizer.chat_template is not None
        )
        return list(zip(ids[::2], ids[1::2], strict=True))

    spans = functools.cache(lambda text: tokenizer.token_spans([text])[0])
    fitted: list[_Fitted] = []
    for pair, given, ids in zip(pairs, texts, encode(texts), strict=True):
        length = max(map(len, ids))
        if length > max_length and too_long == "error":
            _fail_too_long("the judge prompt", length, max_length, given, pair)
        fitted.append(_fit(given, ids, max_length, spans, encode, max))
    groups: dict[str, list[_Fitted]] = {}
    for cut in fitted:
        groups.setdefault(cut.texts.question, []).append(cut)
    shared = {text: _prefix_length(template, group, tokenizer) for text, group in groups.items()}
    return [_split(cut, shared[cut.texts.question]) for cut in fitted]


def encode_pretrain(
    template: JudgeTemplate,
    question: Prompt,
    response_a: Response,
    response_b: Response,
    tokenizer: Tokenizer,
    *,
    max_length: int,
    too_long: str = "error",
    add_eos: bool = True,
) -> PretrainExample:
    """Token ids of stage 1 on a response pair: the question, and both responses as one answer.

    Prompt and response are tokenised apart, and with `add_eos` the response ends with an end token,
    as in `encode_candidates`.

    Args:
      max_length: most tokens of prompt and response together.
      too_long: "error", or "truncate" to cut by the module's rule.

    Raises:
      ExampleError: a response is none or is empty, or the chat template does not write it as it is;
        or, with "error", the two are too long.
      UserError: the template has no text for stage 1; the chat template fails; the template leaves
        no room in max_length.
    """
    if not template.pretrain_prompt:
        raise UserError(
            "the judge template has no text for stage 1; add pretrain_prompt and pretrain_response"
        )
    check_candidates(question, [response_a, response_b])
    given = Texts(question_text(question), response_text(response_a), response_text(response_b))

    def encode(batch: Sequence[Texts]) -> list[tuple[list[int], list[int]]]:
        return [_pretrain_ids(template, texts, tokenizer, add_eos) for texts in batch]

    (ids,) = encode([given])
    length = sum(map(len, ids))
    if length > max_length and too_long == "error":
        _fail_too_long("the question with both responses", length, max_length, given, (0, 1))
    spans = functools.cache(lambda text: tokenizer.token_spans([text])[0])
    fitted = _fit(given, ids, max_length, spans, encode, sum)
    return PretrainExample(_array(fitted.ids[0]), _array(fitted.ids[1]), fitted.lost)


class _Fitted(NamedTuple):
    """Texts that fit, their two lists of ids, and what was cut."""

    texts: Texts
    ids: tuple[list[int], list[int]]
    lost: Lost


def _fit(
    given: Texts,
    ids: tuple[list[int], list[int]],
    max_length: int,
    spans: Callable[[str], list[tuple[int, int]]],
    encode: _Encoder,
    total: Callable[[map[int]], int],
) -> _Fitted:
    """Cuts texts until their ids fit.

    Args:
      given, ids: the texts, and what `encode` makes of them.
      spans: the (start, end) characters of each token of a text by itself.
      total: makes of the two lists' lengths the one that must be at most max_length.
    """
    texts, lost, length = given, Lost(0, 0, 0), total(map(len, ids))
    if length <= max_length:
        return _Fitted(texts, ids, lost)
    question, a, b = (len(spans(text)) for text in given)
    room, smallest = max_length - (length - question - a - b), SMALLEST_ROOM
    while length > max_length:
        if room < smallest:
            raise UserError(
                f"max_length={max_length} leaves no room beside the judge template, which takes"
                f" {max_length - room} tokens by itself; raise max_length to"
                f" {max_length - room + SMALLEST_ROOM} or more, or shorten the template"
            )
        texts, lost = _cut(given, spans, *_shares(question, a, b, room))
        (ids,) = encode([texts])
        length = total(map(len, ids))
        # Tokens merge otherwise in their new places, so there may still be a few too many; they
        # come out of the room, whatever is left of it.
        room, smallest = room - max(0, length - max_length), 0
    return _Fitted(texts, ids, lost)


def _shares(question: int, a: int, b: int, room: int) -> tuple[int, int, int]:
    """How many of their tokens question and responses keep; the same for (a, b) as for (b, a)."""
    question = min(question, max(room // 2, room - a - b))
    left = room - question
    return question, min(a, max(left // 2, left - b)), min(b, max(left // 2, left - a))


def _cut(
    given: Texts,
    spans: Callable[[str], list[tuple[int, int]]],
    question: int,
    a: int,
    b: int,
) -> tuple[Texts, Lost]:
    """Keeps the last tokens of the question and the first of the responses."""
    kept_question, lost_question = _last(given.question, spans(given.question), question)
    kept_a, lost_a = _first(given.response_a, spans(given.response_a), a)
    kept_b, lost_b = _first(given.response_b, spans(given.response_b), b)
    return Texts(kept_question, kept_a, kept_b), Lost(lost_question, lost_a, lost_b)


def _first(text: str, spans: list[tuple[int, int]], keep: int) -> tuple[str, int]:
    """The first `keep` tokens of a text, less parts of a character; how many are lost."""
    if keep >= len(spans):
        return text, 0
    while keep > 0 and spans[keep][0] < spans[keep - 1][1]:
        keep -= 1
    return text[: spans[keep - 1][1] if keep else 0], len(spans) - keep


def _last(text: str, spans: list[tuple[int, int]], keep: int) -> tuple[str, int]:
    """The last `keep` tokens of a text, less parts of a character; how many are lost."""
    first = len(spans) - keep
    if first <= 0:
        return text, 0
    while first < len(spans) and spans[first][0] < spans[first - 1][1]:
        first += 1
    return text[spans[first][0] if first < len(spans) else len(text) :], first


def _prefix_length(template: JudgeTemplate, group: Sequence[_Fitted], tokenizer: Tokenizer) -> int:
    """How many tokens all prompts of one question begin with, none of them beyond its head."""
    _, head, is_chat = render_comparison(template, group[0].texts, tokenizer)
    head_ids = tokenizer.encode_prompt(head, rendered=is_chat)
    shared = min(
        min(shared_length(head_ids, ids), len(ids) - 1) for fitted in group for ids in fitted.ids
    )
    if not shared:
        reason = (
            "the judge prompt has no token of its own before the first response; start the judge"
            " template with words"
        )
        raise ExampleError(reason, field="prompt")
    return shared


def _split(fitted: _Fitted, shared: int) -> JudgePrompts:
    forward, backward = map(_array, fitted.ids)
    return JudgePrompts(forward[:shared], forward[shared:], backward[shared:], fitted.lost)


def _pretrain_ids(
    template: JudgeTemplate, texts: Texts, tokenizer: Tokenizer, add_eos: bool
) -> tuple[list[int], list[int]]:
    text, answer = fill(template.pretrain_prompt, texts), fill(template.pretrain_response, texts)
    is_chat = tokenizer.chat_template is not None
    prompt: Prompt = [{"role": "user", "content": text}] if is_chat else text
    kwargs = template.chat_template_kwargs
    (rendered,) = render_candidates(prompt, [answer], tokenizer, chat_template_kwargs=kwargs)
    if answer.strip() not in rendered.response_text:
        # Qwen3's template takes all before a </think> for reasoning.
        reason = "the chat template does not write the two responses as they are; leave the row out"
        raise ExampleError(reason, field="response")
    ids, (response,) = encode_candidates(
        prompt, [answer], tokenizer, add_eos=add_eos, chat_template_kwargs=kwargs
    )
    return ids.tolist(), response.tolist()


def _fail_too_long(
    what: str, length: int, max_length: int, given: Texts, pair: tuple[int, int]
) -> None:
    longer = pair[len(given.response_b) > len(given.response_a)]
    reason = (
        f"{what} is {length} tokens, more than max_length={max_length}; raise max_length, or cut"
        " with too_long=truncate"
    )
    raise ExampleError(reason, field="response", index=longer)


def _array(ids: list[int]) -> TokenIds:
    return np.asarray(ids, dtype=np.int32)
