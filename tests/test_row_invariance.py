"""A candidate's log-prob is that of prompt + response run alone, whatever else is in its row."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import tiny

from gram_jax.packing import pack
from gram_jax.readouts import likelihood, token_logprobs
from gram_jax.rows import Example, RowShape, check_batch, empty_row, stack_rows

T, M, S = 96, 80, 16
SHAPE = RowShape(T, M, S)
EOS = PAD = 2  # the same id, as many tokenizers have it
MODELS = {
    "full attention": tiny.config(num_layers=3),
    # Both windows are smaller than the longer prompts.
    "windows": tiny.config(num_layers=3, windows=(5, 0, 8), qk_norm=True),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return tiny.decoder(MODELS[request.param], seed=1)


@functools.partial(jax.jit, static_argnames="sequences")
def scores(model, batch, sequences):
    return likelihood(
        token_logprobs(model, batch, model(batch)).logprob, batch.sequence_ids, sequences
    )


def plain_row(prompt, response):
    """Prompt + response as anyone would lay it out: positions 0, 1, ..., no shared prefix."""
    n, m = len(prompt) + len(response) - 1, len(response)
    row = empty_row(SHAPE)
    row.tokens[:n] = np.concatenate((prompt, response))[:-1]
    row.positions[:n] = np.arange(n)
    row.segment_ids[:n] = row.branch_ids[:n] = 1
    row.target_index[:m] = len(prompt) - 1 + np.arange(m)
    row.targets[:m] = response
    row.weights[:m] = row.sequence_ids[:m] = 1
    return row


def example(key, prompt_length, *response_lengths):
    rng = np.random.default_rng(100 + key)
    prompt = tiny.ids(rng, prompt_length, prompt_length)
    return Example(prompt, tuple(tiny.ids(rng, n, n) for n in response_lengths), key=key)


def with_eos(one):
    """Ends each response with EOS and puts another in the middle of the first."""
    responses = [np.append(response, np.int32(EOS)) for response in one.responses]
    responses[0][len(responses[0]) // 2] = EOS
    return dataclasses.replace(one, responses=tuple(responses))


EXAMPLES = [
    with_eos(example(0, 20, 6, 9, 1)),
    example(1, 1, 12, 1, 7),  # a prompt of one token: no prefix
    example(2, 7, 15),
    with_eos(example(3, 2, 4, 4, 4, 4)),
    example(4, 30, 5, 8),
    example(5, 12, 20, 3),
    example(6, 1, 1),
]


@pytest.fixture(scope="module")
def alone(model):
    """{(key, response): log-prob} of each candidate by itself."""
    found = {}
    for one in EXAMPLES:
        for i, response in enumerate(one.responses):
            batch = stack_rows([plain_row(one.prompt, response)])
            found[one.key, i] = float(scores(model, batch, S).score[0, 0])
    return found


def packed(examples):
    return list(pack(examples, SHAPE))


def scored(model, rows):
    """{(key, response): log-prob} of rows, one at a time."""
    found = {}
    for row in rows:
        got = np.asarray(scores(model, stack_rows([row.batch]), S).score[0])
        found |= dict(zip(row.origins, map(float, got), strict=False))
    return found


def check(found, alone, names=None):
    """Every score equals that of the candidate alone: |ds| <= 1e-5 max(1, |s|)."""
    names = names or {place: place for place in found}
    for place, value in found.items():
        expected = alone[names[place]]
        assert abs(value - expected) <= 1e-5 * max(1, abs(expected)), place


def test_each_example_by_itself(model, alone):
    found = {}
    for one in EXAMPLES:
        found |= scored(model, packed([one]))
    assert found.keys() == alone.keys()
    check(found, alone)


def test_among_neighbours(model, alone):
    rows = packed(EXAMPLES)
    assert max(len({key for key, _ in row.origins}) for row in rows) > 2
    found = scored(model, rows)
    assert found.keys() == alone.keys()
    check(found, alone)


@pytest.mark.parametrize("seed", range(3))
def test_in_any_order_of_examples_and_of_candidates(model, alone, seed):
    rng = np.random.default_rng(seed)
    shuffled, names = [], {}
    for one in rng.permutation(np.array(EXAMPLES, object)):
        order = rng.permutation(len(one.responses))
        responses = tuple(one.responses[i] for i in order)
        shuffled.append(dataclasses.replace(one, responses=responses))
        names |= {(one.key, new): (one.key, int(old)) for new, old in enumerate(order)}
    check(scored(model, packed(shuffled)), alone, names)


@pytest.mark.parametrize("before", [1, 17, 40])
def test_at_any_place_in_the_row(model, alone, before):
    """A filler of ``before`` tokens stands in front."""
    one, filler = EXAMPLES[0], example(9, 1, before)
    (part,), (first,) = packed([one]), packed([filler])
    row, shift = jax.tree.map(np.copy, part.batch), before
    for name in ("tokens", "positions", "segment_ids", "branch_ids"):
        getattr(row, name)[shift:] = getattr(part.batch, name)[:-shift]
        getattr(row, name)[:shift] = getattr(first.batch, name)[:shift]
    row.segment_ids[shift:] += row.segment_ids[shift:] != 0
    row.target_index[row.weights != 0] += shift
    got = np.asarray(scores(model, stack_rows([row]), S).score[0])
    check(dict(zip(part.origins, map(float, got), strict=False)), alone)


def garbage(row, seed):
    """The same row with other ids, positions and branches in its padding and unused slots."""
    rng = np.random.default_rng(seed)
    row = jax.tree.map(np.copy, row)
    padding, unused = row.segment_ids == 0, row.weights == 0
    for array, where, high in (
        (row.tokens, padding, tiny.VOCAB),
        (row.positions, padding, 5000),
        (row.branch_ids, padding, 4),
        (row.targets, unused, tiny.VOCAB),
        (row.target_index, unused, T),
    ):
        array[where] = rng.integers(0, high, where.sum())
    return row


@pytest.mark.parametrize("seed", range(3))
def test_with_anything_in_the_padding(model, alone, seed):
    rows = packed(EXAMPLES[:4]) + packed(EXAMPLES[4:])
    assert sum((row.batch.segment_ids == 0).sum() for row in rows) > 50
    for row in rows:
        filled = dataclasses.replace(row, batch=garbage(row.batch, seed))
        check(scored(model, [filled]), alone)


def test_with_the_pad_token_being_the_end_token(model, alone):
    for row in packed(EXAMPLES):
        padded = jax.tree.map(np.copy, row.batch)
        padded.tokens[padded.segment_ids == 0] = PAD
        check(scored(model, [dataclasses.replace(row, batch=padded)]), alone)
    assert sum((r == EOS).sum() > 1 for one in EXAMPLES for r in one.responses) >= 2


def test_beside_other_rows_and_rows_of_padding(model, alone):
    rows = packed(EXAMPLES)
    batch = stack_rows([empty_row(SHAPE), *(row.batch for row in rows), empty_row(SHAPE)])
    check_batch(batch, tiny.VOCAB)
    got = scores(model, batch, S)
    assert np.isfinite(got.score).all()
    np.testing.assert_array_equal(got.num_tokens[0], 0)
    np.testing.assert_array_equal(got.score[-1], 0)
    for row, values, counts in zip(rows, got.score[1:-1], got.num_tokens[1:-1], strict=True):
        found = dict(zip(row.origins, map(float, values), strict=False))
        check(found, alone)
        lengths = [len(EXAMPLES[key].responses[i]) for key, i in row.origins]
        assert counts[: len(lengths)].tolist() == lengths


def test_the_windows_of_these_models_make_a_difference():
    """They are shorter than the prompt: without them its scores are others."""
    row = stack_rows([plain_row(EXAMPLES[4].prompt, EXAMPLES[4].responses[0])])
    windows = MODELS["windows"]
    with_and_without = [
        float(scores(tiny.decoder(one, seed=1), row, S).score[0, 0])
        for one in (windows, dataclasses.replace(windows, windows=(0, 0, 0)))
    ]
    assert abs(np.subtract(*with_and_without)) > 0.01
