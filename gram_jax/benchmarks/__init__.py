"""Benchmarks of reward models: their columns, and their official sums.

One file a family. A record is recognised by its published columns; what is of no benchmark but has
a prompt, chosen and rejected is a plain preference.
"""

from __future__ import annotations

from gram_jax.benchmarks.hhh import HHH
from gram_jax.benchmarks.items import Answer, Benchmark, Item, Official, Record, Row, Sum, answer
from gram_jax.benchmarks.judgebench import JUDGEBENCH
from gram_jax.benchmarks.llmbar import LLMBAR
from gram_jax.benchmarks.preferences import PREFERENCES
from gram_jax.benchmarks.rewardbench import REWARDBENCH
from gram_jax.benchmarks.rewardbench2 import REWARDBENCH2
from gram_jax.benchmarks.rmbench import RMBENCH
from gram_jax.errors import DataError

__all__ = [
    "BENCHMARKS",
    "Answer",
    "Benchmark",
    "Item",
    "Official",
    "Record",
    "Row",
    "Sum",
    "answer",
    "recognise",
]

# Plain preferences last: other records have their columns as well.
BENCHMARKS = {
    one.name: one
    for one in (REWARDBENCH2, RMBENCH, REWARDBENCH, JUDGEBENCH, LLMBAR, HHH, PREFERENCES)
}
"""By name, in the order in which they are tried."""


def recognise(row: Row) -> Benchmark:
    """The benchmark that a record is of.

    Raises:
      DataError: of none; the message lists what there is.
    """
    for one in BENCHMARKS.values():
        if one.recognises(row.record):
            return one
    kinds = "; ".join(f"{one.columns} ({one.title})" for one in BENCHMARKS.values())
    fields = ", ".join(sorted(row.record)) or "none"
    reason = f"the fields here ({fields}) are those of no benchmark; there are: {kinds}"
    raise DataError(reason, file=row.file, line=row.line)
