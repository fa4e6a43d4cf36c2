"""The ranges of a row's queries are its mask, and the blocks to visit hold every key seen."""

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from gram_jax.models.attention import FULL, row_mask, window_mask
from gram_jax.models.ranges import key_blocks, key_ranges, query_blocks
from gram_jax.packing import pack
from gram_jax.rows import RowShape, stack_rows

T = 64
bounded = settings(deadline=None, max_examples=100)


@st.composite
def random_rows(draw):
    """Two rows of T places: segments of a prefix (or none) and branches, then padding."""
    fields = np.zeros((3, 2, T), np.int32)
    for row in range(2):
        at, branches_of = 0, st.lists(st.integers(1, 20), min_size=1)
        examples = draw(st.lists(st.tuples(st.integers(0, 30), branches_of), max_size=6))
        for segment, (prefix, branches) in enumerate(examples, start=1):
            for branch, length in enumerate((prefix, *branches)):
                length = min(length, T - at)
                place = slice(at, at + length)
                first = prefix if branch else 0
                fields[0, row, place], fields[1, row, place] = segment, branch
                fields[2, row, place] = first + np.arange(length)
                at += length
    return tuple(map(jnp.asarray, fields))


def mask_of(segment, branch, position, window):
    return np.asarray(row_mask(segment, branch) & window_mask(position, window))


def seen(ranges):
    key = np.arange(T)
    start, end, own, place = (np.asarray(x)[:, :, None] for x in ranges)
    return ((key >= start) & (key < end)) | ((key >= own) & (key <= place))


@bounded
@given(random_rows(), st.sampled_from([1, 3, 8, 20, FULL]))
def test_ranges_are_the_mask(row, window):
    expected = mask_of(*row, window)
    np.testing.assert_array_equal(seen(key_ranges(*row, window)), expected)
    if window == FULL:
        np.testing.assert_array_equal(seen(key_ranges(*row[:2])), expected)


@bounded
@given(random_rows(), st.sampled_from([4, FULL]), st.sampled_from([(8, 8), (16, 4), (4, 16)]))
def test_key_blocks_hold_every_key_seen_and_none_twice(row, window, sizes):
    queries, keys = sizes
    mask = mask_of(*row, window)
    blocks = mask.reshape(2, T // queries, queries, T // keys, keys).any(axis=(2, 4))
    spans = [np.asarray(x) for x in key_blocks(key_ranges(*row, window), queries, keys)]
    for b, q in np.ndindex(2, T // queries):
        first, first_end, second, second_end = (int(x[b, q]) for x in spans)
        visited = [*range(first, first_end), *range(second, second_end)]
        assert len(visited) == len(set(visited))
        assert set(np.flatnonzero(blocks[b, q])) <= set(visited)


@bounded
@given(random_rows(), st.sampled_from([(8, 8), (16, 4), (4, 16)]))
def test_query_blocks_hold_every_query_that_sees_the_key(row, sizes):
    keys, queries = sizes
    mask = mask_of(*row, FULL)
    blocks = mask.reshape(2, T // queries, queries, T // keys, keys).any(axis=(2, 4))
    first, end = (np.asarray(x) for x in query_blocks(*row[:2], keys, queries))
    for b, k in np.ndindex(2, T // keys):
        assert set(np.flatnonzero(blocks[b, :, k])) <= set(range(first[b, k], end[b, k]))


def test_packed_rows_have_the_ranges_of_their_mask():
    packed = [p.batch for p in pack(tiny.preferences(1, 6), RowShape(T, T, 16, 16))]
    batch = stack_rows(packed)
    row = batch.segment_ids, batch.branch_ids
    np.testing.assert_array_equal(seen(key_ranges(*row)), np.asarray(row_mask(*row)))


def test_blocks_of_other_branches_are_not_visited():
    """A prefix of 16 and six branches of 8: in blocks of 8, a branch visits three."""
    branch = jnp.repeat(jnp.arange(7), jnp.array([16] + [8] * 6), total_repeat_length=T)[None]
    segment = jnp.ones_like(branch)
    spans = key_blocks(key_ranges(segment, branch), 8, 8)
    visited = (spans.first_end - spans.first) + (spans.second_end - spans.second)
    assert visited[0].tolist() == [1, 2, 3, 3, 3, 3, 3, 3]
    first, end = query_blocks(segment, branch, 8, 8)
    assert (end - first)[0].tolist() == [8, 7, 1, 1, 1, 1, 1, 1]


def test_a_window_needs_positions():
    ids = jnp.ones((1, T), jnp.int32)
    with pytest.raises(ValueError, match="positions"):
        key_ranges(ids, ids, window=4)
