"""Packing of text: which documents share a row, and which one is cut to fill it.

A document may be cut anywhere, and nothing is repeated for it: what is cut off goes on in another
row from the last token before the cut, as its prompt, so that every token is predicted once. But
the tokens after a cut do not see what came before it. So rows are made of whole documents where a
sum of whole ones comes near, and only else the longest that is left is cut to fill a row.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator, Sequence

from gram_jax.cutting import DoesNotFit
from gram_jax.packing import PackCounts
from gram_jax.rows import Example, PackedRow, Part, RowShape, build_row
from gram_jax.subset_sum import closest

_SLACK = 0.005
"""Share of a row that may stay empty where filling it means cutting a document."""


def pack_texts(
    documents: Iterable[Example], shape: RowShape, *, counts: PackCounts | None = None
) -> Iterator[PackedRow]:
    """Packs documents, which are examples of one response each, into rows.

    The rows depend on the documents and their order, and on nothing else. All but the last are full
    but for half a percent. ``counts``, if given, is complete when the first row is there.

    Raises:
      DoesNotFit: a document is longer than a row; gram_jax.data.examples cuts those.
    """
    pool = _Pool(shape)
    number = 0
    for number, document in enumerate(documents, start=1):
        if _room([document], shape) < 0:
            raise DoesNotFit(
                f"a document of {document.num_tokens(shape)} tokens does not fit a row of {shape}"
            )
        pool.add(number, document)
    cut: set[int] = set()
    rows = list(_fill_rows(pool, shape, cut))
    if counts is not None:
        counts.examples += number
        counts.spilled += len(cut)
        counts.rows += len(rows)
        counts.tokens += sum(document.num_tokens(shape) for row in rows for document in row)
        counts.places += len(rows) * shape.tokens
        counts.sequences += sum(map(len, rows))
    for row in rows:
        parts = [
            Part(document, (0,), (), document.num_tokens(shape), len(document.responses[0]))
            for document in row
        ]
        yield build_row(parts, shape)


def _fill_rows(pool: _Pool, shape: RowShape, cut: set[int]) -> Iterator[list[Example]]:
    """Rows of documents and parts of them; ``cut`` gets the numbers of those that were cut."""
    slack = int(_SLACK * shape.tokens)
    while pool.tokens:
        row = [pool.take(pool.sizes[-1])[1]]
        while sizes := closest(pool.sizes, pool.counted, _room(row, shape)):
            row += [pool.take(size)[1] for size in sizes]
        room = _room(row, shape)
        # If the rest fits in one more row, that row is there however full this one gets.
        if room > slack and pool.tokens > shape.tokens:
            number, longest = pool.take(pool.sizes[-1])
            if (k := room - len(longest.prompt) + 1) > 0:
                head, longest = _halves(longest, k)
                row.append(head)
                cut.add(number)
            pool.add(number, longest)
        yield row


def _room(row: Sequence[Example], shape: RowShape) -> int:
    """Any document of so many tokens fits a row."""
    return min(
        shape.tokens - sum(document.num_tokens(shape) for document in row),
        shape.branch_room - sum(len(document.responses[0]) for document in row),
    )


def _halves(document: Example, k: int) -> tuple[Example, Example]:
    """The first k tokens of a document's response, and all others after the last of those."""
    (response,) = document.responses
    return (
        Example(document.prompt, (response[:k],), key=document.key),
        Example(response[k - 1 : k], (response[k:],), key=document.key),
    )


class _Pool:
    """The documents, and parts of documents, that are in no row yet, with their numbers."""

    def __init__(self, shape: RowShape):
        self._shape = shape
        self.sizes: list[int] = []  # in tokens, ascending
        self.counted: dict[int, int] = {}  # documents of a size
        self.tokens = 0
        self._documents: dict[int, list[tuple[int, Example]]] = {}  # by size

    def add(self, number: int, document: Example) -> None:
        size = document.num_tokens(self._shape)
        if size not in self.counted:
            self.counted[size] = 0
            bisect.insort(self.sizes, size)
        self.counted[size] += 1
        self.tokens += size
        self._documents.setdefault(size, []).append((number, document))

    def take(self, size: int) -> tuple[int, Example]:
        self.counted[size] -= 1
        if not self.counted[size]:
            del self.counted[size], self.sizes[bisect.bisect_left(self.sizes, size)]
        self.tokens -= size
        return self._documents[size].pop()
