"""Text fills its rows; documents are cut only for that, and no token is lost or doubled."""

import collections

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gram_jax.cutting import DoesNotFit
from gram_jax.packing import PackCounts
from gram_jax.rows import Example, RowShape, check_batch, stack_rows
from gram_jax.text_packing import pack_texts

bounded = settings(deadline=None, max_examples=60)


def documents(seed, count, longest, prompt=1):
    """Documents whose tokens all differ, so that each says where it comes from."""
    rng = np.random.default_rng(seed)
    found, at = [], 0
    for key in range(count):
        size = prompt + int(rng.integers(1, longest + 1))
        ids = np.arange(at, at + size, dtype=np.int32)
        found.append(Example(ids[:prompt], (ids[prompt:],), key=key))
        at += size
    return found


def packed(found, shape):
    counts = PackCounts()
    return list(pack_texts(found, shape, counts=counts)), counts


@bounded
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 40),
    st.sampled_from([(RowShape(32, 32), 1), (RowShape(32, 24), 1), (RowShape(32, 28), 4)]),
)
def test_every_token_is_predicted_once_from_the_one_before_it(seed, count, case):
    shape, prompt = case
    found = documents(seed, count, 24, prompt)
    rows, counts = packed(found, shape)
    predicted = []
    for row in (row.batch for row in rows):
        check_batch(stack_rows([row]), 2**31)
        live = np.flatnonzero(row.weights)
        # Tokens count up within a document: what is read is always the token before the target.
        np.testing.assert_array_equal(row.tokens[row.target_index[live]] + 1, row.targets[live])
        predicted += row.targets[live].tolist()
    assert sorted(predicted) == sorted(int(i) for d in found for i in d.responses[0])
    tokens = sum(int((row.batch.segment_ids != 0).sum()) for row in rows)
    assert (counts.examples, counts.rows, counts.tokens) == (count, len(rows), tokens)
    assert counts.places == len(rows) * shape.tokens
    assert counts.sequences == sum(len(row.origins) for row in rows)
    parts = collections.Counter(origin for row in rows for origin in row.origins)
    assert counts.spilled == sum(n > 1 for n in parts.values())
    assert counts.repeated_tokens == counts.pairs == 0


def test_documents_that_fill_rows_whole_are_not_cut():
    found = [Example(np.zeros(1, np.int32), (np.ones(n, np.int32),)) for n in (60, 40) * 50]
    rows, counts = packed(found, RowShape(100, 100))
    assert (len(rows), counts.spilled, counts.padding) == (50, 0, 0.0)


def test_where_no_sum_comes_near_the_longest_document_is_cut():
    found = [Example(np.zeros(1, np.int32), (np.ones(n, np.int32),), key=n) for n in (80, 70, 60)]
    rows, counts = packed(found, RowShape(100, 100))
    # 20 places beside 80: the first 20 of 70. What is left then fits in two rows as it is.
    assert [[key for key, _ in row.origins] for row in rows] == [[80, 70], [60], [70]]
    assert counts.spilled == 1


def as_it_comes(rng, count, length):
    """Many short documents, and long ones in pieces of a full row and a rest."""
    found = []
    for size in rng.lognormal(5.5, 1.5, count).astype(int) + 20:
        pieces = [length] * (size // length) + [size % length or length]
        found += [Example(np.zeros(1, np.int32), (np.ones(n, np.int32),)) for n in pieces]
    return found


@pytest.mark.parametrize("length", [128, 256, 512, 1024, 4096])
def test_text_leaves_at_most_half_a_percent_of_padding(length):
    found = as_it_comes(np.random.default_rng(0), 4000, length)
    _, counts = packed(found, RowShape(length, length))
    assert counts.rows > 400
    assert counts.padding <= 0.005
    assert counts.spilled <= 0.05 * len(found)


def test_packing_again_gives_the_same_rows():
    one, two = (packed(documents(3, 200, 40), RowShape(64, 64))[0] for _ in range(2))
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a.batch.tokens, b.batch.tokens)


def test_a_document_longer_than_a_row_is_named():
    long = Example(np.zeros(1, np.int32), (np.ones(40, np.int32),))
    with pytest.raises(DoesNotFit, match="a document of 40 tokens"):
        packed([long], RowShape(32, 32))
