"""The engine: scores are those of transformers run alone, whatever lies around a sequence."""

import dataclasses
import itertools
import random
import re

import jax
import numpy as np
import peer_models
import pytest
import tiny
import torch
from jax.extend.core import ClosedJaxpr, Jaxpr

from gram_jax import hf
from gram_jax.config import ComputeConfig, MeshConfig
from gram_jax.data.builtin import reference_topics
from gram_jax.data.prompts import encode_candidates
from gram_jax.data.tokenizer import EOS, Tokenizer
from gram_jax.mesh import make_mesh
from gram_jax.packing import PackCounts, pack
from gram_jax.readouts import Readout
from gram_jax.rows import Example, stack_rows
from gram_jax.scoring import (
    BatchShape,
    EngineCounts,
    RowBatch,
    Running,
    _assemble,
    batch_shapes,
    doubling,
    score_batches,
    score_examples,
    score_rows,
    scoring_shape,
)

SIZES = {
    "vocab_size": 400,
    "hidden_size": 64,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
SHAPE = scoring_shape(256)


@pytest.fixture(scope="module")
def english():
    return [" ".join(topic.text.split()) for topic in reference_topics()][:24]


@pytest.fixture(scope="module")
def tokenizer(english):
    return Tokenizer.train(english, 400)


@pytest.fixture(scope="module")
def peer():
    torch.set_num_threads(1)
    return peer_models.build("Llama", SIZES, seed=3)


@pytest.fixture(scope="module")
def model(peer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("peer")
    peer.save_pretrained(folder)
    return hf.load(folder, ComputeConfig(), None)[0]


@pytest.fixture(scope="module")
def examples(english, tokenizer):
    """Prompts and one to four responses of English text; one response has EOS in its middle."""
    dice, found = random.Random(0), []
    for key, text in enumerate(english):
        at = dice.randrange(20, 120)
        starts = [dice.randrange(len(text)) for _ in range(dice.randrange(1, 5))]
        responses = [text[at : at + 60]] + [text[s : s + dice.randrange(5, 150)] for s in starts]
        if key == 7:
            responses.append(f"an end {EOS} and more {EOS}")
        prompt, ids = encode_candidates(text[:at], [r for r in responses if r], tokenizer)
        found.append(Example(prompt, tuple(ids), key=key))
    return found


@pytest.fixture(scope="module")
def expected(peer, examples):
    """transformers on prompt + response alone: {(key, response): log-probs of its tokens}."""
    found = {}
    for example in examples:
        for i, response in enumerate(example.responses):
            ids = torch.tensor(np.concatenate((example.prompt, response)), dtype=torch.long)
            with torch.inference_mode():
                logits = peer(ids[None, :-1]).logits[0, len(example.prompt) - 1 :]
            logprobs = torch.log_softmax(logits, -1)[range(len(response)), response.tolist()]
            found[example.key, i] = logprobs.numpy()
    return found


@pytest.fixture(scope="module")
def alone(model, examples):
    """Our own scores, each candidate in a batch of its own."""
    found = {}
    for example in examples:
        for i, response in enumerate(example.responses):
            single = Example(example.prompt, (response,), key=example.key)
            (score,) = score_examples(model, [single], SHAPE, 1)
            found[example.key, i] = score.score
    return found


def close(a, b, tolerance):
    return abs(a - b) <= tolerance * max(1, abs(b))


def scores_of(found):
    return {(score.key, score.response): score.score for score in found}


def check_alike(found, alone):
    assert found.keys() == alone.keys()
    for place, value in found.items():
        assert close(value, alone[place], 1e-5), place


def test_scores_are_those_of_transformers_run_alone(model, examples, expected):
    found = list(score_examples(model, examples, SHAPE, 4, per_token=True))
    assert {(s.key, s.response) for s in found} == expected.keys()
    assert len(found) == len(expected)
    for score in found:
        peer_logprobs = expected[score.key, score.response]
        assert score.num_tokens == len(peer_logprobs)
        assert close(score.score, peer_logprobs.sum(), 1e-4)
        np.testing.assert_allclose(score.token_logprobs, peer_logprobs, rtol=1e-4, atol=1e-4)


def test_what_the_peer_writes_greedily_is_called_greedy(model, peer, examples):
    prompt = torch.tensor(examples[0].prompt[None], dtype=torch.long)
    with torch.inference_mode():
        written = peer.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None)
    greedy = written[0, prompt.shape[1] :].numpy().astype(np.int32)
    other = greedy.copy()
    other[5] = (other[5] + 1) % 400
    example = Example(examples[0].prompt, (greedy, other, greedy[:3]), key=0)
    found = score_examples(model, [example], SHAPE, 1, per_token=True)
    assert {score.response: score.greedy for score in found} == {0: True, 1: False, 2: True}


@pytest.mark.parametrize(("row_length", "batch_rows"), [(256, 1), (256, 3), (400, 4)])
def test_scores_do_not_depend_on_the_shape(model, examples, alone, row_length, batch_rows):
    found = score_examples(model, examples, scoring_shape(row_length), batch_rows, window=16)
    check_alike(scores_of(found), alone)


def test_scores_do_not_depend_on_order_and_neighbours(model, examples, alone):
    shuffled = random.Random(1).sample(examples, len(examples))
    check_alike(scores_of(score_examples(model, shuffled, SHAPE, 4)), alone)
    some = shuffled[:9]
    keys = {example.key for example in some}
    expected = {place: value for place, value in alone.items() if place[0] in keys}
    check_alike(scores_of(score_examples(model, some, SHAPE, 4)), expected)


@pytest.mark.parametrize("axes", [{"fsdp": 2}, {"context": 2}, {"data": 2, "tensor": 2}])
def test_scores_do_not_depend_on_the_mesh(peer, examples, alone, tmp_path, axes):
    config = MeshConfig(**{"data": 1, **axes})
    mesh = make_mesh(config, jax.devices()[: 2 * len(axes)])
    peer.save_pretrained(tmp_path)
    spread, _ = hf.load(tmp_path, ComputeConfig(), mesh)
    check_alike(scores_of(score_examples(spread, examples, SHAPE, 4, mesh=mesh)), alone)


def test_candidates_of_a_prompt_that_spill_into_other_rows_keep_their_scores(model, examples):
    example = examples[0]
    many = Example(example.prompt, tuple(r for e in examples[:12] for r in e.responses), key=0)
    counts = PackCounts()
    found = scores_of(score_examples(model, [many], SHAPE, 2, counts=counts))
    assert counts.spilled == 1
    assert counts.rows > 2
    apart = [Example(many.prompt, (r,), key=k) for k, r in enumerate(many.responses)]
    for score in score_examples(model, apart, SHAPE, 2):
        assert close(found[0, score.key], score.score, 1e-5)


def test_a_batch_is_handed_over_before_the_one_before_is_fetched(model, examples):
    """The engine takes batch n + 1 before it gives the scores of batch n, and never n + 2."""
    taken = 0

    def batches():
        nonlocal taken
        rows = list(pack(examples, SHAPE))
        for start in range(0, len(rows), 2):
            taken += 1
            yield RowBatch(rows[start : start + 2], BatchShape(SHAPE, 2))

    counts = EngineCounts()
    ahead = []
    for given, _ in enumerate(score_batches(model, batches(), counts=counts), start=1):
        ahead.append(taken - given)
    assert set(ahead[:-1]) == {1}
    assert ahead[-1] == 0
    assert counts.batches == len(ahead)


def test_few_targets_are_computed_in_a_shorter_shape_with_equal_scores(model, examples, alone):
    short = [e for e in examples if max(map(len, e.responses)) < 40]
    single = [Example(e.prompt, e.responses[:1], key=e.key) for e in short]
    rows = list(pack(single[:1], SHAPE))
    assert _assemble(rows[:1], BatchShape(SHAPE, 1)).targets.shape == (1, 64)
    found = scores_of(score_examples(model, single, SHAPE, 1, window=1))
    check_alike(found, {(e.key, 0): alone[e.key, 0] for e in single})


def test_small_batches_have_fewer_rows_and_then_shorter_ones():
    def sizes(*args):
        return [(size, row.tokens) for row, size in batch_shapes(*args)]

    short = [(1, n) for n in (256, 320, 384, 448, 512, 640, 768, 896)]
    assert sizes(1024, 2) == [*short, (1, 1024), (2, 1024)]
    assert sizes(600, 6, "head", tiny.mesh(1, 2, 1)) == [
        *((6, n) for n in (300, 375, 450, 525)), (6, 600)
    ]  # fmt: skip
    # A length between must divide among the parts of a row, twice each.
    context = tiny.mesh(1, 1, 1, 2)
    assert sizes(1024, 1, "judge", context) == [*short, (1, 1024)]
    assert sizes(600, 1, "head", context) == [(1, 300), (1, 600)]
    assert sizes(64, 3) == [(3, 64)]


def test_of_many_shapes_those_that_double_can_be_taken():
    found = [(size, row.tokens) for row, size in doubling(batch_shapes(1024, 4))]
    assert found == [(1, 256), (1, 512), (1, 1024), (2, 1024), (4, 1024)]
    assert doubling(batch_shapes(64, 3)) == batch_shapes(64, 3)


def test_a_batch_between_two_sizes_is_padded_by_a_quarter_at_most():
    lengths = [row.tokens for row, _ in batch_shapes(8192, 1)]
    assert all(b <= 1.25 * a for a, b in itertools.pairwise(lengths))


def test_a_small_input_is_computed_in_a_small_batch_with_equal_scores(model, examples, alone):
    def score(some, row_length=1024, **options):
        running = Running(some, batch_shapes(row_length, 4), **options)
        for scores in score_batches(model, running.batches):
            running.add(scores)
        assert not running.missing
        places = [(e.key, i) for e in some for i in range(len(e.responses))]
        check_alike(
            {place: running[place].score for place in places},
            {place: alone[place] for place in places},
        )
        return running.places

    few = sorted(examples, key=lambda e: e.num_tokens(SHAPE))[:3]
    tokens = sum(e.num_tokens(SHAPE) for e in few)
    assert score(few, first=True) < 2 * max(tokens, 256) <= 1024
    assert score(few) == 4 * 1024
    assert score(examples, first=True) % 4096 == 0
    rows = [len(list(pack(examples[:n], SHAPE))) for n in range(len(examples) + 1)]
    n = max(n for n, found in enumerate(rows) if found > 4 and found % 4 == 1)
    assert score(examples[:n], 256, short_end=True) == rows[n] * 256
    assert score(examples[:n], 256) == (rows[n] + 3) * 256


def shapes_in(jaxpr):
    """Shapes of everything computed, in inner functions too."""
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            yield tuple(variable.aval.shape)
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: isinstance(x, Jaxpr | ClosedJaxpr)
        ):
            inner = value.jaxpr if isinstance(value, ClosedJaxpr) else value
            if isinstance(inner, Jaxpr):
                yield from shapes_in(inner)


@pytest.mark.parametrize("where", ["jaxpr", "compiled"])
def test_logits_of_all_tokens_never_exist(model, examples, where):
    chunk, vocabulary = 16, SIZES["vocab_size"]
    batch = stack_rows([row.batch for row in pack(examples[:8], SHAPE)][:2])
    small = jax.tree.map(lambda x: x, model)
    small.compute = dataclasses.replace(model.compute, logprob_chunk=chunk)
    readout = Readout("likelihood", 64)
    if where == "jaxpr":
        traced = jax.make_jaxpr(score_rows, static_argnums=(2, 3))(small, batch, readout, True)
        shapes = set(shapes_in(traced.jaxpr))
    else:
        text = score_rows.lower(small, batch, readout, True).compile().as_text()
        shapes = set(hlo_shapes(text))
    with_vocabulary = [s for s in shapes if vocabulary in s and len(s) > 1]
    assert any(np.prod(s) == 2 * chunk * vocabulary for s in with_vocabulary)
    weights = vocabulary * SIZES["hidden_size"]
    for shape in with_vocabulary:
        assert np.prod(shape) in (2 * chunk * vocabulary, weights), shape


def hlo_shapes(hlo):
    """Shapes of the float arrays in an HLO text."""
    for dims in re.findall(r"f32\[([\d,]+)\]", hlo):
        yield tuple(map(int, dims.split(",")))
