"""LLMBar (Zeng et al. 2023, arXiv 2310.07641): following the instruction against looking good.

Accuracy is the mean over the two orders of the share of right verdicts; agreement is the share of
pairs whose verdict is the same in both orders. A verdict of neither is not right.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from gram_jax.benchmarks.items import (
    Answer,
    Benchmark,
    Item,
    Official,
    Record,
    Row,
    Sum,
    mean_of,
    missing_and_differing,
    subsets_of,
    words_of_path,
)
from gram_jax.benchmarks.preferences import pair_item

NATURAL = "natural"
ADVERSARIAL = (
    "adversarial-neighbor",
    "adversarial-gptinst",
    "adversarial-gptout",
    "adversarial-manual",
)
PUBLISHED = dict(zip((NATURAL, *ADVERSARIAL), (100, 134, 92, 47, 46), strict=True))
"""Pairs of each subset, 419 in all."""

_BY_LAST_WORD = {name.rpartition("-")[2]: name for name in PUBLISHED}


def _is_published(record: Record) -> bool:
    return {"input", "output_1", "output_2", "label"} <= record.keys()


def _recognises(record: Record) -> bool:
    """The published columns, or plain preferences whose column ``source`` is llmbar."""
    pair = {"prompt", "chosen", "rejected"} <= record.keys()
    return _is_published(record) or (pair and record.get("source") == "llmbar")


def _read(row: Row) -> Item:
    subset = _subset(row)
    if not _is_published(row.record):
        return pair_item(row, "llmbar", subset)
    label = row.record["label"]
    if isinstance(label, bool) or str(label) not in ("1", "2"):
        raise row.error("label", "must be 1 or 2, the number of the better output")
    prompt = row.prompt("input")
    responses = row.response("output_1", prompt), row.response("output_2", prompt)
    pairs = ((0, 1),) if str(label) == "1" else ((1, 0),)
    fields = ("input", "output_1", "output_2")
    return Item("llmbar", subset, row.id(), prompt, responses, pairs, row.file, row.line, fields)


def _subset(row: Row) -> str:
    """By the column ``subset``, else by the names of the file and its folder, as published."""
    if row.record.get("subset") is not None:
        text = row.text("subset")
        words = re.split(r"[^a-z]+", text.lower())
        reason = f"{text!r} is none of {', '.join(PUBLISHED)}"
    else:
        words = words_of_path(row.file)
        reason = f"is missing, and the file's name is none of {', '.join(PUBLISHED)}; add it"
    for word in words:
        if word in _BY_LAST_WORD:
            return _BY_LAST_WORD[word]
    raise row.error("subset", reason)


def official(answers: Sequence[Answer]) -> Official:
    """Accuracy and agreement: each subset, the mean of the adversarial ones, the mean of all."""
    found = subsets_of(answers)
    accuracy: dict[str, float] = {}
    agreement: dict[str, float] = {}
    for name, those in found.items():
        orders = np.concatenate([one.verdicts() for one in those], axis=1)
        accuracy[name] = float((orders > 0).mean())
        agreement[name] = float((np.sign(orders[0]) == np.sign(orders[1])).mean())
    missing, differs = missing_and_differing(found, PUBLISHED)
    sums: list[Sum] = []
    for word, values in (("agreement", agreement), ("accuracy", accuracy)):
        for name in PUBLISHED:
            sums.append(Sum(f"{name} {word}", values.get(name), len(found.get(name, ()))))
        n = sum(len(found.get(name, ())) for name in ADVERSARIAL)
        sums.append(Sum(f"Adversarial {word}", mean_of(values, ADVERSARIAL), n))
        sums.append(Sum(f"Mean {word}", mean_of(values, PUBLISHED), len(answers)))
    return Official("LLMBar", tuple(sums), missing, differs)


LLMBAR = Benchmark(
    "llmbar",
    "LLMBar",
    "input, output_1, output_2, label",
    _recognises,
    _read,
    official,
)
