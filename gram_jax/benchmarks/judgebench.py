"""JudgeBench (Tan et al. 2024, arXiv 2410.12784): which of two answers is the correct one.

A pair is judged in both orders, +1 for a right verdict and -1 for a wrong one; it is correct if the
sum is above zero. A model that sees no order says the same twice.
"""

from __future__ import annotations

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
    mean,
    mean_of,
    missing_and_differing,
    subsets_of,
)

SOURCES = {
    "mmlu-pro": "Knowledge",
    "livebench-reasoning": "Reasoning",
    "livebench-math": "Math",
    "livecodebench": "Coding",
}
"""Beginnings of the column ``source``, and what they are reported as."""

PUBLISHED = {"Knowledge": 154, "Reasoning": 98, "Math": 56, "Coding": 42}
"""Pairs of each category, of the responses by GPT-4o."""


def _recognises(record: Record) -> bool:
    return {"question", "response_A", "response_B", "label", "source"} <= record.keys()


def _read(row: Row) -> Item:
    source = row.text("source")
    subset = next((name for start, name in SOURCES.items() if source.startswith(start)), None)
    if subset is None:
        raise row.error("source", f"{source!r} begins with none of {', '.join(SOURCES)}")
    label = row.known("label", ("A>B", "B>A"))
    prompt = row.prompt("question")
    responses = row.response("response_A", prompt), row.response("response_B", prompt)
    pairs = ((0, 1),) if label == "A>B" else ((1, 0),)
    fields = ("question", "response_A", "response_B")
    id = row.id("pair_id")
    return Item("judgebench", subset, id, prompt, responses, pairs, row.file, row.line, fields)


def is_correct(answer: Answer) -> bool:
    """Whether right verdicts outweigh wrong ones over both orders; none counts for a tie."""
    return bool(np.sign(answer.verdicts()).sum() > 0)


def official(answers: Sequence[Answer]) -> Official:
    """The four categories, their mean (macro), and the share of all pairs (micro)."""
    found = subsets_of(answers)
    values = {name: mean([is_correct(one) for one in those]) for name, those in found.items()}
    missing, differs = missing_and_differing(found, PUBLISHED)
    sums = [Sum(name, values.get(name), len(found.get(name, ()))) for name in PUBLISHED]
    macro = Sum("Macro", mean_of(values, PUBLISHED), len(answers))
    counts = {name: float(len(those)) for name, those in found.items()}
    micro = None if missing else sum(values[n] * c for n, c in counts.items()) / len(answers)
    return Official(
        "JudgeBench", (*sums, macro, Sum("Micro", micro, len(answers))), missing, differs
    )


JUDGEBENCH = Benchmark(
    "judgebench",
    "JudgeBench",
    "question, response_A, response_B, label, source",
    _recognises,
    _read,
    official,
)
