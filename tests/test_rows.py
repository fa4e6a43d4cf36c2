"""Rows obey their own rules, and a row that does not is named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from gram_jax.models.attention import row_mask, window_mask
from gram_jax.packing import pack
from gram_jax.rows import Example, RowShape, check_batch, empty_row, stack_rows

VOCAB = tiny.VOCAB
SHAPE = RowShape(32, 24, 6, 4)
bounded = settings(deadline=None, max_examples=60)


def test_text_rows_have_no_sequences_and_no_pairs():
    (packed, *_), shape = list(pack(tiny.text_examples(0, 8, 20), RowShape(64, 64))), (64,)
    row = packed.batch
    assert row.sequence_ids is row.pair_a is row.reference is None
    assert row.targets.shape == shape
    check_batch(stack_rows([row]), VOCAB)
    live = np.flatnonzero(row.weights)
    inner = np.diff(row.target_index[live], append=0) == 1
    inner &= np.append(np.diff(row.segment_ids[row.target_index[live]]) == 0, False)
    assert inner.any()
    np.testing.assert_array_equal(
        row.tokens[row.target_index[live][inner] + 1], row.targets[live][inner]
    )


def allowed(segment, branch, i, j):
    """The rule of method and design, in words: query i sees key j."""
    return j <= i and segment[i] == segment[j] != 0 and branch[j] in (0, branch[i])


@bounded
@given(st.data())
def test_the_mask_is_the_rule(data):
    segment, branch = (
        np.array(data.draw(st.lists(st.integers(0, 3), min_size=20, max_size=20)), np.int32)
        for _ in range(2)
    )
    mask = np.asarray(row_mask(jnp.asarray(segment[None]), jnp.asarray(branch[None])))[0]
    brute = [[allowed(segment, branch, i, j) for j in range(20)] for i in range(20)]
    np.testing.assert_array_equal(mask, brute)


def test_a_token_of_a_packed_row_sees_its_prompt_and_its_own_response_only():
    (packed,) = pack(tiny.preferences(3, 3), RowShape(128, 128, 16, 16))
    row = jax.tree.map(lambda leaf: leaf[None], packed.batch)
    mask = np.asarray(row_mask(row.segment_ids, row.branch_ids))[0]
    for place in np.flatnonzero(packed.batch.segment_ids):
        seen = np.flatnonzero(mask[place])
        # Exactly one key per position from 0 to its own.
        assert packed.batch.positions[seen].tolist() == list(
            range(packed.batch.positions[place] + 1)
        )
        # In at most two contiguous ranges.
        assert (np.diff(seen) > 1).sum() <= 1


def test_a_window_counts_positions_not_places():
    positions = np.array([[0, 1, 2, 3, 4, 3, 4]], np.int32)  # prefix 0..2, two branches
    seen = np.asarray(window_mask(jnp.asarray(positions), 3))[0]
    np.testing.assert_array_equal(seen, positions[0][:, None] - positions[0][None] < 3)
    assert seen[6, 2]
    assert not seen[6, 1]


GOOD = next(iter(pack(tiny.preferences(5, 3, reference=True), RowShape(160, 120, 16, 16)))).batch
USED = int((GOOD.segment_ids != 0).sum())
SECOND = int(np.flatnonzero(GOOD.segment_ids == 2)[0])
PREFIX = int((GOOD.branch_ids[GOOD.segment_ids == 2] == 0).sum())
BRANCH = SECOND + PREFIX  # the first place of segment 2's first branch
LAST = int(np.flatnonzero(GOOD.weights)[-1])
CORRUPTIONS = {
    "tokens outside": ("tokens", 3, VOCAB, "tokens has ids outside"),
    "tokens negative": ("tokens", 3, -1, "tokens has ids outside"),
    "targets outside": ("targets", 3, VOCAB, "targets has ids outside"),
    "hole": ("segment_ids", SECOND, 0, "segment_ids must count"),
    "segments fall": ("segment_ids", SECOND + 1, 1, "segment_ids must count"),
    "a segment is skipped": ("segment_ids", slice(SECOND, USED), 5, "segment_ids skips 2"),
    "branches fall": ("branch_ids", BRANCH, 3, "segment 2: branch_ids must run"),
    "branch is skipped": ("branch_ids", slice(BRANCH, USED), 7, "segment 2: branch_ids must run"),
    "no branch": (
        "branch_ids",
        slice(SECOND, SECOND + int((GOOD.segment_ids == 2).sum())),
        0,
        "segment 2: branch_ids must run",
    ),
    "prefix positions": ("positions", SECOND, 1, "segment 2: positions of the prefix"),
    "branch positions": ("positions", BRANCH, PREFIX + 1, "segment 2 branch 1: positions must go"),
    "target in padding": ("target_index", 0, USED, "target_index points into the padding"),
    "target before the row": ("target_index", 0, -1, "target_index points into the padding"),
    "two targets": ("target_index", 1, int(GOOD.target_index[0]), "target_index: one place"),
    "target in prefix": ("target_index", LAST, SECOND, "target_index points into a shared prefix"),
    "sequence without weight": ("weights", 0, 0.0, "sequence_ids and weights disagree"),
    "weight without sequence": ("sequence_ids", LAST, 0, "sequence_ids and weights disagree"),
    "other target": ("targets", 0, (int(GOOD.targets[0]) + 1) % VOCAB, "targets: the token after"),
    "pair_a not there": ("pair_a", 0, 16, "pair_a names a sequence"),
    "pair_b negative": ("pair_b", 0, -1, "pair_b names a sequence"),
    "pair_target above 1": ("pair_target", 0, 1.5, "pair_target must be in"),
    "pair_target below 0": ("pair_target", 0, -0.5, "pair_target must be in"),
}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corrupted_row_is_named_with_its_field(name):
    field, place, value, message = CORRUPTIONS[name]
    assert PREFIX > 1
    bad = jax.tree.map(np.copy, GOOD)
    getattr(bad, field)[place] = value
    with pytest.raises(ValueError, match="row 1: .*" + message):
        check_batch(stack_rows([GOOD, bad]), VOCAB)


def test_branches_must_begin_with_the_first():
    (packed,) = pack([Example(np.array([1], np.int32), (np.array([2, 3], np.int32),))], SHAPE)
    check_batch(stack_rows([packed.batch]), VOCAB)
    packed.batch.branch_ids[:2] = 2
    with pytest.raises(ValueError, match="segment 1: branch_ids must run"):
        check_batch(stack_rows([packed.batch]), VOCAB)


def test_good_rows_and_rows_of_padding_pass():
    padding = empty_row(RowShape(160, 120, 16, 16), reference=True)
    check_batch(stack_rows([GOOD, padding]), VOCAB)
