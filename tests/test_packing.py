"""Packing loses nothing, doubles nothing, keeps to the caps, and leaves little empty."""

import collections
import dataclasses
import itertools

import jax
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from gram_jax.cutting import DoesNotFit, Piece, Unit, cut, split_example
from gram_jax.packing import PackCounts, _fill_at, pack
from gram_jax.pair import Pair
from gram_jax.rows import Example, RowShape, build_row, check_batch, stack_rows
from gram_jax.subset_sum import closest, largest, sums

VOCAB = tiny.VOCAB
SHAPE = RowShape(32, 24, 6, 4)
# Each cap by itself, and none: any one response and any pair of `examples` fits.
SHAPES = [SHAPE, RowShape(32, 32, 2, 1), RowShape(32, 24, 99, 2), RowShape(64, 24, 4, 99)]
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
            every = itertools.permutations(range(len(responses)), 2)
            chosen = [pair for pair in every if rng.random() < 0.3]
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
@given(examples(), st.sampled_from(SHAPES))
def test_every_response_comes_back_from_the_rows_with_its_prompt(given_examples, shape):
    found = collections.Counter()
    for packed in pack(given_examples, shape):
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
@given(examples(with_pairs=True), st.sampled_from(SHAPES))
def test_every_pair_is_there_once_with_both_its_responses_in_one_row(given_examples, shape):
    found = [pair for row in pack(given_examples, shape) for pair in pairs_in(row)]
    wanted = [
        (e.key, (p.a, p.b, *map(np.float32, (p.target, p.weight, p.margin))))
        for e in given_examples
        for p in e.pairs
    ]
    assert sorted(found) == sorted(wanted)


@bounded
@given(examples(), st.sampled_from(SHAPES))
def test_rows_keep_to_the_caps_and_the_counts_add_up(given_examples, shape):
    counts = PackCounts()
    rows = list(pack(given_examples, shape, counts=counts))
    for packed in rows:
        row = packed.batch
        lengths = {leaf.shape for leaf in (row.tokens, row.positions, row.segment_ids)}
        assert lengths == {(shape.tokens,)}
        assert row.targets.shape == row.sequence_ids.shape == (shape.targets,)
        assert row.pair_a.shape == (shape.pairs,)
        assert row.reference.shape == (shape.sequences,)
        assert len(packed.origins) <= shape.sequences
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
    own = sum(example.num_tokens(shape) for example in given_examples)
    assert counts.repeated_tokens == counts.tokens - own
    rows_of = collections.Counter(key for row in rows for key in {key for key, _ in row.origins})
    assert counts.spilled == sum(n > 1 for n in rows_of.values())
    assert (counts.repeated_tokens > 0) <= (counts.spilled > 0)


@bounded
@given(examples(), st.sampled_from(SHAPES))
def test_an_example_is_one_segment_of_a_row(given_examples, shape):
    """Its prompt is never twice in a row, and neither is a response."""
    for row in pack(given_examples, shape):
        assert row.batch.segment_ids.max() == len({key for key, _ in row.origins})
        assert len(set(row.origins)) == len(row.origins)


@bounded
@given(examples())
def test_packing_again_gives_the_same_rows(given_examples):
    one, two = (list(pack(iter(given_examples), SHAPE)) for _ in range(2))
    assert [r.origins for r in one] == [r.origins for r in two]
    for a, b in zip(one, two, strict=True):
        jax.tree.map(np.testing.assert_array_equal, a.batch, b.batch)


@bounded
@given(examples(), st.sampled_from(SHAPES))
def test_the_parts_of_an_example_fit_rows_and_hold_each_unit_once(given_examples, shape):
    for example in given_examples:
        parts = split_example(example, shape)
        for part in parts:
            check_batch(stack_rows([build_row([part], shape).batch]), VOCAB)
        pairs = [pair for part in parts for pair in part.pairs]
        assert collections.Counter(pairs) == collections.Counter(example.pairs)
        assert {i for part in parts for i in part.responses} == set(range(len(example.responses)))


@bounded
@given(st.lists(st.integers(1, 40), max_size=9), st.integers(1, 120))
def test_the_subset_sum_is_the_largest_that_fits(sizes, room):
    counted = collections.Counter(sizes)
    taken = closest(sorted(counted), counted, room)
    assert taken == sorted(taken, reverse=True)
    assert not collections.Counter(taken) - counted
    every = itertools.chain.from_iterable(
        itertools.combinations(sizes, n) for n in range(len(sizes) + 1)
    )
    assert sum(taken) == max(sum(some) for some in every if sum(some) <= room)


@bounded
@given(st.lists(st.integers(1, 40), max_size=9), st.integers(1, 120))
def test_the_sums_are_those_that_can_be_made(sizes, room):
    counted = collections.Counter(sizes)
    found = sums(sorted(counted), counted, room)
    every = {sum(some) for n in range(len(sizes) + 1) for some in itertools.combinations(sizes, n)}
    assert {n for n in range(room + 1) if found >> n & 1} == {n for n in every if n <= room}
    for less in range(room + 1):
        assert largest(found, less) == max(n for n in every if n <= less)


def test_a_subset_sum_over_very_many_sizes_is_still_exact():
    sizes = range(100, 1200)
    for room in range(1000, 1200):
        assert sum(closest(sizes, dict.fromkeys(sizes, 1), room)) == room


# Where an example is cut.


def example_of(prefix, lengths, pairs=(), key=0):
    responses = tuple(np.full(length, i + 1, np.int32) for i, length in enumerate(lengths))
    return Example(
        np.zeros(prefix + 1, np.int32), responses, tuple(Pair(*p) for p in pairs), key=key
    )


def counted(found, shape):
    counts = PackCounts()
    return list(pack(found, shape, counts=counts)), counts


def test_responses_with_many_pairs_among_them_stay_together():
    """Two groups of four, each response paired with all of its group, and listed in turns."""
    pairs = [(a, b) for a, b in itertools.combinations(range(8), 2) if a % 2 == b % 2]
    parts = split_example(example_of(4, [24] * 8, pairs), RowShape(100, 100, 8, 8))
    assert [set(part.responses) for part in parts] == [{0, 2, 4, 6}, {1, 3, 5, 7}]
    assert [part.tokens for part in parts] == [100, 100]


def test_a_chain_of_pairs_is_cut_in_runs():
    """A run of five responses holds four pairs; only the responses at the cuts are repeated."""
    chain = example_of(0, [10] * 13, [(i, i + 1) for i in range(12)])
    parts = split_example(chain, RowShape(50, 50, 9, 9))
    assert sorted(len(part.pairs) for part in parts) == [4, 4, 4]


def test_a_response_with_many_pairs_is_repeated_and_not_those_it_is_compared_with():
    star = example_of(2, [20] + [6] * 12, [(0, i) for i in range(1, 13)])
    parts = split_example(star, RowShape(40, 40, 9, 9))
    assert [len(part.pairs) for part in parts] == [3, 3, 3, 3]
    assert collections.Counter(i for part in parts for i in part.responses) == {
        0: 4
    } | dict.fromkeys(range(1, 13), 1)


def test_candidates_that_spill_repeat_the_prefix_and_are_counted():
    prompt = np.arange(1, 11, dtype=np.int32)
    responses = tuple(np.full(8, 20 + i, np.int32) for i in range(5))
    rows, counts = counted([Example(prompt, responses)], SHAPE)
    # 32 tokens: a prefix of 9 and two responses of 8; the fifth stands alone.
    assert sorted(len(r.origins) for r in rows) == [1, 2, 2]
    assert counts.spilled == 1
    assert counts.repeated_tokens == 2 * 9
    for packed in rows:
        np.testing.assert_array_equal(packed.batch.tokens[:9], prompt[:-1])


def test_candidates_are_chosen_to_fill_their_rows():
    lengths = [50, 49, 48, 47, 30, 30, 20, 20, 2, 2, 1, 1]
    parts = split_example(example_of(0, lengths), RowShape(100, 100, 12))
    assert [part.tokens for part in parts] == [100, 100, 100]


def test_the_caps_on_targets_sequences_and_pairs_end_a_row():
    prompt = np.array([1], np.int32)
    two = Example(prompt, (np.array([2], np.int32),) * 4, tuple(Pair(i, i + 1) for i in range(3)))
    for shape in (RowShape(32, 2, 6, 4), RowShape(32, 24, 2, 4), RowShape(32, 24, 6, 1)):
        assert len(split_example(two, shape)) == 3
        rows = list(pack([two, two], shape))
        assert len(rows) == 6
        check_batch(stack_rows([r.batch for r in rows]), VOCAB)
    assert len(list(pack([two, two], RowShape(32, 24, 8, 6)))) == 1


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


@bounded
@given(examples())
def test_what_a_cut_repeats_is_told_before_it_is_made(given_examples):
    for example in given_examples:
        paired = {i for pair in example.pairs for i in pair.members()}
        units = [Unit(pair.members(), pair) for pair in example.pairs]
        units += [Unit((i,), None) for i in range(len(example.responses)) if i not in paired]
        whole = Piece(1, example, units, SHAPE)
        assert bool(whole.shares()) == (len(units) > 1)
        for share in whole.shares():
            away, rest = whole.without(share.units)
            assert collections.Counter([*away.units, *rest.units]) == collections.Counter(units)
            assert away.tokens == share.tokens
            assert away.tokens + rest.tokens == whole.tokens + share.repeats


# How rows are filled.


def test_pieces_of_equal_length_leave_no_padding():
    rows, counts = counted([example_of(2, [6])] * 96, RowShape(32, 32))
    assert len(rows) == 24
    assert counts.padding == 0


def test_one_unit_is_split_off_where_it_fills_a_row_and_loses_least():
    shape = RowShape(100, 100, 8, 8)
    whole = example_of(10, [40, 40], [(0, 1)], key=0)  # 90 tokens in one unit: cannot give
    lone = example_of(4, [30, 30, 3, 3], [(0, 1), (2, 3)], key=1)  # can give its second pair
    star = example_of(4, [3, 3, 60], [(0, 1), (0, 2)], key=2)  # could, but would repeat 3 tokens
    rows, counts = counted([whole, star, lone], shape)
    assert (1, 2) in rows[0].origins
    assert counts.spilled == 1
    assert counts.repeated_tokens == 4
    assert sorted(row.batch.segment_ids.astype(bool).sum() for row in rows)[1:] == [70, 100]


def test_nothing_is_cut_where_it_saves_no_row():
    big, small = example_of(4, [43, 43], key=0), example_of(4, [30, 6], key=1)
    rows, counts = counted([big, small], RowShape(100, 100, 8))
    assert len(rows) == 2
    assert counts.spilled == 0


def test_more_examples_at_once_fill_rows_better():
    texts = tiny.text_examples(1, 640, 60)
    shape = RowShape(128, 128)
    apart = sum(len(list(pack(texts[i : i + 16], shape))) for i in range(0, 640, 16))
    assert len(list(pack(texts, shape))) < 0.95 * apart


def preferences(rng, count, length):
    """Groups like those of the shared preferences: GSM8K's short ones, AlpacaEval's large ones.

    Two responses that do not fit a row beside their prompt are cut as `preference_examples` does,
    so that one response may be there in several lengths.
    """
    found = []
    for key in range(count):
        if rng.random() < 0.66:
            prefix, size = rng.lognormal(4.2, 0.6), rng.integers(2, 5)
            whole = rng.lognormal(rng.normal(4.4, 0.6), 0.4, size)
        else:
            prefix, size = rng.lognormal(3.3, 0.9), int(np.clip(rng.lognormal(3.2, 0.7), 5, 80))
            whole = rng.lognormal(rng.normal(5.3, 0.8), 0.7, size)
        prefix, whole = int(min(prefix, length // 2 - 1)), whole.astype(int) + 2
        order = rng.permutation(size)
        pairs = {(int(order[i]), int(order[rng.integers(i)])) for i in range(1, size)}
        pairs |= {tuple(map(int, rng.choice(size, 2, replace=False))) for _ in range(size // 4)}
        room, places, ends = length - prefix, {}, []
        for a, b in sorted(pairs):
            keep = max(room // 2, room - whole[b]), max(room - room // 2, room - whole[a])
            cut = [(i, int(min(whole[i], k))) for i, k in zip((a, b), keep, strict=True)]
            ends.append([places.setdefault(response, len(places)) for response in cut])
        found.append(example_of(prefix, [n for _, n in places], ends, key=key))
    return found


def counts_of(found, shape):
    """They are complete with the first row."""
    counts = PackCounts()
    next(pack(found, shape, counts=counts))
    return counts


@pytest.mark.parametrize("length", [512, 1024, 2048, 4096])
def test_preferences_leave_at_most_one_percent_of_padding(length):
    # In rows so short nearly every pair is cut to fill one: that takes as many prompts as are real,
    # and leaves less to share.
    prompts, share = (1000, 0.93) if length == 512 else (300, 0.9)
    found = preferences(np.random.default_rng(0), prompts, length)
    caps = max(32, length // 16)
    counts = counts_of(found, RowShape(length, length, caps, caps))
    assert counts.rows > 150
    assert counts.padding <= 0.01
    # A pair by itself in a row is what is repeated at worst.
    alone = sum(
        len(e.prompt) - 1 + len(e.responses[p.a]) + len(e.responses[p.b])
        for e in found
        for p in e.pairs
    )
    assert counts.tokens < share * alone


def damaged(rng, count):
    """One response and damaged copies of it, as the quickstart has them: nothing is short."""
    found = []
    for key in range(count):
        prefix, size = int(rng.integers(20, 60)), int(rng.integers(40, 90))
        lengths = [size, *(size + rng.integers(-4, 5, rng.integers(2, 7)))]
        found.append(example_of(prefix, lengths, [(0, i) for i in range(1, len(lengths))], key))
    return found


def test_pairs_none_of_which_is_short_leave_at_most_one_percent_of_padding():
    found = damaged(np.random.default_rng(0), 1500)
    counts = counts_of(found, RowShape(512, 512, 16, 16))
    assert counts.padding <= 0.01
    own = sum(example.num_tokens(SHAPE) for example in found)
    assert counts.repeated_tokens <= 0.2 * own


def test_no_more_is_cut_than_padding_asks_for():
    """Where few cuts fill the rows, rows are as few as cuts at a high price make them."""
    found = preferences(np.random.default_rng(0), 300, 2048)
    shape = RowShape(2048, 2048, 128, 128)
    counts = counts_of(found, shape)
    assert counts.padding <= 0.01
    pieces = [piece for n, e in enumerate(found) for piece in cut(n, e, shape)]
    cheap = _fill_at(0.1, pieces, shape)
    assert sum(row.tokens for row in cheap) > counts.tokens
    assert counts.rows <= len(cheap)


def test_two_responses_to_a_prompt_leave_at_most_one_percent_of_padding():
    rng = np.random.default_rng(0)
    found = []
    for key in range(2000):
        prefix = int(min(rng.lognormal(3.2, 0.8), 500))
        lengths = rng.lognormal(rng.normal(5.8, 0.6), 0.7, 2).astype(int) + 2
        found.append(example_of(prefix, np.minimum(lengths, 1024 - prefix), key=key))
    counts = counts_of(found, RowShape(1024, 1024, 256))
    assert counts.padding <= 0.01
    own = sum(example.num_tokens(RowShape(1024, 1024, 256)) for example in found)
    assert counts.repeated_tokens <= 0.03 * own
