"""Rows that are exactly full of prompts with their responses, ids at random."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

from gram_jax.packing import pack
from gram_jax.rows import Batch, Example, IntArray, RowShape, stack_rows

_LARGEST_ID = 500


class FullRows(NamedTuple):
    """What the rows hold.

    Attributes:
      prompts: in all.
      candidates: responses to each.
      prefix: places of a prompt in front of its responses: its tokens but for the last one.
      response: places of a response, which are as many as its tokens.
      rows: that all of it fills.
    """

    prompts: int
    candidates: int
    prefix: int
    response: int
    rows: int

    @property
    def sequences(self) -> int:
        """Responses in a row."""
        return self.prompts * self.candidates // self.rows

    @property
    def shape(self) -> RowShape:
        """Of the rows, with no token place to spare."""
        tokens = self.prompts // self.rows * self.prefix + self.sequences * self.response
        return RowShape(tokens, tokens, self.sequences)

    def examples(self) -> list[Example]:
        """The prompts with their responses; the same ones each time."""
        rng = np.random.default_rng(0)

        def ids(count: int) -> IntArray:
            return rng.integers(3, _LARGEST_ID, count, np.int32)

        return [
            Example(
                ids(self.prefix + 1),
                tuple(ids(self.response) for _ in range(self.candidates)),
                key=key,
            )
            for key in range(self.prompts)
        ]

    def batch(self) -> Batch:
        """The rows [B, ...], as numpy arrays, without target slots that are not used."""
        rows = list(pack(self.examples(), self.shape))
        assert len(rows) == self.rows, "rows are not full"
        batch, slots = stack_rows([row.batch for row in rows]), self.sequences * self.response
        short = {
            name: getattr(batch, name)[:, :slots]
            for name in ("target_index", "targets", "weights", "sequence_ids")
        }
        return dataclasses.replace(batch, **short)
