"""Judge and head: scores and losses are those of all logits, of PyTorch, and on every mesh."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch

from gram_jax.config import ObjectiveConfig, OptimizerConfig, TrainConfig
from gram_jax.data.loader import device_batch
from gram_jax.models.adapters import Adapters, attach
from gram_jax.objectives import objective
from gram_jax.packing import pack
from gram_jax.pair import Pair
from gram_jax.readouts import Readout, read
from gram_jax.rows import Example, RowShape, check_batch, stack_rows
from gram_jax.scoring import score_rows
from gram_jax.training import init_state, make_optimizer, make_train_step, split_model

S, P, T = 12, 8, 96
LABELS = (7, 11)
JUDGE, HEAD = Readout("judge", S, LABELS), Readout("head", S)
LAST = RowShape(T, 0, S, P, readouts=True)
BOTH = RowShape(T, T, S, P, readouts=True)
E = 0.05


@functools.cache
def rows(kind, shape=LAST, count=14):
    examples = tiny.judge_prompts(3, count) if kind == "judge" else tiny.preferences(4, count)
    return examples, list(pack(examples, shape))


@functools.cache
def model(head=True):
    return attach(tiny.decoder(seed=2), Adapters(head=head), seed=1)


def alone(prompt, response):
    """The last hidden state of a sequence by itself, in a row of its own: float32 [D]."""
    example = Example(prompt, (response,), (Pair(0, None),))
    (row,) = pack([example], LAST)
    batch = stack_rows([row.batch])
    hidden = _hidden(model(), batch)
    return hidden[0, batch.readout_index[0, 0]]


@jax.jit
def _hidden(model, batch):
    return model(batch)


@functools.partial(jax.jit, static_argnums=2)
def scores(model, batch, readout):
    return read(model, batch, readout).scores


@pytest.mark.parametrize("kind", ["judge", "preferences"])
def test_rows_hold_the_last_token_of_each_sequence_and_where_it_stands(kind):
    for shape in (LAST, BOTH):
        examples, packed = rows(kind, shape)
        check_batch(stack_rows([row.batch for row in packed]), tiny.VOCAB)
        by_key = {example.key: example for example in examples}
        seen = set()
        for row in packed:
            for s, (key, i) in enumerate(row.origins):
                place = row.batch.readout_index[s]
                response = by_key[key].responses[i]
                got = row.batch.tokens[place - len(response) + 1 : place + 1]
                np.testing.assert_array_equal(got, response)
                assert row.batch.tokens[place - len(response)] == by_key[key].prompt[-1]
                seen.add((key, i))
            assert (row.batch.readout_index[len(row.origins) :] == 0).all()
        assert seen == {(e.key, i) for e in examples for i in range(len(e.responses))}
        assert (packed[0].batch.targets is None) == (shape is LAST)


@pytest.mark.parametrize(("kind", "readout"), [("judge", JUDGE), ("preferences", HEAD)])
def test_a_score_is_that_of_the_sequence_alone_at_its_last_token(kind, readout):
    """The last real token by the row's own account, whatever its id, with pad == eos or without."""
    examples, packed = rows(kind)
    by_key = {example.key: example for example in examples}
    batch = stack_rows([row.batch for row in packed])
    got = np.asarray(scores(model(), batch, readout).score)
    assert (np.asarray(scores(model(), batch, readout).num_tokens).sum()) == sum(
        len(row.origins) for row in packed
    )
    u, w = (np.asarray(x[...], np.float64) for x in (model().unembedding, model().head))
    for b, row in enumerate(packed[:4]):
        for s, (key, i) in enumerate(row.origins):
            hidden = np.asarray(alone(by_key[key].prompt, by_key[key].responses[i]), np.float64)
            expected = hidden @ (u[LABELS[0]] - u[LABELS[1]] if readout is JUDGE else w)
            assert abs(got[b, s] - expected) <= 1e-5 * max(1, abs(expected))


def test_a_judge_and_a_head_do_not_meet_the_vocabulary():
    """The only arrays that are as wide as it are the weights.

    By the plain attention: blocks of keys are as wide as this vocabulary.
    """
    plain = model()
    plain.compute = dataclasses.replace(plain.compute, attention="xla")
    for kind, readout in (("judge", JUDGE), ("preferences", HEAD)):
        batch = stack_rows([row.batch for row in rows(kind)[1]])
        traced = jax.make_jaxpr(score_rows, static_argnums=(2, 3))(plain, batch, readout, False)
        shapes = re.findall(r"\[([\d,]+)\]", str(traced))
        wide = {shape for shape in shapes if str(tiny.VOCAB) in shape.split(",")}
        assert wide == {f"{tiny.VOCAB},32"}


def losses(kind, name, shape=LAST, **options):
    """The objective, its denominator and its gradient by the model's weights."""
    _, packed = rows(kind, shape)
    batch = stack_rows([row.batch for row in packed])
    config = ObjectiveConfig(name=name, label_smoothing=E, **options)
    readout = JUDGE if kind == "judge" else HEAD

    @jax.jit
    def run(model, batch):
        def loss(model):
            return objective(model, batch, config, readout)

        return jax.value_and_grad(loss, has_aux=True)(model)

    (total, (denominator, metrics)), gradient = run(model(), batch)
    return float(total), float(denominator), metrics, gradient, packed


def by_all_logits(packed, full):
    """The judge's loss from softmaxes over logits of the whole vocabulary, as PyTorch has it."""

    @jax.jit
    def loss(model, batch):
        hidden = jnp.take_along_axis(model(batch), batch.readout_index[..., None], axis=1)
        logits = jnp.einsum("bsd,vd->bsv", hidden, model.unembedding[...])
        both = logits if full else logits[..., jnp.array(LABELS)]
        places = LABELS if full else (0, 1)
        logp = jax.nn.log_softmax(both)
        per_sequence = [jnp.take_along_axis(logp[..., i], batch.pair_a - 1, axis=1) for i in places]
        target = (1 - 2 * E) * batch.pair_target + E
        per_pair = -target * per_sequence[0] - (1 - target) * per_sequence[1]
        used = batch.pair_weight != 0
        return jnp.sum(jnp.where(used, batch.pair_weight * per_pair, 0.0))

    batch = stack_rows([row.batch for row in packed])
    return jax.value_and_grad(loss)(model(), batch)


@pytest.mark.parametrize("name", ["judge", "judge_full_vocab"])
def test_the_judges_loss_is_the_smoothed_cross_entropy_of_its_labels(name):
    total, denominator, metrics, gradient, packed = losses("judge", name)
    expected, slope = by_all_logits(packed, full=name == "judge_full_vocab")
    assert total == pytest.approx(float(expected), rel=1e-5)
    assert denominator == pytest.approx(sum(row.batch.pair_weight.sum() for row in packed))
    for got, want in zip(jax.tree.leaves(gradient), jax.tree.leaves(slope), strict=True):
        scale = max(1e-3, float(np.abs(want).max()))
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * scale)
    assert metrics["pairs"] == sum((row.batch.pair_weight != 0).sum() for row in packed)


@pytest.mark.parametrize(
    ("shape", "options"),
    [(LAST, {}), (LAST, {"centring": 0.01, "beta": 2.0}), (BOTH, {"chosen_ce": 0.3})],
    ids=["plain", "centred", "text"],
)
def test_bradley_terry_is_pytorchs(shape, options):
    total, denominator, _, gradient, packed = losses(
        "preferences", "bradley_terry", shape, **options
    )
    batch = stack_rows([row.batch for row in packed])
    found = np.asarray(scores(model(), batch, HEAD).score)
    s = torch.tensor(np.concatenate([np.zeros((len(found), 1), np.float32), found], axis=1))
    a, b = (torch.gather(s, 1, torch.tensor(x).long()) for x in (batch.pair_a, batch.pair_b))
    target = (1 - 2 * E) * torch.tensor(batch.pair_target) + E
    d = options.get("beta", 1.0) * (a - b) - torch.tensor(batch.pair_margin)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(d, target, reduction="none")
    loss = loss + options.get("centring", 0.0) * (a + b) ** 2
    expected = (torch.tensor(batch.pair_weight) * loss).sum().item()
    if "chosen_ce" in options:
        plain, *_ = losses("preferences", "bradley_terry", shape)
        assert plain == pytest.approx(expected, rel=1e-5)
        assert total > plain + 1  # cross-entropies are some nats
        assert np.abs(gradient.unembedding[...]).max() > 0
    else:
        assert total == pytest.approx(expected, rel=1e-5)
        assert np.abs(gradient.unembedding[...]).max() == 0
    assert denominator == pytest.approx(batch.pair_weight.sum())
    assert np.abs(gradient.head[...]).max() > 0


@functools.cache
def trained(name, sizes, last_blocks=0, head_only=False, **options):
    """Losses of three steps on a mesh, and the weights that changed."""
    kind = "judge" if name.startswith("judge") else "preferences"
    mesh = tiny.mesh(*sizes)
    tx = make_optimizer(OptimizerConfig(learning_rate=0.01, warmup=0.0), 3)
    config = ObjectiveConfig(name=name, **options)
    train = TrainConfig(last_blocks=last_blocks, head_only=head_only)
    with jax.set_mesh(mesh):
        one = attach(tiny.decoder(mesh=mesh, seed=2), Adapters(head=kind == "preferences"), seed=1)
        graph, trainable, frozen = split_model(one, train)
        state = init_state(tx, trainable, frozen)
        before = jax.tree.map(np.asarray, (state.trainable, state.frozen))
        step = make_train_step(graph, tx, config, JUDGE if kind == "judge" else HEAD)
        _, packed = rows(kind)
        source = _Source(stack_rows([row.batch for row in packed]))
        found = []
        for _ in range(3):
            state, metrics = step(state, device_batch(source, np.arange(8) % 4, 1, mesh))
            found.append({k: float(v) for k, v in metrics.items()})
    after = jax.tree.map(np.asarray, (state.trainable, state.frozen))
    return found, before, after


class _Source:
    """Rows in memory, read by number."""

    def __init__(self, batch):
        self.batch = batch

    def read(self, numbers):
        return jax.tree.map(lambda x: x[numbers], self.batch)


@pytest.mark.parametrize("name", ["judge_full_vocab", "bradley_terry"])
def test_losses_do_not_depend_on_the_mesh(name):
    one, *_ = trained(name, (1, 1, 1))
    other, *_ = trained(name, (1, 2, 2, 2))
    assert one[0] == pytest.approx(other[0], rel=1e-5, abs=1e-5)
    for a, b in zip(one, other, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    assert one[-1]["loss"] < one[0]["loss"]


def test_on_a_frozen_trunk_only_the_head_changes():
    found, before, after = trained("bradley_terry", (1, 1, 1), head_only=True)
    assert [leaf.shape for leaf in jax.tree.leaves(before[0])] == [(32,)]
    jax.tree.map(np.testing.assert_array_equal, before[1], after[1])
    assert not np.array_equal(jax.tree.leaves(before[0])[0], jax.tree.leaves(after[0])[0])
    assert found[-1]["loss"] < found[0]["loss"]
