"""Rows in the order of a run: row number = f(seed, position), read by whoever needs the row.

A run's place in its data is one integer, the number of rows consumed. Every epoch visits each row
once, in a new order. The order depends on the seed and on nothing else: not on the number of
devices or processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import grain
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gram_jax.mesh import ROWS
from gram_jax.rows import Batch, PackedRow, RowShape, empty_row, stack_rows


class PackedRows:
    """Packed rows in memory, addressed by number."""

    def __init__(self, rows: Sequence[PackedRow], shape: RowShape):
        padding = empty_row(shape, reference=bool(rows) and rows[0].batch.reference is not None)
        self._rows = stack_rows([*(row.batch for row in rows), padding])
        self.padding = len(rows)
        """The number of a row of padding, to fill up a last batch."""

    def __len__(self) -> int:
        return self.padding

    def context(self) -> float:
        """Mean number of tokens of the contexts that tokens lie in: 2 x their mean position."""
        used = self._rows.segment_ids != 0
        return 2.0 * float((self._rows.positions[used] + 1).mean())

    def targets_per_token(self) -> float:
        used = int((self._rows.segment_ids != 0).sum())
        return int((self._rows.weights != 0).sum()) / used

    def read(self, numbers: np.ndarray) -> Batch:
        """The rows with these numbers, stacked, as numpy arrays."""
        return cast(Batch, jax.tree.map(lambda leaf: leaf[numbers], self._rows))


class RowOrder:
    """Which row stands at each position of an endless run over ``num_rows`` rows."""

    def __init__(self, num_rows: int, seed: int):
        self._order = grain.MapDataset.range(num_rows).seed(seed).shuffle().repeat()

    def numbers(self, position: int, count: int) -> np.ndarray:
        """Row numbers at ``position`` and the ``count - 1`` positions after it."""
        return np.array([self._order[i] for i in range(position, position + count)], np.int64)


def device_batch(rows: PackedRows, numbers: np.ndarray, parts: int, mesh: Mesh) -> Batch:
    """Rows as arrays [parts, rows per part, ...] split over the mesh.

    Each process reads only the rows that its devices hold.
    """
    grid = numbers.reshape(parts, -1)
    sharding = NamedSharding(mesh, P(None, ROWS))
    read: dict[tuple[int, int], Batch] = {}

    def rows_of(index: tuple[slice, ...]) -> Batch:
        # All fields of a batch ask for the same slices, and so do devices along `tensor`.
        start, stop, _ = index[1].indices(grid.shape[1])
        if (start, stop) not in read:
            read[start, stop] = rows.read(grid[:, start:stop])
        return read[start, stop]

    template = rows.read(grid[:1, :0])
    leaves, structure = jax.tree.flatten(template)

    def global_array(i: int, leaf: Any) -> jax.Array:
        shape = (*grid.shape, *leaf.shape[2:])
        return jax.make_array_from_callback(
            shape, sharding, lambda index: jax.tree.leaves(rows_of(index or ()))[i]
        )

    arrays = [global_array(i, leaf) for i, leaf in enumerate(leaves)]
    return cast(Batch, jax.tree.unflatten(structure, arrays))
