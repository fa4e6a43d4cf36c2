"""Rows in the order of a run: row number = f(seed, position), read by whoever needs the row.

A run's place in its data is one integer, the number of rows consumed. Every epoch visits each row
once, in a new order; in a weighted mixture each source has epochs of its own. The order depends on
the seed and on nothing else: not on the number of devices or processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import grain
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gram_jax.data.rowset import Rows
from gram_jax.mesh import ROWS, place
from gram_jax.rows import Batch


class RowOrder:
    """Which row stands at each position of an endless run over sources of these sizes.

    Without ``weights`` all rows are shuffled together. With them, every stretch of positions has
    each source's share, and a source's rows come in epochs of that source.
    """

    def __init__(self, sizes: Sequence[int], seed: int, weights: Sequence[float] = ()):
        if not weights:
            self._order = _epochs(0, sum(sizes), seed)
            return
        starts = np.cumsum([0, *sizes])
        # Equal seeds would make the orders of sources of one size equal.
        seeds = np.random.SeedSequence(seed).generate_state(len(sizes))
        parts = [
            _epochs(int(start), size, int(part_seed))
            for start, size, part_seed in zip(starts[:-1], sizes, seeds, strict=True)
        ]
        self._order = grain.MapDataset.mix(parts, weights=list(weights))

    def numbers(self, position: int, count: int) -> np.ndarray:
        """Row numbers at ``position`` and the ``count - 1`` positions after it."""
        return np.array([self._order[i] for i in range(position, position + count)], np.int64)


def _epochs(start: int, size: int, seed: int) -> Any:
    return grain.MapDataset.range(start, start + size).seed(seed).shuffle().repeat()


def device_batch(rows: Rows, numbers: np.ndarray, parts: int, mesh: Mesh) -> Batch:
    """Rows as arrays [parts, rows per part, ...] split over the mesh.

    Each process reads only the rows that its devices hold.
    """
    grid = numbers.reshape(parts, -1)
    sharding = NamedSharding(mesh, P(None, ROWS))
    read: dict[tuple[int, int], Batch] = {}

    def rows_of(index: tuple[slice, ...]) -> Batch:
        # All fields of a batch ask for the same slices, and so do devices along other axes.
        start, stop, _ = index[1].indices(grid.shape[1])
        if (start, stop) not in read:
            read[start, stop] = rows.read(grid[:, start:stop])
        return read[start, stop]

    template = rows.read(grid[:1, :0])
    leaves, structure = jax.tree.flatten(template)

    def global_array(i: int, leaf: Any) -> jax.Array:
        shape = (*grid.shape, *leaf.shape[2:])
        return place(shape, sharding, lambda index: jax.tree.leaves(rows_of(index))[i])

    arrays = [global_array(i, leaf) for i, leaf in enumerate(leaves)]
    return cast(Batch, jax.tree.unflatten(structure, arrays))
