"""A run keeps the rows it began with; `prepare` makes those that runs use."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

from gram_jax.checkpoints import load_model
from gram_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    MeshConfig,
    OptimizerConfig,
    TrainConfig,
)
from gram_jax.data.builtin import reference_topics
from gram_jax.data.rowset import Rows, RowSet
from gram_jax.data.tokenizer import Tokenizer
from gram_jax.errors import DataError, UserError
from gram_jax.loop import run_stage
from gram_jax.objectives import objective
from gram_jax.reporting import read_metrics

V = 300


@pytest.fixture
def data(tmp_path):
    texts = [" ".join(topic.text.split())[:300] for topic in reference_topics()[:30]]
    Tokenizer.train(texts, V).save(tmp_path / "tokenizer")
    write(tmp_path / "train.jsonl", texts)
    return tmp_path


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def config(data, length=4.0, **options):
    return Config(
        tokenizer=str(data / "tokenizer"),
        model=tiny.config(vocab_size=V),
        compute=tiny.COMPUTE,
        mesh=MeshConfig(data=8),
        data=DataConfig(train=(str(data / "train.jsonl"),), row_length=64, workers=1, **options),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        train=TrainConfig(length=length, batch_rows=8),
        checkpoint=CheckpointConfig(every=2),
    )


def begin(data, workdir):
    """A run of four steps whose last checkpoint is lost, so that there are steps left."""
    run_stage(config(data), workdir, quiet=True)
    shutil.rmtree(workdir / "checkpoints" / "4")


def losses(workdir):
    return [row["loss"] for row in read_metrics(workdir, split="train")]


def test_a_run_does_not_go_on_with_a_source_that_has_changed(data):
    begin(data, data / "run")
    texts = [json.loads(x)["text"] for x in (data / "train.jsonl").read_text().split("\n")[:-1]]
    write(data / "train.jsonl", texts[::-1])
    with pytest.raises(UserError, match=r"train\.jsonl has changed"):
        run_stage(config(data), data / "run", quiet=True)
    # Prepared again, they would still be other rows than those that the run has begun with.
    shutil.rmtree(data / "run" / "data")
    with pytest.raises(UserError, match="not those that this run has begun with"):
        run_stage(config(data), data / "run", quiet=True)
    write(data / "train.jsonl", texts)
    shutil.rmtree(data / "run" / "data")
    run_stage(config(data), data / "run", quiet=True)


def test_a_run_goes_on_where_its_source_has_moved_or_is_gone(data):
    begin(data, data / "run")
    whole = losses(data / "run")
    (data / "train.jsonl").rename(data / "moved.jsonl")
    run_stage(config(data), data / "run", quiet=True)
    assert losses(data / "run") == whole
    shutil.rmtree(data / "run" / "checkpoints" / "4")
    moved = config(data)
    moved.data.train = (str(data / "moved.jsonl"),)
    run_stage(moved, data / "run", quiet=True)
    assert losses(data / "run") == whole


def test_before_the_first_checkpoint_other_settings_make_other_rows(data, capfd):
    bad = config(data)
    bad.mesh = MeshConfig(data=8)
    bad.train.batch_rows = 4  # fails after the rows were made: eight devices cannot share four rows
    with pytest.raises(UserError, match="does not divide"):
        run_stage(bad, data / "run", quiet=True)
    assert (data / "run" / "data" / "train" / "0" / "manifest.json").exists()
    shorter = config(data)
    shorter.data.row_length = 32
    run_stage(shorter, data / "run")
    assert "preparing again: config.data.row_length was 64 and is 32" in capfd.readouterr().err


def test_validation_rows_are_spread_over_all_sources(data):
    """Packing puts long examples first: the first rows are those of one kind, of one source."""
    texts = [" ".join(topic.text.split()) for topic in reference_topics()[30:50]]
    write(data / "long.jsonl", [text[:600] for text in texts[:10]])
    write(data / "short.jsonl", [text[:90] for text in texts])
    asked = config(data, length=1.0)
    asked.data.validation = (str(data / "long.jsonl"), str(data / "short.jsonl"))
    asked.train.validation_rows = 5
    found = run_stage(asked, data / "run", quiet=True).validation
    rows = Rows([RowSet(data / "run" / "data" / "validation" / name) for name in "01"])
    numbers = [place * len(rows) // 5 for place in range(5)]
    assert numbers[0] == 0 and numbers[1] < rows.sizes[0] <= numbers[-1] < len(rows)
    batch = rows.read(np.array(numbers))
    model = load_model(data / "run", tiny.COMPUTE).model
    total, (denominator, sums) = objective(model, batch, asked.objective, None)
    assert found["tokens"] == sums["tokens"]
    assert found["loss"] == pytest.approx(float(total / denominator), rel=1e-5)
    # As many as there are, or more: all of them, in order.
    asked.train.validation_rows = len(rows)
    every = run_stage(asked, data / "all", quiet=True).validation
    assert every["tokens"] == sum(one.manifest.packed["tokens"] for one in rows.sets)


def test_a_run_goes_on_with_other_validation_data(data, capfd):
    texts = [" ".join(topic.text.split())[:200] for topic in reference_topics()[30:50]]
    write(data / "a.jsonl", texts[:5])
    write(data / "b.jsonl", texts[5:])
    asked = config(data)
    asked.data.validation = (str(data / "a.jsonl"),)
    run_stage(asked, data / "run", quiet=True)
    train = (data / "run" / "data" / "train" / "0" / "manifest.json").read_bytes()
    shutil.rmtree(data / "run" / "checkpoints" / "4")
    whole = losses(data / "run")
    asked.data.validation = (str(data / "b.jsonl"),)
    found = run_stage(asked, data / "run").validation
    said = capfd.readouterr().err
    assert "validation/0: preparing again" in said
    assert f"changed: config.data.validation: ('{data / 'a.jsonl'}',) -> " in said
    manifest = RowSet(data / "run" / "data" / "validation" / "0").manifest
    assert manifest.sources[0]["spec"] == str(data / "b.jsonl")
    assert found["tokens"] == manifest.packed["tokens"]
    assert (data / "run" / "data" / "train" / "0" / "manifest.json").read_bytes() == train
    assert losses(data / "run") == whole
    # Of a folder that other runs may be using, nothing is replaced.
    shared = config(data, prepared=str(data / "run" / "data"))
    shared.data.validation = (str(data / "a.jsonl"),)
    shutil.rmtree(data / "run" / "checkpoints" / "4")
    with pytest.raises(UserError, match=r"validation/0: the prepared rows here are not those"):
        run_stage(shared, data / "run", quiet=True)


def test_a_damaged_row_stops_a_run_with_its_name(data):
    begin(data, data / "run")
    (shard,) = (data / "run" / "data" / "train" / "0").glob("*.array_record")
    content = bytearray(shard.read_bytes())
    for place in range(100, len(content) // 2, 100):  # so that no row is spared
        content[place] ^= 0xFF
    shard.write_bytes(content)
    with pytest.raises(DataError, match="delete the folder, so that it is prepared again"):
        run_stage(config(data), data / "run", quiet=True)


CONFIG = """
import sys
sys.path.insert(0, {tests!r})
import test_stage_rows
from pathlib import Path
def get_config(folder):
    return test_stage_rows.config(Path(folder))
"""


def test_the_command_prepares_rows_that_runs_use(data):
    (data / "recipe.py").write_text(CONFIG.format(tests=str(Path(__file__).parent)))
    command = [sys.executable, "-m", "gram_jax.prepare", f"--config={data / 'recipe.py'}:{data}",
               f"--output={data / 'rows'}"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "rows/s" in done.stderr
    assert "padding" in done.stdout
    assert "rows to train on" in done.stdout
    run_stage(config(data), data / "own", quiet=True)
    run_stage(config(data, prepared=str(data / "rows")), data / "shared", quiet=True)
    assert not (data / "shared" / "data").exists()
    assert losses(data / "own") == losses(data / "shared")
    ours, theirs = (load_model(data / name, tiny.COMPUTE).model for name in ("own", "shared"))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    # Other settings: an error, as other runs may be using the rows.
    again = subprocess.run(
        [*command, "--config.data.row_length=32"], capture_output=True, text=True, timeout=120
    )
    assert again.returncode == 2
    assert "config.data.row_length was 64 and is 32" in again.stderr


def test_a_source_of_one_stage_is_refused_by_the_other(data):
    wrong = config(data)
    wrong.objective.name = "smoothed_pairwise"
    with pytest.raises(DataError, match="rows are text, but the objective needs preferences"):
        run_stage(wrong, data / "run", quiet=True)
