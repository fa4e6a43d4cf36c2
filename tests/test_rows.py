"""Packing loses nothing, doubles nothing, keeps to the caps, and its rows obey their own rules."""

import collections
import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from gram_jax.models.attention import row_mask, window_mask
from gram_jax.rows import (
    DoesNotFit,
    Example,
    PackCounts,
    Pair,
    RowShape,
    check_batch,
    empty_row,
    pack,
    split_example,
    stack_rows,
)

VOCAB = tiny.VOCAB
SHAPE = RowShape(32, 24, 6, 4)
bounded = settings(deadline=None, max_examples=60)


@st.composite
def examples(draw, with_pairs=None):
    """Examples of which any one response, and any pair, fits SHAPE."""
    found = []
    for key in range(draw(st.integers(1, 10))):
        rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
        prompt = tiny.ids(rng, 1, 8)
        responses = tuple(tiny.ids(rng, 1, 12) for _ in range(rng.integers(1, 8)))
        pairs = ()
        if draw(st.booleans()) if with_pairs is None else with_pairs:
            every = list(itertools.combinations(range(len(responses)), 2))
            chosen = [pair for pair in every if rng.random() < 0.5]
            pairs = tuple(
                Pair(a, b, float(rng.random()), float(0.1 + rng.random()), float(rng.random()))
                for a, b in chosen
            )
        reference = tuple(map(float, rng.random(len(responses)).astype(np.float32)))
        found.append(Example(prompt, responses, pairs, reference, key))
    return found


def sequences_in(packed):
    """(prompt, response, reference) of each sequence of a row, read from its arrays alone."""
    row, found = packed.batch, []
    for s in range(1, len(packed.origins) + 1):
        slots = np.flatnonzero(row.sequence_ids == s)
        places = row.target_index[slots]
        segment = row.segment_ids[places[0]]
        prefix = row.tokens[(row.segment_ids == segment) & (row.branch_ids == 0)]
        prompt = np.append(prefix, row.tokens[places[0]])
        np.testing.assert_array_equal(row.tokens[places[1:]], row.targets[slots][:-1])
        np.testing.assert_array_equal(
            row.positions[places], len(prompt) - 1 + np.arange(len(places))
        )
        np.testing.assert_array_equal(row.weights[slots], 1.0)
        found.append((prompt, row.targets[slots], row.reference[s - 1]))
    return found


def pairs_in(packed):
    row = packed.batch
    for p in np.flatnonzero(row.pair_weight):
        (key, a), (other, b) = (packed.origins[n[p] - 1] for n in (row.pair_a, row.pair_b))
        assert key == other
        yield key, (a, b, row.pair_target[p], row.pair_weight[p], row.pair_margin[p])


@bounded
@given(examples(), st.integers(1, 12))
def test_every_response_comes_back_from_the_rows_with_its_prompt(given_examples, window):
    found = collections.Counter()
    for packed in pack(given_examples, SHAPE, window=window):
        for origin, (prompt, response, reference) in zip(
            packed.origins, sequences_in(packed), strict=True
        ):
            example = given_examples[origin[0]]
            np.testing.assert_array_equal(prompt, example.prompt)
            np.testing.assert_array_equal(response, example.responses[origin[1]])
            assert reference == np.float32(example.reference[origin[1]])
            found[origin] += 1
    wanted = {(e.key, i) for e in given_examples for i in range(len(e.responses))}
    assert found.keys() == wanted
    for (key, response), times in found.items():
        paired = any(response in (p.a, p.b) for p in given_examples[key].pairs)
        assert times == 1 or paired


@bounded
@given(examples(with_pairs=True), st.integers(1, 12))
def test_every_pair_is_there_once_with_both_its_responses_in_one_row(given_examples, window):
    found = [pair for row in pack(given_examples, SHAPE, window=window) for pair in pairs_in(row)]
    wanted = [
        (e.key, (p.a, p.b, *map(np.float32, (p.target, p.weight, p.margin))))
        for e in given_examples
        for p in e.pairs
    ]
    assert sorted(found) == sorted(wanted)


@bounded
@given(examples(), st.integers(1, 12))
def test_rows_keep_to_the_caps_and_the_counts_add_up(given_examples, window):
    counts = PackCounts()
    rows = list(pack(given_examples, SHAPE, window=window, counts=counts))
    for packed in rows:
        row = packed.batch
        assert {leaf.shape for leaf in (row.tokens, row.positions, row.segment_ids)} == {(32,)}
        assert row.targets.shape == row.sequence_ids.shape == (24,)
        assert row.pair_a.shape == (4,)
        assert row.reference.shape == (6,)
        assert len(packed.origins) <= 6
    batch = stack_rows([packed.batch for packed in rows])
    check_batch(batch, VOCAB)
    assert counts.examples == len(given_examples)
    assert counts.rows == len(rows)
    assert counts.tokens == (batch.segment_ids != 0).sum()
    assert counts.places == batch.tokens.size
    assert counts.padding == pytest.approx((batch.segment_ids == 0).mean())
    assert counts.sequences == sum(len(packed.origins) for packed in rows)
    assert (
        counts.pairs == (batch.pair_weight != 0).sum() == sum(len(e.pairs) for e in given_examples)
    )
    own = sum(example.num_tokens() for example in given_examples)
    assert counts.repeated_tokens == counts.tokens - own
    parts = [len(split_example(example, SHAPE)) for example in given_examples]
    assert counts.spilled == sum(n > 1 for n in parts)
    assert counts.spilled == 0 or counts.repeated_tokens >= 0


@bounded
@given(examples(), st.integers(1, 12))
def test_packing_again_gives_the_same_rows(given_examples, window):
    one, two = (list(pack(given_examples, SHAPE, window=window)) for _ in range(2))
    assert [r.origins for r in one] == [r.origins for r in two]
    for a, b in zip(one, two, strict=True):
        jax.tree.map(np.testing.assert_array_equal, a.batch, b.batch)


def test_candidates_that_spill_repeat_the_prefix_and_are_counted():
    prompt = np.arange(1, 11, dtype=np.int32)
    responses = tuple(np.full(8, 20 + i, np.int32) for i in range(5))
    counts = PackCounts()
    rows = list(pack([Example(prompt, responses)], SHAPE, counts=counts))
    # 32 tokens: a prefix of 9 and two responses of 8; the fifth stands alone.
    assert sorted(len(r.origins) for r in rows) == [1, 2, 2]
    assert counts.spilled == 1
    assert counts.repeated_tokens == 2 * 9
    for packed in rows:
        np.testing.assert_array_equal(packed.batch.tokens[:9], prompt[:-1])


def test_the_caps_on_targets_sequences_and_pairs_end_a_row():
    prompt = np.array([1], np.int32)
    two = Example(prompt, (np.array([2], np.int32),) * 4, tuple(Pair(i, i + 1) for i in range(3)))
    for shape in (RowShape(32, 2, 6, 4), RowShape(32, 24, 2, 4), RowShape(32, 24, 6, 1)):
        assert len(split_example(two, shape)) == 3
        rows = list(pack([two, two], shape))
        assert len(rows) == 6
        check_batch(stack_rows([r.batch for r in rows]), VOCAB)
    assert len(list(pack([two, two], RowShape(32, 24, 8, 6)))) == 1


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


def test_what_is_too_long_for_a_row_is_named():
    prompt, long = np.arange(10, dtype=np.int32), np.arange(24, dtype=np.int32)
    with pytest.raises(DoesNotFit, match=r"33 tokens \(prompt 10, responses \[24\]\)"):
        list(pack([Example(prompt, (long,))], SHAPE))
    both = Example(prompt, (long[:12], long[:12]), (Pair(0, 1),))
    with pytest.raises(DoesNotFit, match=r"33 tokens .*\[12, 12\]"):
        split_example(both, SHAPE)
    apart = dataclasses.replace(both, pairs=())
    assert len(split_example(apart, SHAPE)) == 2
    with pytest.raises(DoesNotFit):  # text rows have no room for a pair
        split_example(dataclasses.replace(both, prompt=prompt[:1]), RowShape(32, 24))


def test_pieces_of_equal_length_leave_no_padding():
    counts = PackCounts()
    prompt, response = np.zeros(3, np.int32), np.zeros(6, np.int32)
    list(pack([Example(prompt, (response,))] * 96, RowShape(32, 32), counts=counts))
    assert counts.rows == 24
    assert counts.padding == 0


def test_texts_of_mixed_lengths_leave_little_padding():
    counts = PackCounts()
    list(pack(tiny.text_examples(1, 2000, 60), RowShape(128, 128), window=256, counts=counts))
    assert counts.rows > 400
    assert counts.padding < 0.01


@pytest.mark.parametrize("window", [1, 7, 64])
def test_an_example_waits_for_at_most_two_windows(window):
    read = 0

    def stream():
        nonlocal read
        for example in tiny.text_examples(2, 300, 50):
            read += 1
            yield example

    ahead = []
    for packed in pack(stream(), RowShape(64, 64), window=window):
        first = min(key for key, _ in packed.origins)
        ahead.append(read - first)
        assert read <= (first // window + 2) * window
    assert max(ahead) > window // 2


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
