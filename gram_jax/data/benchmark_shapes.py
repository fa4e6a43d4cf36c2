"""Rows of benchmarks, in the columns that they are published with."""

from __future__ import annotations

from gram_jax.data.record import Record
from gram_jax.data.sources import PreferenceRow
from gram_jax.pair import Pair


def rewardbench_row(record: Record) -> PreferenceRow:
    """RewardBench: preferences with a subset."""
    prompt = record.prompt()
    return record.comparison(
        prompt,
        (record.response("chosen", prompt), record.response("rejected", prompt)),
        ("chosen", "rejected"),
        Pair(0, 1),
        record.text("subset"),
    )


def rm_bench_row(record: Record) -> PreferenceRow:
    """RM-Bench: every chosen style against every rejected one, 9 pairs that weigh 1/9 each."""
    prompt = record.prompt()
    chosen, rejected = record.responses("chosen", prompt), record.responses("rejected", prompt)
    for place, response in enumerate(rejected):
        if response in chosen:
            raise record.error(f"rejected[{place}]", "is also chosen; remove one of them")
    first, second = len(chosen), len(rejected)
    fields = tuple(
        f"{name}[{place}]"
        for name, count in (("chosen", first), ("rejected", second))
        for place in range(count)
    )
    return PreferenceRow(
        prompt,
        chosen + rejected,
        tuple(
            Pair(a, first + b, weight=1 / (first * second))
            for a in range(first)
            for b in range(second)
        ),
        fields,
        record.optional_text("domain"),
        record.reference(first + second),
        record.line,
    )


def judgebench_row(record: Record) -> PreferenceRow:
    """JudgeBench: a label "A>B" or "B>A"."""
    label = record.value("label")
    if label not in ("A>B", "B>A"):
        raise record.error("label", 'must be "A>B" or "B>A"')
    pair = Pair(0, 1) if label == "A>B" else Pair(1, 0)
    prompt = record.prompt("question")
    fields = ("response_A", "response_B")
    both = (record.response(fields[0], prompt), record.response(fields[1], prompt))
    return record.comparison(prompt, both, fields, pair, record.optional_text("source"))


def llmbar_row(record: Record) -> PreferenceRow:
    """LLMBar: a label 1 or 2, the output that follows the instruction."""
    label = record.value("label")
    if label not in (1, 2) or isinstance(label, bool):
        raise record.error("label", "must be 1 or 2, the better output")
    pair = Pair(0, 1) if label == 1 else Pair(1, 0)
    prompt = record.prompt("input")
    fields = ("output_1", "output_2")
    both = (record.response(fields[0], prompt), record.response(fields[1], prompt))
    return record.comparison(prompt, both, fields, pair, record.optional_text("subset"))


def pandalm_row(record: Record) -> PreferenceRow:
    """PandaLM: votes of up to three annotators, 1 or 2, or 0 for a tie.

    The target is the mean vote, a tie being half a vote for each side: what annotators do not agree
    on stays uncertain, which a majority would hide.
    """
    votes: list[float] = []
    for field in ("annotator1", "annotator2", "annotator3"):
        vote = record.values.get(field)
        if vote is None and votes:
            continue
        if vote not in (0, 1, 2) or isinstance(vote, bool):
            raise record.error(field, "must be 0 (a tie), 1 or 2")
        votes.append({0: 0.5, 1: 1.0, 2: 0.0}[vote])
    target = sum(votes) / len(votes)
    pair = Pair(0, 1, target) if target >= 0.5 else Pair(1, 0, 1 - target)
    prompt = record.in_context(record.instruction())
    fields = ("response1", "response2")
    both = (record.response(fields[0], prompt), record.response(fields[1], prompt))
    return record.comparison(prompt, both, fields, pair, record.optional_text("subset"))
