"""Both stages on real text: what is written, what a resumed run repeats, and what stops one."""

import dataclasses
import functools
import itertools
import json
import math
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny

from gram_jax.checkpoints import find_step_folder, load_model, read_run_info
from gram_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    ObjectiveConfig,
    OptimizerConfig,
    TrainConfig,
)
from gram_jax.data.builtin import reference_topics
from gram_jax.data.loader import RowOrder
from gram_jax.data.rowset import Rows, RowSet
from gram_jax.data.tokenizer import Tokenizer
from gram_jax.errors import UserError
from gram_jax.loop import NotFinite, num_steps, run_stage
from gram_jax.objectives import objective
from gram_jax.reporting import read_metrics
from gram_jax.rows import Example
from gram_jax.scorer import RewardSettings
from gram_jax.scoring import score_examples, scoring_shape
from gram_jax.scoring_job import ScoringJob, run_job

V = 320


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Python's reference as texts; pairs of a text's continuation and another's; a tokenizer."""
    folder = tmp_path_factory.mktemp("data")
    texts = [" ".join(topic.text.split()) for topic in reference_topics()][:40]
    Tokenizer.train(texts, V).save(folder / "tokenizer")
    write(folder / "train.jsonl", [{"text": text[:400]} for text in texts[:30]])
    write(folder / "validation.jsonl", [{"text": text[:300]} for text in texts[30:]])
    pairs = [
        {"prompt": one[:30], "chosen": one[30:80], "rejected": other[30:90]}
        for one, other in itertools.pairwise(texts)
    ]
    write(folder / "pairs.jsonl", pairs)
    return folder


def text_config(data, **changes):
    """A config for eight steps of pretraining; ``section__field=value`` changes it."""
    config = Config(
        tokenizer=str(data / "tokenizer"),
        model=tiny.config(vocab_size=V),
        compute=dataclasses.replace(tiny.COMPUTE),
        data=DataConfig(
            train=(str(data / "train.jsonl"),),
            validation=(str(data / "validation.jsonl"),),
            row_length=64,
        ),
        optimizer=OptimizerConfig(learning_rate=3e-3),
        train=TrainConfig(length=8.0, batch_rows=8, validate_every=2, validation_rows=11),
        checkpoint=CheckpointConfig(every=2, keep_last=1, keep_every=4, keep_best=False),
    )
    return change(config, changes)


def pair_config(data, init_from, **changes):
    """A config for fine-tuning on the pairs."""
    config = Config(
        init_from=str(init_from),
        compute=dataclasses.replace(tiny.COMPUTE),
        data=DataConfig(train=(str(data / "pairs.jsonl"),), format="preferences", row_length=128),
        objective=ObjectiveConfig(name="smoothed_pairwise", beta=0.1),
        optimizer=OptimizerConfig(learning_rate=3e-3, schedule="constant", warmup=0.0),
        train=TrainConfig(length=2.0, length_unit="epochs", batch_rows=8),
        checkpoint=CheckpointConfig(every=100),
    )
    return change(config, changes)


def change(config, changes):
    for path, value in changes.items():
        section, _, name = path.rpartition("__")
        setattr(getattr(config, section) if section else config, name, value)
    return config


def steps_in(workdir):
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())


def weights(path):
    return jax.tree.map(np.asarray, load_model(path, tiny.COMPUTE).model)


@pytest.fixture(scope="module")
def pretrained(data, tmp_path_factory):
    """The workdir of a run of eight steps, never interrupted, and its result."""
    workdir = tmp_path_factory.mktemp("pretrain")
    return workdir, run_stage(text_config(data), workdir, quiet=True)


def test_pretraining_lowers_the_loss_and_writes_a_line_per_step(pretrained):
    workdir, result = pretrained
    assert result.steps == 8
    train = read_metrics(workdir, split="train")
    assert [row["step"] for row in train] == list(range(1, 9))
    assert train[0]["loss"] == pytest.approx(math.log(V), abs=0.3)
    assert train[-1]["loss"] < train[0]["loss"] - 0.1
    for row in train:
        assert row["loss"] == row["nll"]
        assert 0 < row["tokens"] <= 8 * 64
        assert row["grad_norm"] > 0
        assert row["tokens_per_second"] > 0
    assert {k: train[-1][k] for k in result.metrics} == result.metrics
    validation = read_metrics(workdir, split="validation")
    assert [row["step"] for row in validation] == [2, 4, 6, 8]
    assert {k: validation[-1][k] for k in result.validation} == result.validation
    assert list((workdir / "tensorboard").iterdir())


def test_the_validation_loss_is_that_of_the_rows(data, pretrained):
    """Eleven rows of all, in batches of eight: the last is filled up with rows without weight."""
    workdir, result = pretrained
    loaded, config = load_model(workdir, tiny.COMPUTE), text_config(data)
    rows = Rows([RowSet(workdir / "data" / "validation" / "0")])
    assert len(rows) > 11
    run = jax.jit(lambda model, batch: objective(model, batch, config.objective, None))
    total, (denominator, _) = run(loaded.model, rows.read(np.arange(11) * len(rows) // 11))
    assert result.validation["loss"] == pytest.approx(float(total / denominator), rel=1e-5)


def test_a_checkpoint_says_what_it_is(data, pretrained):
    workdir, result = pretrained
    folder = find_step_folder(workdir)
    assert folder == workdir / "checkpoints" / "8"
    info = read_run_info(folder)
    assert info.config == text_config(data)
    assert info.position == 8 * 8
    assert info.metrics == result.validation
    assert info.versions["jax"] == jax.__version__
    loaded = load_model(folder, tiny.COMPUTE)
    assert loaded.tokenizer.fingerprint() == Tokenizer.load(data / "tokenizer").fingerprint()


def cut_at(workdir, step, target):
    """A copy of a run as it stood when it was killed somewhere after this checkpoint."""
    shutil.copytree(workdir, target)
    for later in (s for s in steps_in(target) if s > step):
        shutil.rmtree(target / "checkpoints" / str(later))
    return target


def test_a_resumed_run_repeats_the_uninterrupted_one_to_the_bit(data, pretrained, tmp_path):
    whole, expected = pretrained
    workdir = cut_at(whole, 4, tmp_path / "run")
    assert steps_in(workdir) == [4]
    # How often it says something may change.
    result = run_stage(text_config(data, train__log_every=1), workdir, quiet=True)
    assert result.validation == expected.validation
    for split in ("train", "validation"):
        for ours, theirs in zip(
            read_metrics(workdir, split=split), read_metrics(whole, split=split), strict=True
        ):
            speed = {"tokens_per_second": 0.0, "time": 0.0}
            assert ours | speed == theirs | speed
    jax.tree.map(np.testing.assert_array_equal, weights(workdir), weights(whole))


def test_a_finished_run_started_again_does_nothing(data, pretrained):
    workdir, _ = pretrained
    before = (workdir / "metrics.jsonl").read_text()
    again = run_stage(text_config(data), workdir, quiet=True)
    assert (again.steps, again.metrics) == (8, {})
    assert (workdir / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, r"config\.seed: 0 -> 1"),
        ({"optimizer__learning_rate": 1e-3}, r"config\.optimizer\.learning_rate: 0\.003 -> 0\.001"),
        ({"train__batch_rows": 16}, r"config\.train\.batch_rows: 8 -> 16"),
    ],
)
def test_a_resumed_run_refuses_what_would_change_its_meaning(data, pretrained, changes, message):
    with pytest.raises(UserError, match=message):
        run_stage(text_config(data, **changes), pretrained[0], quiet=True)


def test_settings_that_a_resumed_run_changes_are_shown(data, pretrained, capsys):
    changed = text_config(data, train__log_every=3, checkpoint__keep_last=5)
    run_stage(changed, pretrained[0])
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("changed")]
    assert said == [
        "changed: config.train.log_every: 10 -> 3",
        "changed: config.checkpoint.keep_last: 1 -> 5",
    ]


def test_a_run_whose_newest_checkpoint_is_damaged_ends_as_if_it_were_not(
    data, pretrained, tmp_path, capsys
):
    config = text_config(data, checkpoint__keep_last=9, checkpoint__keep_every=0)
    run_stage(config, tmp_path / "all", quiet=True)
    workdir = cut_at(tmp_path / "all", 6, tmp_path / "run")
    (path,) = (workdir / "checkpoints" / "6").glob("optimizer/ocdbt*/d/*")
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 4
    path.write_bytes(damaged)
    run_stage(config, workdir, quiet=True)
    assert "the numbers in optimizer/opt_state/" in capsys.readouterr().err
    names = sorted(path.name for path in (workdir / "checkpoints").iterdir())
    assert names == ["2", "4", "6", "6.damaged", "8"]
    clocks = {"tokens_per_second": 0.0, "time": 0.0}
    ours, theirs = ([row | clocks for row in read_metrics(w)] for w in (workdir, pretrained[0]))
    assert ours == theirs
    jax.tree.map(np.testing.assert_array_equal, weights(workdir), weights(pretrained[0]))


def test_weights_that_overflow_in_a_finite_step_are_not_saved(data, tmp_path):
    """The loss and the gradient of the step are finite: what it makes of the weights is not."""
    config = text_config(
        data,
        optimizer__learning_rate=3.4e38,
        optimizer__schedule="constant",
        optimizer__warmup=0.0,
        optimizer__weight_decay=10.0,
        train__length=1.0,
        data__validation=(),
    )
    with pytest.raises(NotFinite, match=r"step 1: weights/trainable/\S+, .* not finite"):
        run_stage(config, tmp_path, quiet=True)
    (row,) = read_metrics(tmp_path)
    assert math.isfinite(row["loss"])
    assert math.isfinite(row["grad_norm"])
    assert steps_in(tmp_path) == []


def test_the_last_and_every_fourth_checkpoint_are_kept(pretrained):
    assert steps_in(pretrained[0]) == [4, 8]


def test_the_best_checkpoint_on_validation_is_kept(data, tmp_path):
    """With far too high a rate the loss rises, so the best is not the last."""
    config = text_config(
        data,
        optimizer__learning_rate=3.0,
        optimizer__warmup=0.0,
        optimizer__schedule="constant",
        train__length=5.0,
        train__validate_every=1,
        checkpoint__every=1,
        checkpoint__keep_last=1,
        checkpoint__keep_every=0,
        checkpoint__keep_best=True,
    )
    run_stage(config, tmp_path, quiet=True)
    losses = {row["step"]: row["loss"] for row in read_metrics(tmp_path, split="validation")}
    best = min(losses, key=losses.get)
    assert best < 5
    assert steps_in(tmp_path) == [best, 5]


def test_a_loss_that_is_not_finite_stops_the_run_and_is_never_saved(data, tmp_path):
    config = text_config(
        data,
        optimizer__learning_rate=1e30,
        optimizer__schedule="constant",
        optimizer__warmup=0.0,
        checkpoint__every=1,
        data__validation=(),
    )
    with pytest.raises(NotFinite) as error:
        run_stage(config, tmp_path, quiet=True)
    lines = read_metrics(tmp_path, split="train")
    step = len(lines) + 1
    assert step > 1
    assert all(math.isfinite(row["loss"]) for row in lines)
    message = str(error.value)
    assert message.startswith(f"step {step}: ")
    assert "loss is nan" in message or "grad_norm is" in message
    num_rows = len(RowSet(tmp_path / "data" / "train" / "0"))
    numbers = RowOrder([num_rows], config.seed).numbers((step - 1) * 8, 8).tolist()
    assert f"rows {numbers}" in message
    assert steps_in(tmp_path)[-1] == step - 1
    assert f"Nothing was saved since step {step - 1}" in message
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(weights(tmp_path)))


@pytest.mark.parametrize(
    ("length", "unit", "steps"),
    [
        (7.0, "steps", 7),
        (1.0, "epochs", 3),  # 20 rows in batches of 8
        (2.0, "epochs", 5),
        (0.4, "epochs", 1),
        (4000.0, "tokens", 10),  # 50 tokens a row, 400 a step
        (4001.0, "tokens", 11),
        (24.0, "pairs", 2),  # 1.5 pairs a row, 12 a step
        (25.0, "pairs", 3),
    ],
)
def test_the_length_of_a_run_in_each_unit(length, unit, steps):
    train = TrainConfig(length=length, length_unit=unit, batch_rows=8)
    assert num_steps(train, {"epochs": 1 / 20, "tokens": 50.0, "pairs": 1.5}) == steps


def test_a_length_in_pairs_needs_pairs():
    with pytest.raises(UserError, match=r"config\.train\.length_unit='pairs': the data has none"):
        num_steps(TrainConfig(length_unit="pairs"), {"pairs": 0.0})


@pytest.fixture(scope="module")
def scored(data, pretrained):
    """The pairs with the pretrained model's own log-probs, as the scoring job writes them."""
    output = data / "scored.jsonl"
    job = ScoringJob(
        input=str(data / "pairs.jsonl"), output=str(output), reward=RewardSettings(row_length=128)
    )
    run_job(job, lambda: load_model(pretrained[0], tiny.COMPUTE))
    return output


def test_against_its_own_scores_a_model_starts_at_log_2(data, pretrained, scored, tmp_path):
    config = pair_config(
        data,
        pretrained[0],
        data__train=(str(scored),),
        data__reference_field="logprob",
        objective__beta=1.0,
    )
    result = run_stage(config, tmp_path, quiet=True)
    lines = read_metrics(tmp_path, split="train")
    assert len(lines) == result.steps
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=2e-5)
    assert lines[0]["margin"] == pytest.approx(0, abs=1e-4)
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.01
    assert sum(row["pairs"] for row in lines) >= 2 * 39


def test_the_last_block_is_fine_tuned_on_a_pretrained_model(data, pretrained, tmp_path):
    config = pair_config(data, pretrained[0], train__last_blocks=1)
    run_stage(config, tmp_path, quiet=True)
    lines = read_metrics(tmp_path, split="train")
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert {"accuracy", "margin", "ranking_loss", "pairs"} <= lines[0].keys()
    old, new = weights(pretrained[0]), weights(tmp_path)
    for name in ("embedding", "unembedding"):
        np.testing.assert_array_equal(getattr(old, name)[...], getattr(new, name)[...])
    before, after = old.stacks[0].q[...], new.stacks[0].q[...]
    np.testing.assert_array_equal(before[0], after[0])
    assert (before[1] != after[1]).any()
    loaded = load_model(tmp_path, tiny.COMPUTE)
    assert loaded.config.train.last_blocks == 1
    prompt, response = (np.array(ids, np.int32) for ids in ([0, 5, 6], [7, 8, 1]))
    found, base = (
        next(iter(score_examples(m, [Example(prompt, (response,))], scoring_shape(64), 1)))
        for m in (loaded.model, load_model(pretrained[0], tiny.COMPUTE).model)
    )
    assert math.isfinite(found.score)
    assert found.score != base.score


def test_a_run_that_trains_the_last_block_can_be_resumed(data, pretrained, tmp_path):
    options = {"train__last_blocks": 1, "checkpoint__every": 2, "checkpoint__keep_last": 9}
    config = pair_config(data, pretrained[0], **options)
    whole = tmp_path / "whole"
    run_stage(config, whole, quiet=True)
    workdir = cut_at(whole, 2, tmp_path / "cut")
    run_stage(config, workdir, quiet=True)
    ours, theirs = ([row["loss"] for row in read_metrics(w)] for w in (workdir, whole))
    assert len(theirs) > 2
    assert ours == theirs
    jax.tree.map(np.testing.assert_array_equal, weights(workdir), weights(whole))


def test_a_run_needs_a_tokenizer_that_its_model_covers(data, tmp_path):
    with pytest.raises(UserError, match=r"set config\.tokenizer"):
        run_stage(text_config(data, tokenizer=""), tmp_path / "a", quiet=True)
    small = text_config(data, model=tiny.config(vocab_size=64))
    with pytest.raises(UserError, match=r"has \d+ ids, but config\.model\.vocab_size is 64"):
        run_stage(small, tmp_path / "b", quiet=True)


def test_rows_that_the_mesh_cannot_share_are_an_error(data, tmp_path):
    with pytest.raises(UserError, match="rows computed at once=4 does not divide"):
        run_stage(text_config(data, train__accumulate=2), tmp_path, quiet=True)


@pytest.fixture(scope="module")
def recipe(data, tmp_path_factory):
    """A config file for two steps, as a user would write it."""
    path = tmp_path_factory.mktemp("recipe") / "recipe.py"
    path.write_text(
        "from gram_jax.config import *\n"
        "def get_config(data):\n"
        "    return Config(\n"
        "        tokenizer=data + '/tokenizer',\n"
        f"        model=ModelConfig(vocab_size={V}, hidden_size=32, num_layers=1, num_heads=2,\n"
        "            num_kv_heads=2, head_dim=8, intermediate_size=48),\n"
        "        data=DataConfig(train=(data + '/train.jsonl',), row_length=64),\n"
        "        train=TrainConfig(length=2.0, batch_rows=4))\n"
    )
    return f"--config={path}:{data}"


@functools.cache
def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", *arguments], capture_output=True, text=True, timeout=120
    )


def test_the_command_trains_and_takes_overrides(recipe, tmp_path):
    arguments = ("gram_jax.pretrain", recipe, f"--workdir={tmp_path}", "--config.seed=7")
    done = command(*arguments)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("done: 2 steps, loss ")
    assert str(tmp_path) in done.stdout
    assert read_run_info(find_step_folder(tmp_path)).config.seed == 7
    again = subprocess.run(
        [sys.executable, "-m", *arguments], capture_output=True, text=True, timeout=120
    )
    assert again.returncode == 0, again.stderr[-2000:]
    assert again.stdout.startswith("complete already: 2 steps")


def test_a_setting_that_does_not_exist_ends_the_command_with_the_nearest_one(recipe, tmp_path):
    found = command(
        "gram_jax.pretrain", recipe, f"--workdir={tmp_path}", "--config.optimizer.learning_rat=1"
    )
    assert found.returncode == 2
    assert found.stderr.strip().endswith(
        "error: config.optimizer.learning_rat is not a setting; did you mean"
        " config.optimizer.learning_rate?"
    )


def test_a_value_of_the_wrong_type_ends_the_command_with_its_name(recipe, tmp_path):
    found = command(
        "gram_jax.pretrain", recipe, f"--workdir={tmp_path}", "--config.train.batch_rows=many"
    )
    assert found.returncode not in (0, None)
    assert "config.train.batch_rows" in found.stdout + found.stderr
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize("module", ["gram_jax.pretrain", "gram_jax.finetune"])
def test_help_shows_what_the_module_is_for(module):
    found = command(module, "--help")
    assert found.returncode == 0
    assert f"python -m {module} --config=configs/" in found.stdout
    assert "--workdir" in found.stdout
    assert "CHECKPOINT" in found.stdout or "Stage 1" in found.stdout
