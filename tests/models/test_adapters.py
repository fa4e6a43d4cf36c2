"""LoRA is PEFT's: forward, gradients, names. It trains itself and the head, and nothing else."""

import copy
import dataclasses
import functools
import math
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import peer_models
import peft
import pytest
import tiny
import torch
from jax.extend.core import ClosedJaxpr, Jaxpr

from gram_jax import hf
from gram_jax.config import (
    LORA_TARGETS,
    ComputeConfig,
    Config,
    ObjectiveConfig,
    OptimizerConfig,
    TrainConfig,
)
from gram_jax.data.loader import device_batch
from gram_jax.models.adapters import Adapters, Lora, adapters_of, attach, merged
from gram_jax.models.decoder import BLOCK_DIMS, Block, abstract_decoder, shape_of, weight_name
from gram_jax.objectives import objective
from gram_jax.packing import pack
from gram_jax.peft_folder import adapter_tensors
from gram_jax.readouts import Readout
from gram_jax.rows import Example, RowShape, stack_rows
from gram_jax.training import (
    flops_per_token,
    init_state,
    make_optimizer,
    make_train_step,
    merge_model,
    split_model,
    trainable_names,
)

RANK, ALPHA, LENGTH, S = 3, 5.0, 24, 6
LORA = Lora(RANK, ALPHA, LORA_TARGETS)
TRAIN = TrainConfig(lora_rank=RANK, lora_alpha=ALPHA)
MODEL = tiny.config()
ONE = (1, 1, 1)


def text_batch(vocabulary):
    """Four plain causal rows of LENGTH tokens; no padding."""
    rng = np.random.default_rng(0)
    texts = [rng.integers(3, vocabulary, LENGTH + 1).astype(np.int32) for _ in range(4)]
    shape = RowShape(LENGTH, LENGTH)
    packed = [row for text in texts for row in pack([Example(text[:1], (text[1:],))], shape)]
    return stack_rows([row.batch for row in packed])


def filled(model, seed=1):
    """The same model with random numbers in all of LoRA's matrices: B is 0 where training begins.

    The merged product is about as large as the weight itself.
    """
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        if not weight_name(path).endswith(("_lora_a", "_lora_b")):
            return leaf
        return jax.device_put(0.2 * rng.normal(size=leaf.shape).astype(np.float32), leaf.sharding)

    return jax.tree_util.tree_map_with_path(fill, model)


@jax.jit
def logits(model, batch):
    return jnp.einsum("btd,vd->btv", model(batch), model.unembedding_vd())


# Against PEFT.


@pytest.fixture(scope="module")
def peers(peer_model):
    """One model twice: with PEFT's LoRA, random A and B, and ours with the same numbers.

    Its heads are wider than D / H, their keys fewer, and q and k are normalised.
    """
    theirs, folder = peer_model("qwen3-tied")
    targets = [f"{name}_proj" for name in LORA_TARGETS]
    options = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=targets, task_type="CAUSAL_LM"
    )
    wrapped = peft.get_peft_model(copy.deepcopy(theirs), options).eval()
    base, _ = hf.load(folder, tiny.COMPUTE)
    ours = attach(base, Adapters(lora=LORA), seed=0)
    begun = wrapped.base_model.model.model.layers[0].self_attn.o_proj.lora_A["default"].weight
    begun = begun.detach().numpy().copy()
    ours = filled(ours)
    tensors = adapter_tensors(ours)
    state = {name: torch.tensor(tensor) for name, tensor in tensors.items()}
    found = peft.set_peft_model_state_dict(wrapped, state)
    assert not found.unexpected_keys
    return wrapped, ours, base, begun


def test_each_matrix_has_the_name_and_the_shape_that_peft_gives_it(peers):
    wrapped, ours, _, _ = peers
    theirs, tensors = peft.get_peft_model_state_dict(wrapped), adapter_tensors(ours)
    assert tensors.keys() == theirs.keys()
    assert len(tensors) == 2 * len(LORA_TARGETS) * ours.config.num_layers
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(tensor, theirs[name].numpy(), err_msg=name)


@functools.partial(jax.jit, static_argnums=0)
def _pulled(graph, trainable, frozen, batch, cotangent):
    """Logits, and the gradient of their product with ``cotangent`` in A and B."""

    def product(trainable):
        found = logits(merge_model(graph, trainable, frozen), batch)
        return jnp.sum(found * cotangent), found

    return jax.grad(product, has_aux=True)(trainable)


def test_logits_and_gradients_are_those_of_peft(peers):
    wrapped, ours, base, _ = peers
    batch = text_batch(peer_models.VOCAB)
    cotangent = np.random.default_rng(1).normal(size=(4, LENGTH, peer_models.VOCAB))
    cotangent = cotangent.astype(np.float32)
    graph, trainable, frozen = split_model(ours, TRAIN)
    gradients, found = _pulled(graph, trainable, frozen, batch, cotangent)

    theirs = wrapped(torch.tensor(batch.tokens)).logits
    (theirs * torch.tensor(cotangent)).sum().backward()
    expected = theirs.detach().numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max())
    assert np.abs(expected - np.asarray(logits(base, batch))).max() > 1
    ours_by_name = adapter_tensors(merge_model(graph, gradients, frozen))
    compared = 0
    for name, weight in wrapped.named_parameters():
        if weight.grad is None:
            continue
        gradient = weight.grad.numpy()
        np.testing.assert_allclose(
            ours_by_name[name.replace(".default", "")],
            gradient,
            rtol=0,
            atol=1e-4 * np.abs(gradient).max(),
            err_msg=name,
        )
        compared += 1
    assert compared == len(ours_by_name)


def test_a_begins_as_in_peft_and_b_as_zero_so_the_model_as_it_was(peers):
    _, _, base, theirs = peers
    ours = attach(base, Adapters(lora=LORA), seed=3)
    for name in LORA_TARGETS:
        a = np.asarray(getattr(ours.stacks[0], f"{name}_lora_a")[...])
        bound = 1 / math.sqrt(math.prod(a.shape[1:-1]))
        assert 0.9 * bound < np.abs(a).max() <= bound
        assert np.std(a) == pytest.approx(bound / math.sqrt(3), rel=0.2)
        assert not np.asarray(getattr(ours.stacks[0], f"{name}_lora_b")[...]).any()
        if name == "o":
            assert 0.9 * bound < np.abs(theirs).max() <= bound
    batch = text_batch(peer_models.VOCAB)
    np.testing.assert_array_equal(logits(ours, batch), logits(base, batch))


# Merged.


@pytest.mark.parametrize("sizes", [ONE, (2, 2, 2)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_merged_model_gives_the_numbers_of_the_one_in_parts(sizes, dtype):
    mesh = tiny.mesh(*sizes)
    with jax.set_mesh(mesh):
        plain = tiny.decoder(MODEL, mesh=mesh)
        plain = jax.tree.map(lambda x: x.astype(dtype), plain)
        model = filled(attach(plain, Adapters(lora=LORA), seed=0))
        batch = text_batch(tiny.VOCAB)
        before = np.asarray(logits(model, batch)) if dtype == "float32" else None
        parts = jax.tree.map(np.asarray, model)
        whole = merged(model)
    assert jax.tree.structure(whole) == jax.tree.structure(plain)
    assert not hasattr(whole.stacks[0], "q_lora_a")
    leaves = jax.tree.leaves(jax.tree.map(lambda x: (x.dtype.name, x.sharding), whole))
    assert leaves == jax.tree.leaves(jax.tree.map(lambda x: (x.dtype.name, x.sharding), plain))
    stack = parts.stacks[0]
    product = np.einsum("lfr,lrd->lfd", stack.down_lora_a[...], stack.down_lora_b[...])
    expected = stack.down[...].astype(np.float32) + ALPHA / RANK * product
    atol = 1e-6 * np.abs(expected).max()
    expected = jnp.asarray(expected).astype(dtype).astype(np.float32)
    found = np.asarray(whole.stacks[0].down[...]).astype(np.float32)
    # bfloat16 has 8 bits, and a sum may fall on the other side of the middle of two of its numbers.
    rtol = 0 if dtype == "float32" else 2**-8
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=atol)
    if before is not None:
        with jax.set_mesh(mesh):
            after = np.asarray(logits(whole, batch))
        np.testing.assert_allclose(after, before, rtol=0, atol=1e-5 * np.abs(before).max())


def test_a_model_without_lora_is_its_own_merged_model():
    model = tiny.decoder(MODEL)
    assert merged(model) is model


def test_the_description_of_a_model_gets_descriptions():
    mesh = tiny.mesh(2, 2, 2)
    adapters = Adapters(head=True, lora=LORA)
    described = attach(abstract_decoder(MODEL, tiny.COMPUTE, mesh), adapters, 0)
    model = attach(tiny.decoder(MODEL, mesh=mesh), adapters, 0)
    assert jax.tree.structure(described) == jax.tree.structure(model)
    for (path, ours), theirs in zip(
        jax.tree_util.tree_flatten_with_path(described)[0], jax.tree.leaves(model), strict=True
    ):
        assert isinstance(ours, jax.ShapeDtypeStruct)
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        assert ours.sharding == theirs.sharding, weight_name(path)
    q_a, o_a = (getattr(model.stacks[0], f"{name}_lora_a")[...] for name in "qo")
    assert q_a.sharding.spec == jax.P(None, ("fsdp", "context"), None)
    assert o_a.sharding.spec == jax.P(None, "tensor", None, None)


def test_the_settings_of_a_run_say_what_it_adds():
    run = Config(train=TrainConfig(lora_rank=2, lora_targets=("q", "v")))
    assert adapters_of(run) == Adapters(head=False, lora=Lora(2, 16.0, ("q", "v")))
    assert adapters_of(Config()) == Adapters()
    model = attach(tiny.decoder(MODEL), adapters_of(run), 0)
    added = {name for name in vars(model.stacks[0]) if "lora_" in name} - {"lora_scale"}
    assert added == {"q_lora_a", "q_lora_b", "v_lora_a", "v_lora_b"}
    assert model.stacks[0].lora_scale == 8.0
    assert Block.lora_scale == 1.0


# Training.

SHAPE = RowShape(64, 0, S, 4, readouts=True)
OBJECTIVE = ObjectiveConfig(name="bradley_terry")


@functools.cache
def rows():
    packed = [row for one in tiny.preferences(0, 40) for row in pack([one], SHAPE)]
    return tiny.rows(Path(tempfile.mkdtemp()), packed, SHAPE)


def with_everything(mesh=None, compute=tiny.COMPUTE):
    return attach(tiny.decoder(MODEL, compute, mesh), Adapters(head=True, lora=LORA), seed=4)


def plain_names(state):
    return {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]
    }


@functools.cache
def trained(sizes):
    """Losses of four steps, and the weights before and after."""
    mesh = tiny.mesh(*sizes)
    with jax.set_mesh(mesh):
        graph, trainable, frozen = split_model(with_everything(mesh), TRAIN)
        tx = make_optimizer(OptimizerConfig(learning_rate=1e-2, warmup=0.0), 4)
        state = init_state(tx, trainable, frozen)
        before = plain_names(state.trainable), plain_names(state.frozen)
        step = make_train_step(graph, tx, OBJECTIVE, Readout("head", S))
        losses = []
        for i in range(4):
            numbers = np.arange(16 * i, 16 * (i + 1)) % len(rows())
            state, metrics = step(state, device_batch(rows(), numbers, 1, mesh))
            losses.append(float(metrics["loss"]))
    return losses, before, (plain_names(state.trainable), plain_names(state.frozen)), state


@pytest.mark.skipif(jax.device_count() != 8, reason="needs eight devices")
@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2)], ids=str)
def test_losses_do_not_depend_on_the_mesh(sizes):
    expected, found = trained(ONE)[0], trained(sizes)[0]
    assert expected[-1] != expected[0]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_matrices_and_the_head_train_and_all_else_stays_to_the_bit():
    _, (trainable, frozen), (trainable_after, frozen_after), state = trained(ONE)
    matrices = [f"{name}_lora_{which}" for name in LORA_TARGETS for which in "ab"]
    assert trainable_names(state.trainable) == sorted(["head", *matrices])
    assert len(trainable) + len(frozen) == len(jax.tree.leaves(with_everything()))
    for name, value in frozen.items():
        np.testing.assert_array_equal(frozen_after[name], value, err_msg=name)
    for name, value in trainable.items():
        assert (trainable_after[name] != value).any(axis=tuple(range(1, value.ndim))).all(), name
    moments = [leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert sum(moments) == 2 * sum(value.size for value in trainable.values())


def test_weight_decay_is_on_both_matrices():
    _, params, _ = split_model(filled(with_everything()), TRAIN)
    config = OptimizerConfig(learning_rate=0.5, weight_decay=0.1, warmup=0.0, clip=0.0)
    tx = make_optimizer(config, 10)
    zeros = jax.tree.map(np.zeros_like, params)
    updates, _ = jax.jit(lambda p, g: tx.update(g, tx.init(p), p))(params, zeros)
    for (path, update), weight in zip(
        jax.tree_util.tree_flatten_with_path(updates)[0], jax.tree.leaves(params), strict=True
    ):
        decays = weight_name(path) != "head"
        np.testing.assert_allclose(update, -0.05 * weight if decays else 0 * weight, rtol=1e-5)


def loss_of(graph, config, readout):
    def loss(trainable, frozen, batch):
        model = merge_model(graph, trainable, frozen)
        return objective(model, batch, config, readout)[0]

    return loss


@functools.cache
def loss_and_gradients(remat, unroll):
    compute = ComputeConfig(dtype="float32", remat=remat, unroll=unroll)
    graph, trainable, frozen = split_model(filled(with_everything(None, compute)), TRAIN)
    batch = rows().read(np.arange(4))
    run = jax.jit(jax.value_and_grad(loss_of(graph, OBJECTIVE, Readout("head", S))))
    value, gradients = run(trainable, frozen, batch)
    return float(value), plain_names(gradients)


@pytest.mark.parametrize(("remat", "unroll"), [("full", 1), ("matmuls", 0)])
def test_recomputing_and_unrolling_change_nothing(remat, unroll):
    value, gradients = loss_and_gradients(remat, unroll)
    expected, plain = loss_and_gradients("none", 1)
    assert value == pytest.approx(expected, rel=1e-5)
    for name, theirs in plain.items():
        atol = 1e-5 * np.abs(theirs).max()
        np.testing.assert_allclose(gradients[name], theirs, rtol=0, atol=atol, err_msg=name)


def made_shapes(jaxpr):
    """Shapes of all that a program computes, inner programs included."""
    for equation in jaxpr.eqns:
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: isinstance(x, (Jaxpr, ClosedJaxpr))
        ):
            if isinstance(inner, (Jaxpr, ClosedJaxpr)):
                yield from made_shapes(inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner)
        yield from (v.aval.shape for v in equation.outvars)


def traced_shapes(train, remat):
    """Shapes of the arrays in the program of a loss's gradient."""
    compute = dataclasses.replace(tiny.COMPUTE, remat=remat)
    run = Config(train=train, objective=OBJECTIVE)
    model = attach(abstract_decoder(MODEL, compute), adapters_of(run), 0)
    graph, trainable, frozen = split_model(model, train)
    loss = loss_of(graph, OBJECTIVE, Readout("head", S))
    batch = rows().read(np.arange(4))
    return set(made_shapes(jax.make_jaxpr(jax.grad(loss))(trainable, frozen, batch).jaxpr))


@pytest.mark.parametrize("remat", ["none", "full"])
def test_frozen_weights_get_no_gradient(remat):
    """An array of the shape of all layers' W or of the embedding appears in full training only."""
    stacked = {shape_of("L" + BLOCK_DIMS[name], MODEL) for name in ("q", "o", "gate", "down")}
    full, lora = traced_shapes(TrainConfig(), remat), traced_shapes(TRAIN, remat)
    assert stacked <= full
    assert not stacked & lora
    embedding = (MODEL.vocab_size, MODEL.hidden_size)
    assert embedding in full
    assert embedding not in lora
    assert (MODEL.num_layers, MODEL.hidden_size, RANK) in lora


@pytest.mark.parametrize(
    "train",
    [TrainConfig(), TrainConfig(lora_rank=1, lora_targets=("q", "v")), TrainConfig(last_blocks=1)],
    ids=["full", "lora", "last_blocks"],
)
def test_flops_of_a_step_are_those_that_the_compiler_counts(train):
    """So gradients of frozen weights are not computed, the unembedding's included.

    The plain attention multiplies with all T keys: the attention of a context of 2 T.
    """
    config = tiny.config(
        hidden_size=256, head_dim=64, intermediate_size=704, vocab_size=2048, num_layers=3
    )
    tokens = 256
    compute = ComputeConfig(dtype="float32", attention="xla", unroll=3, logprob_chunk=tokens)
    model = attach(abstract_decoder(config, compute), adapters_of(Config(train=train)), 0)
    graph, trainable, frozen = split_model(model, train)
    run = jax.jit(jax.grad(loss_of(graph, ObjectiveConfig(), None)))
    batch = text_batch(tiny.VOCAB)
    slots = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, tokens), x.dtype), batch)
    counted = run.lower(trainable, frozen, slots).compile().cost_analysis()["flops"] / tokens
    expected = flops_per_token(config, train, 2 * tokens, 1.0)
    assert counted == pytest.approx(expected, rel=0.03)


def test_a_head_alone_costs_a_forward_pass():
    train = TrainConfig(head_only=True)
    assert flops_per_token(MODEL, train, 64, 0.0) == MODEL.flops_per_token(64, targets_per_token=0)
