"""Token records of the judge: comparisons in one or both orders, and response pairs of stage 1.

A comparison of two responses is two judge prompts. Each is a sequence whose score, z_A - z_B, is
compared with 0: it should be positive where the response that the prompt shows first is better.
Both orders together weigh as much as the comparison.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from gram_jax.config import DataConfig
from gram_jax.data.judge import JudgeTemplate
from gram_jax.data.judge_prompts import JudgePrompts, Lost, encode_comparisons, encode_pretrain
from gram_jax.data.prompts import ExampleError
from gram_jax.data.sources import PreferenceRow, ResponsesRow
from gram_jax.data.token_records import ExampleCounts, TokenRecord, record_key
from gram_jax.data.tokenizer import Tokenizer
from gram_jax.pair import Pair


def encode_judged(
    row: PreferenceRow,
    config: DataConfig,
    template: JudgeTemplate,
    orders: str,
    tokenizer: Tokenizer,
    counts: ExampleCounts,
) -> list[TokenRecord]:
    """The judge prompts of a row's comparisons.

    Args:
      orders: "both", or "random": one of the two, chosen by the text of the comparison.

    Raises:
      ExampleError, UserError: the row cannot be used; see ``encode_comparisons``.
    """
    places = [(pair.a, pair.b) for pair in row.pairs if pair.b is not None]
    try:
        found = encode_comparisons(
            template, row.prompt, row.responses, places, tokenizer,
            max_length=config.row_length, too_long="truncate",
        )  # fmt: skip
    except ExampleError as error:
        if error.field == "response":
            raise ExampleError(error.reason, field=row.fields[error.index]) from None
        raise
    records = []
    for pair, prompts in zip(row.pairs, found, strict=True):
        counts.tokens += 2 * len(prompts.prefix) + len(prompts.forward) + len(prompts.backward)
        if not _count_lost(prompts.lost, config, counts):
            continue
        if np.array_equal(prompts.forward, prompts.backward):
            counts.dropped_pairs += 1
            continue
        records.append(_record(pair, prompts, orders))
    return records


def _record(pair: Pair, prompts: JudgePrompts, orders: str) -> TokenRecord:
    key = record_key(prompts.prefix.tobytes())
    forward = (prompts.forward, pair.target, pair.margin)
    backward = (prompts.backward, 1 - pair.target, -pair.margin)
    shown = [forward, backward]
    if orders == "random":
        text = prompts.prefix.tobytes() + prompts.forward.tobytes()
        shown = [shown[record_key(text) & 1]]
    return TokenRecord(
        key,
        prompts.prefix,
        tuple(ids for ids, _, _ in shown),
        tuple(
            Pair(i, None, target, pair.weight / len(shown), margin)
            for i, (_, target, margin) in enumerate(shown)
        ),
    )


def encode_response_pairs(
    row: ResponsesRow,
    config: DataConfig,
    template: JudgeTemplate,
    tokenizer: Tokenizer,
    counts: ExampleCounts,
) -> Iterator[TokenRecord]:
    """Stage 1 on response pairs: each response with the next one, as one answer to the question.

    Raises:
      ExampleError, UserError: the row cannot be used; see ``encode_pretrain``.
    """
    for a, b in zip(row.responses, row.responses[1:], strict=False):
        found = encode_pretrain(
            template, row.prompt, a, b, tokenizer,
            max_length=config.row_length, too_long="truncate", add_eos=config.add_eos,
        )  # fmt: skip
        counts.tokens += len(found.prompt) + len(found.response)
        if _count_lost(found.lost, config, counts):
            yield TokenRecord(record_key(found.prompt.tobytes()), found.prompt, (found.response,))


def _count_lost(lost: Lost, config: DataConfig, counts: ExampleCounts) -> bool:
    """Counts what was cut; False if the comparison is to be left out."""
    counts.tokens += sum(lost)
    if any(lost) and config.too_long == "drop":
        counts.dropped_rows += 1
        return False
    counts.cut_prompts += lost.question > 0
    counts.cut_responses += (lost.response_a > 0) + (lost.response_b > 0)
    counts.cut_tokens += sum(lost)
    return True
