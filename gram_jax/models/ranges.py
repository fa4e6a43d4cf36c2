"""What a query of a row sees, as two ranges of keys instead of a [T, T] mask.

A segment is its prefix, then branch after branch (gram_jax/rows.py). So query i of a branch sees
the keys at places [prefix_start, prefix_end) and [branch_start, i], and a query of a prefix sees
[branch_start, i]: three integers a query. A sliding window only moves the starts, because positions
count on by one within the prefix and within each branch.

Kernels visit blocks of places. `key_blocks` and `query_blocks` say which, so that what
the mask rules out costs nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_FAR = np.int32(2**31 - 1)
"""Behind every place."""


class KeyRanges(NamedTuple):
    """int32 [B, T] each: a query sees keys [prefix_start, prefix_end) and [branch_start, place].

    A query of padding sees nothing: its branch_start lies behind its place.
    """

    prefix_start: jax.Array
    prefix_end: jax.Array
    branch_start: jax.Array
    place: jax.Array  # the query's own


class Spans(NamedTuple):
    """int32 [B, T / block] each: blocks to visit are [first, first_end) and [second, second_end).

    They do not overlap.
    """

    first: jax.Array
    first_end: jax.Array
    second: jax.Array
    second_end: jax.Array


def key_ranges(
    segment_ids: jax.Array,
    branch_ids: jax.Array,
    positions: jax.Array | None = None,
    window: jax.Array | int | None = None,
) -> KeyRanges:
    """The ranges of each query of rows that keep the layout's rules.

    Args:
      segment_ids, branch_ids: int32 [B, T].
      positions: int32 [B, T]; needed with a window only.
      window: keys at positions above p - window are seen by a query at position p; None = all.
    """
    t = segment_ids.shape[1]
    place = jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32), segment_ids.shape)
    new_segment = _changes(segment_ids)
    new_run = new_segment | _changes(branch_ids)
    # The first place of a segment's first branch is where its prefix ends.
    branches_begin = new_run & (branch_ids != 0) & (new_segment | (_before(branch_ids) == 0))
    live, in_branch = segment_ids != 0, (segment_ids != 0) & (branch_ids != 0)
    segment_start = _latest(place, new_segment)
    prefix_end = jnp.where(in_branch, _latest(place, branches_begin), segment_start)
    prefix_start, branch_start = segment_start, _latest(place, new_run)
    if window is not None:
        if positions is None:
            raise ValueError("a window needs positions")
        # place - segment_start is the position of a key of the prefix; window may be the largest
        # int32, so nothing is added to it.
        prefix_start = prefix_start + jnp.maximum(positions - window + 1, 0)
        prefix_start = jnp.minimum(prefix_start, prefix_end)
        branch_start = jnp.maximum(branch_start, place - window + 1)
    return KeyRanges(
        jnp.where(live, prefix_start, 0),
        jnp.where(live, prefix_end, 0),
        jnp.where(live, branch_start, t),
        place,
    )


def key_blocks(ranges: KeyRanges, queries: int, keys: int) -> Spans:
    """Blocks of ``keys`` keys that each block of ``queries`` queries must visit, in order.

    ``queries`` divides the number of queries. Blocks outside the two spans hold keys that none of
    a block's queries sees.
    """

    def span(there: jax.Array, start: jax.Array, end: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The blocks from the first start to the last end; 0 and 0 if nothing is there."""
        first = _by_block(jnp.where(there, start, _FAR), queries).min(axis=-1)
        last = _by_block(jnp.where(there, end, 0), queries).max(axis=-1)
        return jnp.where(first < _FAR, first // keys, 0), -(-last // keys)

    prefix = ranges.prefix_start < ranges.prefix_end
    first, first_end = span(prefix, ranges.prefix_start, ranges.prefix_end)
    live = ranges.branch_start <= ranges.place
    second, second_end = span(live, ranges.branch_start, ranges.place + 1)
    # Spans that touch are one.
    one = first_end >= second
    return Spans(
        jnp.where(one, 0, first),
        jnp.where(one, 0, first_end),
        jnp.where(one, jnp.minimum(first, second), second),
        second_end,
    )


def query_blocks(
    segment_ids: jax.Array, branch_ids: jax.Array, keys: int, queries: int
) -> tuple[jax.Array, jax.Array]:
    """Blocks of ``queries`` queries that see a key of each block of ``keys``: [first, end).

    int32 [B, T / keys] each. A key of a prefix is seen to the end of its segment, a key of a branch
    to the end of that branch. Windows are not looked at: a block too many is masked.
    """
    t = segment_ids.shape[1]
    place = jnp.broadcast_to(jnp.arange(1, t + 1, dtype=jnp.int32), segment_ids.shape)
    last_of_segment = _changes(segment_ids[:, ::-1])[:, ::-1]
    last_of_run = last_of_segment | _changes(branch_ids[:, ::-1])[:, ::-1]
    end = jnp.where(branch_ids == 0, _next(place, last_of_segment), _next(place, last_of_run))
    end = _by_block(jnp.where(segment_ids != 0, end, 0), keys).max(axis=-1)
    first = jnp.arange(0, t, keys, dtype=jnp.int32) // queries
    return jnp.broadcast_to(first, end.shape), -(-end // queries)


def _before(ids: jax.Array) -> jax.Array:
    return jnp.concatenate((ids[:, :1], ids[:, :-1]), axis=1)


def _changes(ids: jax.Array) -> jax.Array:
    """Where an id is not that of the place before; the first place is."""
    return (ids != _before(ids)).at[:, 0].set(True)


def _latest(place: jax.Array, marked: jax.Array) -> jax.Array:
    """The last marked place up to each place."""
    return jax.lax.cummax(jnp.where(marked, place, 0), axis=1)


def _next(place: jax.Array, marked: jax.Array) -> jax.Array:
    """The first marked place from each place on; the last place is marked."""
    return jax.lax.cummin(jnp.where(marked, place, _FAR), axis=1, reverse=True)


def _by_block(x: jax.Array, block: int) -> jax.Array:
    """[B, T] -> [B, T / block, block]."""
    return x.reshape(x.shape[0], -1, block)
