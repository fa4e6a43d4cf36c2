"""A row split over devices gives the loss and the gradients of the whole one."""

import functools

import jax
import numpy as np
import pytest
import tiny
from jax.sharding import AbstractMesh

from gram_jax.config import ComputeConfig, ObjectiveConfig
from gram_jax.data.tokenizer import Tokenizer
from gram_jax.errors import UserError
from gram_jax.mesh import AXES, put
from gram_jax.models.adapters import Adapters, attach
from gram_jax.models.decoder import weight_dims
from gram_jax.objectives import objective
from gram_jax.packing import pack
from gram_jax.readouts import Readout
from gram_jax.rows import RowShape, stack_rows
from gram_jax.scorer import RewardSettings
from gram_jax.stripes import at_places, places, striped
from gram_jax.text_packing import pack_texts

B, T, S = 2, 64, 8
LABELS = (7, 11)
# M = 41 is no whole number of parts.
SHAPES = {
    "next_token": RowShape(T, T),
    "smoothed_pairwise": RowShape(T, 41, S, 4),
    "judge": RowShape(T, 0, S, 4, readouts=True),
    "judge_full_vocab": RowShape(T, 0, S, 4, readouts=True),
    "bradley_terry": RowShape(T, 41, S, 4, readouts=True),
}
READOUTS = {
    "next_token": None,
    "smoothed_pairwise": Readout("likelihood", S),
    "judge": Readout("judge", S, LABELS),
    "judge_full_vocab": Readout("judge", S, LABELS),
    "bradley_terry": Readout("head", S),
}


@functools.cache
def rows(name):
    if name == "next_token":
        packed = pack_texts(tiny.text_examples(0, 20), SHAPES[name])
    elif name.startswith("judge"):
        packed = pack(tiny.judge_prompts(0, 8), SHAPES[name])
    else:
        packed = pack(tiny.preferences(0, 8, reference=name != "bradley_terry"), SHAPES[name])
    return stack_rows([row.batch for row, _ in zip(packed, range(B), strict=False)])


@functools.cache
def loss_and_gradients(name, backend, sizes):
    """In float32, of a model with a window in its first layer, on this mesh or without one."""
    mesh = tiny.mesh(*sizes) if sizes else None
    readout = READOUTS[name]
    has_targets = readout is not None and SHAPES[name].targets > 0
    # Log-probs are some tens: a small beta keeps the pairs where the loss bends.
    beta = 0.1 if name == "smoothed_pairwise" else 1.0
    config = ObjectiveConfig(name=name, beta=beta, chosen_ce=0.3 if has_targets else 0.0)
    compute = ComputeConfig(dtype="float32", unroll=1, attention=backend)
    with jax.set_mesh(mesh) if mesh else jax.default_device(None):
        model = tiny.decoder(tiny.config(windows=(7, 0)), compute, mesh)
        model = attach(model, Adapters(head=name == "bradley_terry"), seed=1)
        batch = put(rows(name), mesh) if mesh else rows(name)
        run = jax.value_and_grad(lambda m: objective(m, batch, config, readout), has_aux=True)
        (total, _), gradient = jax.jit(run)(model)
    return float(total), gradient


@pytest.mark.parametrize(
    ("name", "backend", "sizes"),
    [
        ("next_token", "blocks", (1, 1, 1, 8)),
        ("smoothed_pairwise", "blocks", (1, 1, 1, 8)),
        ("judge", "blocks", (2, 1, 1, 4)),
        ("judge_full_vocab", "xla", (1, 2, 2, 2)),
        ("bradley_terry", "xla", (1, 2, 2, 2)),
    ],
)
def test_loss_and_gradients_are_those_of_whole_rows(name, backend, sizes):
    expected, wanted = loss_and_gradients(name, backend, None)
    found, gradient = loss_and_gradients(name, backend, sizes)
    assert found == pytest.approx(expected, rel=1e-5)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(wanted))
    assert largest > 0.1

    def close(path, ours, theirs):
        np.testing.assert_allclose(
            ours, theirs, rtol=0, atol=1e-5 * largest, err_msg=weight_dims(path)
        )

    jax.tree_util.tree_map_with_path(close, gradient, wanted)


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_each_device_has_the_same_share_of_a_causal_row(devices):
    """In pairs of a query and a key that it sees."""
    own = places(T, devices)
    np.testing.assert_array_equal(np.sort(own.reshape(-1)), np.arange(T))
    assert len({int(seen) for seen in (own + 1).sum(axis=1)}) == 1


def test_a_place_is_found_in_stripes():
    rng = np.random.default_rng(0)
    row = rng.normal(size=(B, T, 3)).astype(np.float32)
    wanted = rng.integers(0, T, (B, 12)).astype(np.int32)
    with jax.set_mesh(tiny.mesh(2, 1, 1, 4)):
        stripes = striped(row)
        read = [at_places(stripes, wanted, dims) for dims in ("BMD", "BSD")]
    np.testing.assert_array_equal(stripes, row[:, places(T, 4).reshape(-1)])
    for found in read:
        np.testing.assert_array_equal(found, np.take_along_axis(row, wanted[..., None], axis=1))


def test_rows_that_are_scored_divide_by_the_devices_of_a_row():
    mesh, model = AbstractMesh((1, 1, 1, 8), AXES), tiny.config(max_position=16384)
    tokenizer = Tokenizer.train(["a b c"], 264)
    chosen = RewardSettings(max_length=8200).resolved(model, tokenizer, mesh)
    assert (chosen.row_length, chosen.max_length) == (8208, 8200)
    with pytest.raises(UserError, match=r"row_length=2100 does not divide .* 2 x context=16"):
        RewardSettings(row_length=2100).resolved(model, tokenizer, mesh)
