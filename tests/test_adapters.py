"""Runs that train a part of the model: stored, resumed, loaded merged, exported for transformers
and peft."""

import contextlib
import dataclasses
import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import peer_models
import peft
import pytest
import tiny
import torch
import transformers

from gram_jax.checkpoints import RunInfo, load_model, load_state
from gram_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    ObjectiveConfig,
    OptimizerConfig,
    TrainConfig,
)
from gram_jax.errors import UserError
from gram_jax.loop import run_stage
from gram_jax.model_card import export_checkpoint
from gram_jax.models.adapters import adapters_of, attach, merged
from gram_jax.models.decoder import abstract_decoder
from gram_jax.peft_folder import export_adapter
from gram_jax.readouts import Readout, read
from gram_jax.reporting import read_metrics
from gram_jax.rows import Batch
from gram_jax.saving import CheckpointStore
from gram_jax.training import init_state, make_optimizer, merge_model, split_model

TOKENS = np.random.default_rng(5).integers(3, peer_models.VOCAB, (8, 12)).astype(np.int32)


# States.

STATES = {
    "lora": TrainConfig(lora_rank=3, lora_targets=("q", "o", "down")),
    "last_blocks": TrainConfig(last_blocks=1),
    "head_only": TrainConfig(head_only=True),
}


def config_of(kind):
    return Config(
        model=tiny.config(),
        train=STATES[kind],
        objective=ObjectiveConfig(name="bradley_terry"),
    )


def state_of(kind, sizes, seed=0, dtype="float32"):
    """A state as in training, all its numbers random, its frozen weights too; and its structure."""
    mesh, config = tiny.mesh(*sizes), config_of(kind)
    model = attach(abstract_decoder(config.model, tiny.COMPUTE, mesh), adapters_of(config), 0)
    rng = np.random.default_rng(seed)

    def fill(leaf):
        noise = rng.normal(size=leaf.shape).astype(np.float32)
        return jax.device_put(jnp.asarray(noise, dtype), leaf.sharding)

    graph, trainable, frozen = split_model(jax.tree.map(fill, model), config.train)
    with jax.set_mesh(mesh):
        state = init_state(make_optimizer(OptimizerConfig(), 10), trainable, frozen)
    return graph, state


@pytest.mark.skipif(jax.device_count() != 8, reason="needs eight devices")
@pytest.mark.parametrize("kind", STATES)
def test_a_state_comes_back_on_another_mesh_and_dtype_and_loads_as_one_model(kind, tmp_path):
    graph, state = state_of(kind, (2, 2, 2))
    names = {leaf.dtype.name for leaf in jax.tree.leaves(state.trainable)}
    assert names == {"float32"}
    info = RunInfo(config_of(kind), 1, {"loss": 1.0}, None, {})
    with CheckpointStore(tmp_path, CheckpointConfig()) as store:
        store.save(1, state, info, peer_models.tokenizer(64))
        store.finish()
    folder = tmp_path / "checkpoints" / "1"
    for sizes, dtype in (((1, 8, 1), "float32"), ((1, 1, 1), "bfloat16")):
        target = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
            state_of(kind, sizes, seed=9, dtype=dtype)[1],
        )
        loaded = load_state(folder, target)
        for ours, stored, wanted in zip(
            *(jax.tree.leaves(tree) for tree in (loaded, state, target)), strict=True
        ):
            assert ours.sharding == wanted.sharding
            np.testing.assert_array_equal(ours, np.asarray(stored).astype(wanted.dtype))
    for mesh in (None, tiny.mesh(2, 2, 2)):
        model = load_model(folder, tiny.COMPUTE, mesh).model
        copy = jax.tree.map(jnp.copy, merge_model(graph, state.trainable, state.frozen))
        expected = merged(copy.joined_stacks())
        plain = attach(abstract_decoder(tiny.config(), tiny.COMPUTE, mesh), adapters_of(
            dataclasses.replace(config_of(kind), train=TrainConfig())
        ), 0)  # fmt: skip
        assert jax.tree.structure(model) == jax.tree.structure(plain)
        for ours, theirs, described in zip(
            *(jax.tree.leaves(tree) for tree in (model, expected, plain)), strict=True
        ):
            assert ours.sharding == described.sharding
            # The product A B of another mesh is added up in another order.
            np.testing.assert_allclose(ours, np.asarray(theirs), rtol=0, atol=2e-6)


# Runs.


@pytest.fixture(scope="module")
def base(peer_model):
    """The model that runs start from: a Hugging Face folder of float32 weights."""
    return peer_model("llama-biases")[1]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    rng = np.random.default_rng(0)

    def words(n):
        return " ".join(f"w{i}" for i in rng.integers(3, peer_models.VOCAB, n))

    rows = [
        {"prompt": words(4), "chosen": f"w7 {words(3)}", "rejected": f"w9 {words(3)}"}
        for _ in range(40)
    ]
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run_config(data, init_from, objective):
    return Config(
        init_from=str(init_from),
        compute=dataclasses.replace(tiny.COMPUTE),
        data=DataConfig(train=(str(data),), format="preferences", row_length=32),
        objective=ObjectiveConfig(name=objective, beta=0.3),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup=0.0),
        train=TrainConfig(length=4, batch_rows=8, lora_rank=4, lora_alpha=6.0),
        checkpoint=CheckpointConfig(every=2, keep_last=9),
    )


@pytest.fixture(scope="module")
def lora(data, base, tmp_path_factory):
    """The workdir of a run of four steps with LoRA on the base model."""
    workdir = tmp_path_factory.mktemp("lora")
    run_stage(run_config(data, base, "smoothed_pairwise"), workdir, quiet=True)
    return workdir


@pytest.fixture(scope="module")
def lora_export(lora, tmp_path_factory):
    """The run's model, merged, for transformers."""
    return export_checkpoint(lora, tmp_path_factory.mktemp("export") / "merged")


@pytest.fixture(scope="module")
def head(data, lora, tmp_path_factory):
    """Stage 2 once more, from the run above: LoRA anew, with a reward head."""
    workdir = tmp_path_factory.mktemp("head")
    run_stage(run_config(data, lora, "bradley_terry"), workdir, quiet=True)
    return workdir


def plain_batch():
    places = np.broadcast_to(np.arange(TOKENS.shape[1], dtype=np.int32), TOKENS.shape)
    last = np.full((len(TOKENS), 1), TOKENS.shape[1] - 1, np.int32)
    return Batch(
        tokens=TOKENS,
        positions=places,
        segment_ids=np.ones_like(TOKENS),
        branch_ids=np.zeros_like(TOKENS),
        readout_index=last,
    )


@jax.jit
def our_logits(model, batch):
    return jnp.einsum("btd,vd->btv", model(batch), model.unembedding_vd())


@jax.jit
def our_scores(model, batch):
    return read(model, batch, Readout("head", 1)).scores.score[:, 0]


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_training_moves_the_loss_from_that_of_the_base(lora):
    lines = read_metrics(lora, split="train")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_a_stopped_run_goes_on_to_the_same_bits_and_says_what_it_trains(
    data, base, lora, tmp_path, capsys
):
    shutil.copytree(lora, tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "4")
    run_stage(run_config(data, base, "smoothed_pairwise"), tmp_path / "cut")
    # Of each block: q 4 (32 + 32), k and v 4 (32 + 16), o as q, the others 4 (32 + 48).
    count = 2 * (4 * 64 + 8 * 48 + 4 * 64 + 12 * 80)
    assert f"trained: {count:,} parameters (down_lora_a, " in "".join(capsys.readouterr())
    ours, theirs = ([line["loss"] for line in read_metrics(w)] for w in (tmp_path / "cut", lora))
    assert ours == theirs
    parts = [load_model(w, tiny.COMPUTE, merge=False).model for w in (tmp_path / "cut", lora)]
    assert parts[0].stacks[0].q_lora_b[...].any()
    jax.tree.map(np.testing.assert_array_equal, *parts)


def test_what_is_loaded_is_merged_and_equals_the_parts_on_every_mesh(lora):
    with_parts = load_model(lora, tiny.COMPUTE, merge=False).model
    assert hasattr(with_parts.stacks[0], "q_lora_a")
    expected = np.asarray(our_logits(with_parts, plain_batch()))
    for mesh in (None, tiny.mesh(2, 2, 2)):
        model = load_model(lora, tiny.COMPUTE, mesh).model
        assert not hasattr(model.stacks[0], "q_lora_a")
        with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
            close(np.asarray(our_logits(model, plain_batch())), expected)


def test_the_export_gives_transformers_the_merged_model(base, lora, lora_export):
    ours = np.asarray(our_logits(load_model(lora, tiny.COMPUTE, merge=False).model, plain_batch()))
    close(peer_models.logits(peer_models.load(lora_export), TOKENS), ours)
    assert np.abs(ours - peer_models.logits(peer_models.load(base), TOKENS)).max() > 0.05


def test_the_adapter_folder_gives_peft_the_model_on_its_base(base, lora, tmp_path):
    folder = tmp_path / "adapter"
    command = [sys.executable, "-m", "gram_jax.export", "--adapter"]
    done = subprocess.run(
        [*command, f"--checkpoint={lora}", f"--output={folder}"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"written to {folder}\n")
    written = {path.name for path in folder.iterdir()}
    assert written >= {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    described = json.loads((folder / "adapter_config.json").read_text())
    assert described["base_model_name_or_path"] == str(base)
    assert (described["r"], described["lora_alpha"]) == (4, 6.0)
    ours = np.asarray(our_logits(load_model(lora, tiny.COMPUTE, merge=False).model, plain_batch()))
    model = peft.AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    close(peer_models.logits(model, TOKENS), ours)
    close(peer_models.logits(model.merge_and_unload(), TOKENS), ours)
    assert transformers.AutoTokenizer.from_pretrained(folder)("w5").input_ids[-1] == 5


@pytest.mark.filterwarnings("ignore:Some weights of")
def test_the_adapter_of_a_reward_head_is_peft_s_sequence_classifier(lora_export, head, tmp_path):
    """Its base is the merged model of the run that it began from."""
    with pytest.raises(UserError, match="is not a Hugging Face folder that peft could load"):
        export_adapter(head, tmp_path / "none")
    folder = export_adapter(head, tmp_path / "adapter", str(lora_export))
    options = {"num_labels": 1, "dtype": torch.float32}
    base = transformers.AutoModelForSequenceClassification.from_pretrained(lora_export, **options)
    model = peft.PeftModel.from_pretrained(base, folder).eval()
    ours = load_model(head, tiny.COMPUTE).model
    expected = np.asarray(our_scores(ours, plain_batch()))
    with torch.inference_mode():
        found = model(torch.tensor(TOKENS)).logits[:, 0].numpy()
    close(found, expected)
    assert np.std(expected) > 1e-3


def test_the_export_of_a_reward_head_gives_transformers_a_merged_classifier(head, tmp_path):
    folder = export_checkpoint(head, tmp_path / "classifier")
    auto = transformers.AutoModelForSequenceClassification
    model = auto.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        found = model(torch.tensor(TOKENS)).logits[:, 0].numpy()
    close(found, np.asarray(our_scores(load_model(head, tiny.COMPUTE).model, plain_batch())))


def test_a_run_from_a_lora_checkpoint_starts_from_the_merged_model(lora, head):
    """The weights that it holds frozen are the merged ones."""
    start, after = load_model(lora, tiny.COMPUTE).model, load_model(head, tiny.COMPUTE, merge=False)
    for name in ("q", "o", "down"):
        ours, theirs = (getattr(m.stacks[0], name)[...] for m in (after.model, start))
        # Merged on one device here, on eight when the run began.
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)
    assert after.model.stacks[0].q_lora_b[...].any()


def test_what_has_no_adapter_is_not_exported_as_one(base, data, lora, tmp_path):
    with pytest.raises(UserError, match="has no LoRA adapter; leave out --adapter"):
        export_adapter(base, tmp_path / "a")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    with pytest.raises(UserError, match="exists and is not an empty folder"):
        export_adapter(lora, tmp_path / "used")
    _, state = state_of("last_blocks", (1, 1, 1))
    info = RunInfo(config_of("last_blocks"), 1, {"loss": 1.0}, None, {})
    with CheckpointStore(tmp_path / "run", CheckpointConfig()) as store:
        store.save(1, state, info, peer_models.tokenizer(64))
        store.finish()
    with pytest.raises(UserError, match="has no LoRA adapter"):
        export_adapter(tmp_path / "run", tmp_path / "b")
    assert not (tmp_path / "b").exists()
