"""One step is the same step on every mesh, in any number of parts, and as PyTorch would take it."""

import dataclasses
import functools
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
import torch
from flax import nnx

from gram_jax.config import ComputeConfig, ObjectiveConfig, OptimizerConfig, TrainConfig
from gram_jax.data.loader import device_batch
from gram_jax.errors import UserError
from gram_jax.models.decoder import is_matrix, weight_dims, weight_name
from gram_jax.objectives import objective
from gram_jax.packing import pack
from gram_jax.readouts import Readout
from gram_jax.rows import RowShape
from gram_jax.training import (
    divide,
    init_state,
    learning_rate,
    make_eval_step,
    make_optimizer,
    make_train_step,
    merge_model,
    split_model,
    trainable_names,
)

STEPS, ROWS, S = 5, 16, 6
ONE = (1, 1, 1)
OPTIMIZER = OptimizerConfig(learning_rate=3e-3, warmup=0.2, schedule="cosine")
SHAPES = {"next_token": RowShape(48, 48), "smoothed_pairwise": RowShape(64, 48, S, 4)}


@functools.cache
def rows(name):
    """Rows of very different numbers of tokens: one example each, text from 1 to 48 tokens."""
    text = name == "next_token"
    examples = tiny.text_examples(0, 80, 48) if text else tiny.preferences(0, 80)
    packed = [row for one in examples for row in pack([one], SHAPES[name])]
    return tiny.rows(Path(tempfile.mkdtemp()), packed, SHAPES[name])


def batches(name, parts, mesh, steps=STEPS):
    for step in range(steps):
        numbers = np.arange(step * ROWS, (step + 1) * ROWS) % len(rows(name))
        yield device_batch(rows(name), numbers, parts, mesh)


def readout(name):
    return None if name == "next_token" else Readout("likelihood", S)


@functools.cache
def trained(name, sizes=ONE, parts=1, compute=tiny.COMPUTE, last_blocks=0, sgd=False):
    """Metrics of each of STEPS steps, and the states before the first and after the last."""
    mesh = tiny.mesh(*sizes)
    tx = optax.sgd(1.0) if sgd else make_optimizer(OPTIMIZER, STEPS)
    with jax.set_mesh(mesh):
        model = tiny.decoder(tiny.config(num_layers=3), compute, mesh)
        graph, trainable, frozen = split_model(model, TrainConfig(last_blocks=last_blocks))
        state = init_state(tx, trainable, frozen)
        before = jax.tree.map(np.asarray, dataclasses.replace(state, opt_state=None))
        step = make_train_step(graph, tx, ObjectiveConfig(name=name), readout(name))
        found = []
        for batch in batches(name, parts, mesh, 1 if sgd else STEPS):
            state, metrics = step(state, batch)
            found.append({key: float(value) for key, value in metrics.items()})
    return found, before, state


@pytest.mark.parametrize(
    ("name", "sizes", "parts"),
    [
        ("next_token", (8, 1, 1), 1),
        ("next_token", (2, 2, 2), 1),
        ("next_token", ONE, 2),
        ("next_token", ONE, 4),
        ("smoothed_pairwise", (8, 1, 1), 1),
        ("smoothed_pairwise", (2, 1, 2, 2), 1),
        ("smoothed_pairwise", (2, 2, 2), 4),
        ("smoothed_pairwise", ONE, 2),
    ],
    ids=str,
)
def test_losses_do_not_depend_on_mesh_or_accumulation(name, sizes, parts):
    expected, found = trained(name)[0], trained(name, sizes, parts)[0]
    assert expected[0]["loss"] != expected[-1]["loss"]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert ours[key] == pytest.approx(value, rel=1e-5, abs=1e-5), key


def test_a_mean_of_means_would_have_been_another_number():
    """So the rows above can tell summing from averaging: their parts differ in size."""
    weights = np.asarray(next(batches("next_token", 4, tiny.mesh(*ONE))).weights).sum(axis=(1, 2))
    assert weights.max() > 1.2 * weights.min()


def test_the_state_keeps_its_shards_and_counts_its_steps():
    _, _, state = trained("next_token", (2, 2, 2))
    assert int(state.step) == STEPS
    by_name = {
        weight_name(path): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(state.trainable)[0]
    }
    assert by_name["embedding"].sharding.spec == jax.P("tensor", ("fsdp", "context"))
    assert by_name["q"].sharding.spec == jax.P(None, ("fsdp", "context"), "tensor", None)
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim == 4]
    assert any(
        leaf.sharding.spec == jax.P(None, ("fsdp", "context"), "tensor", None) for leaf in moments
    )
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.trainable))


@pytest.mark.parametrize("parts", [1, 4])
def test_the_eval_step_gives_the_loss_that_training_starts_from(parts):
    mesh = tiny.mesh(*ONE)
    with jax.set_mesh(mesh):
        model = tiny.decoder(tiny.config(num_layers=3), mesh=mesh)
        graph, trainable, frozen = split_model(model, TrainConfig())
        state = init_state(optax.identity(), trainable, frozen)
        step = make_eval_step(graph, ObjectiveConfig(name="next_token"), None)
        denominator, sums = step(state, next(batches("next_token", parts, mesh)))
    found = divide(sums, denominator)
    expected = trained("next_token")[0][0]
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert found["tokens"] == expected["tokens"]


def named(state):
    """{(name, stack): array} of the weights."""
    return {
        (weight_name(path), str(path[:2]) if len(path) > 3 else ""): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]
    }


@pytest.mark.parametrize("k", [1, 3])
def test_the_last_blocks_train_and_all_else_stays_to_the_bit(k):
    _, before, after = trained("next_token", last_blocks=k)
    frozen, still = named(before.frozen), named(after.frozen)
    assert {"embedding", "unembedding"} <= {name for name, _ in frozen}
    assert ("q" in {name for name, _ in frozen}) == (k < 3)
    for key, value in frozen.items():
        np.testing.assert_array_equal(still[key], value, err_msg=str(key))
    trained_before, trained_after = named(before.trainable), named(after.trainable)
    assert {len(v) for (name, _), v in trained_after.items() if name != "norm"} == {k}
    for key, value in trained_before.items():
        assert (trained_after[key] != value).any(), key
    assert trainable_names(after.trainable) == sorted({n for n, _ in trained_after})
    assert "embedding" not in trainable_names(after.trainable)


def test_the_last_blocks_get_the_gradient_of_the_full_model():
    """With plain gradient descent at rate 1 the change of a weight is its gradient."""

    def gradients(last_blocks):
        _, before, after = trained("next_token", last_blocks=last_blocks, sgd=True)
        new = {name: value for (name, _), value in named(after.trainable).items()}
        return {name: new[name] - old for (name, _), old in named(before.trainable).items()}

    full, part = gradients(0), gradients(1)
    for name, gradient in part.items():
        expected = full[name] if name == "norm" else full[name][-1:]
        atol = 1e-5 * np.abs(full[name]).max()
        np.testing.assert_allclose(gradient, expected, rtol=0, atol=atol, err_msg=name)


def test_more_blocks_than_there_are_is_an_error():
    with pytest.raises(UserError, match=r"train.last_blocks=4, but the model has 3 blocks"):
        split_model(tiny.decoder(tiny.config(num_layers=3)), TrainConfig(last_blocks=4))


def test_a_split_model_merges_into_the_model_it_was():
    model = tiny.decoder(tiny.config(num_layers=3))
    merged = merge_model(*split_model(model, TrainConfig(last_blocks=1)))
    assert len(merged.stacks) == 2
    jax.tree.map(np.testing.assert_array_equal, merged.joined_stacks(), model)


def rate(steps=100, **changes):
    schedule = learning_rate(OptimizerConfig(**{"learning_rate": 1.0, **changes}), steps)
    return [float(schedule(step)) for step in range(steps + 1)]


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_every_schedule_warms_up_in_a_straight_line(schedule):
    values = rate(schedule=schedule, warmup=0.1)
    np.testing.assert_allclose(values[:11], np.arange(11) / 10, atol=1e-6)
    assert rate(schedule=schedule, warmup=0.0)[0] == 1.0


def test_the_schedules_after_the_warm_up():
    cosine = rate(schedule="cosine", warmup=0.1, final=0.1)
    assert cosine[55] == pytest.approx((1 + 0.1) / 2)  # half way down
    assert cosine[100] == pytest.approx(0.1)
    assert (np.diff(cosine[10:]) < 0).all()
    wsd = rate(schedule="wsd", warmup=0.1, decay=0.2, final=0.1)
    assert set(wsd[10:81]) == {1.0}
    np.testing.assert_allclose(wsd[80:], np.linspace(1, 0.1, 21), atol=1e-6)
    assert set(rate(schedule="constant", warmup=0.1)[10:]) == {1.0}


def weights(**changes):
    """Weights of every kind, as a plain state."""
    every = {"qkv_bias": True, "output_bias": True, "mlp_bias": True, "qk_norm": True}
    return nnx.split(tiny.decoder(tiny.config(**every | changes)))[1]


def test_weight_decay_is_on_matrices_only():
    params = weights()
    config = OptimizerConfig(learning_rate=0.5, weight_decay=0.1, warmup=0.0, clip=0.0)
    tx = make_optimizer(config, 10)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    kinds = set()
    for (path, update), weight in zip(
        jax.tree_util.tree_flatten_with_path(updates)[0], jax.tree.leaves(params), strict=True
    ):
        name = weight_name(path)
        decays = not name.endswith(("norm", "bias"))
        assert is_matrix(weight_dims(path)) == decays, name
        kinds.add(decays)
        np.testing.assert_allclose(update, -0.05 * weight if decays else 0 * weight, rtol=1e-5)
    assert kinds == {True, False}


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_the_optimizer_is_that_of_pytorch(clip):
    """AdamW and clip_grad_norm_, fed the same gradients and rates for six steps."""
    params = weights(num_layers=1)
    config = OptimizerConfig(learning_rate=3e-3, warmup=0.3, weight_decay=0.1, clip=clip)
    tx, schedule = make_optimizer(config, 6), learning_rate(config, 6)
    flat, structure = jax.tree.flatten(params)
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
    theirs = [torch.nn.Parameter(torch.tensor(np.asarray(weight))) for weight in flat]
    decay = [is_matrix(weight_dims(path)) for path in paths]
    groups = [
        {"params": [w for w, d in zip(theirs, decay, strict=True) if d == on], "weight_decay": wd}
        for on, wd in ((True, config.weight_decay), (False, 0.0))
    ]
    adamw = torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), eps=config.eps)
    state, update = tx.init(params), jax.jit(tx.update)
    rng = np.random.default_rng(0)
    for step in range(6):
        size = (0.001, 0.1)[step % 2]  # below and above the clip
        gradients = [size * rng.normal(size=w.shape).astype(np.float32) for w in flat]
        updates, state = update(jax.tree.unflatten(structure, gradients), state, params)
        params = optax.apply_updates(params, updates)
        for weight, gradient in zip(theirs, gradients, strict=True):
            weight.grad = torch.tensor(gradient)
        norm = torch.nn.utils.clip_grad_norm_(theirs, clip or float("inf"))
        assert (norm > 1.0) == (size == 0.1)
        for group in adamw.param_groups:
            group["lr"] = float(schedule(step))
        adamw.step()
    for path, ours, other in zip(paths, jax.tree.leaves(params), theirs, strict=True):
        np.testing.assert_allclose(
            ours, other.detach().numpy(), rtol=0, atol=1e-6, err_msg=weight_name(path)
        )


def test_bfloat16_computes_close_to_float32_and_keeps_float32_weights():
    exact = trained("next_token")[0]
    half, _, state = trained("next_token", compute=ComputeConfig(dtype="bfloat16", unroll=1))
    assert [m["loss"] for m in half] != [m["loss"] for m in exact]
    for ours, theirs in zip(half, exact, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.01)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=0.05)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.trainable)} == {"float32"}


@functools.cache
def loss_and_gradients(remat, unroll):
    compute = ComputeConfig(dtype="float32", remat=remat, unroll=unroll)
    batch = jax.tree.map(lambda x: x[0], next(batches("next_token", 1, tiny.mesh(*ONE))))
    batch = jax.tree.map(np.asarray, batch)

    @jax.jit
    def run(model):
        def loss(model):
            return objective(model, batch, ObjectiveConfig(name="next_token"), None)[0]

        return jax.value_and_grad(loss)(model)

    value, gradients = run(tiny.decoder(tiny.config(num_layers=3), compute))
    return float(value), jax.tree.map(np.asarray, nnx.split(gradients)[1])


@pytest.mark.parametrize(
    ("remat", "unroll"), [("full", 1), ("matmuls", 1), ("none", 0), ("full", 0)]
)
def test_recomputing_and_unrolling_change_nothing(remat, unroll):
    value, gradients = loss_and_gradients(remat, unroll)
    expected, plain = loss_and_gradients("none", 1)
    assert value == pytest.approx(expected, rel=1e-5)
    for (path, ours), theirs in zip(
        jax.tree_util.tree_flatten_with_path(gradients)[0], jax.tree.leaves(plain), strict=True
    ):
        atol = 1e-5 * np.abs(theirs).max()
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=atol, err_msg=weight_name(path))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": True},
        {"qkv_bias": True, "output_bias": True, "mlp_bias": True, "qk_norm": True},
        {"num_layers": 5, "num_kv_heads": 1, "head_dim": 16},
    ],
    ids=str,
)
def test_the_number_of_parameters_is_that_of_the_arrays(changes):
    leaves = jax.tree.leaves(nnx.split(tiny.decoder(tiny.config(**changes)))[1])
    assert tiny.config(**changes).num_parameters() == sum(leaf.size for leaf in leaves)


def forward_flops(config, tokens, targets):
    """FLOPs that the compiler counts in a forward pass over one row, per token."""
    compute = ComputeConfig(
        dtype="float32", attention="xla", unroll=config.num_layers, logprob_chunk=targets
    )
    numbers = jnp.zeros((1, tokens), jnp.int32)
    slots = jnp.zeros((1, targets), jnp.int32)
    batch = jax.tree.map(lambda x: x[:1], rows("next_token").read(np.arange(1)))
    batch = dataclasses.replace(
        batch,
        **dict.fromkeys(("tokens", "positions", "segment_ids", "branch_ids"), numbers),
        **dict.fromkeys(("target_index", "targets"), slots),
        weights=slots.astype(jnp.float32),
    )
    model = jax.eval_shape(lambda: tiny.decoder(config, compute))
    run = jax.jit(lambda m, b: objective(m, b, ObjectiveConfig(name="next_token"), None)[0])
    return run.lower(model, batch).compile().cost_analysis()["flops"] / tokens


@pytest.mark.parametrize("targets", [256, 64])
def test_flops_per_token_are_those_that_the_compiler_counts(targets):
    """The plain attention multiplies with all T keys, also those it then masks. Counting the causal
    half once, as `flops_per_token` does, that is the attention of a context of 2 T."""
    config = tiny.config(
        hidden_size=256, num_heads=4, num_kv_heads=2, head_dim=64, intermediate_size=704,
        vocab_size=2048,
    )  # fmt: skip
    tokens = 256
    counted = forward_flops(config, tokens, targets)
    expected = config.flops_per_token(2 * tokens, targets_per_token=targets / tokens)
    assert counted == pytest.approx(expected, rel=0.03)
    # With the half counted once: less by half of 4 H E T per layer.
    attention = 4 * config.num_heads * config.head_dim * tokens * config.num_layers
    halved = config.flops_per_token(tokens, targets_per_token=targets / tokens)
    assert expected - halved == pytest.approx(attention / 2)


def test_a_window_bounds_the_attention_that_is_counted():
    """Position p sees min(p + 1, w) keys; the closed form is right to 1 / T."""
    context, window = 1000, 100
    with_window, without = tiny.config(windows=(window, 0)), tiny.config()
    seen = np.minimum(np.arange(context) + 1, window).mean()
    all_keys = (np.arange(context) + 1).mean()
    saved = without.flops_per_token(context) - with_window.flops_per_token(context)
    expected = 4 * with_window.num_heads * with_window.head_dim * (all_keys - seen)
    assert saved == pytest.approx(expected, rel=2e-3)
