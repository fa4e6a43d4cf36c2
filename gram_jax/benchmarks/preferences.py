"""Plain preferences: {"prompt", "chosen", "rejected"[, "subset"]}, as for training."""

from __future__ import annotations

from gram_jax.benchmarks.items import Benchmark, Item, Record, Row


def pair_item(row: Row, benchmark: str, subset: str) -> Item:
    """The item of a record with prompt, chosen and rejected.

    Raises:
      DataError: names file, line and field of what is missing or wrong.
    """
    prompt = row.prompt()
    responses = row.response("chosen", prompt), row.response("rejected", prompt)
    fields = ("prompt", "chosen", "rejected")
    return Item(
        benchmark, subset, row.id(), prompt, responses, ((0, 1),), row.file, row.line, fields
    )


def _read(row: Row) -> Item:
    subset = ""
    if row.record.get("subset") is not None:
        subset = row.text("subset", allow_empty=True)
    return pair_item(row, "preferences", subset)


def _recognises(record: Record) -> bool:
    return {"prompt", "chosen", "rejected"} <= record.keys()


PREFERENCES = Benchmark(
    "preferences",
    "preferences",
    "prompt, chosen, rejected[, subset]",
    _recognises,
    _read,
    None,
)
