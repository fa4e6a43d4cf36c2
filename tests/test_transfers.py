"""The loop and the engine move nothing between host and device but what they mean to."""

import json

import jax
import numpy as np
import pytest
import tiny

from gram_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    OptimizerConfig,
    TrainConfig,
)
from gram_jax.data.tokenizer import Tokenizer
from gram_jax.loop import _Stage
from gram_jax.mesh import make_mesh, no_surprises, put
from gram_jax.packing import pack
from gram_jax.saving import CheckpointStore
from gram_jax.scoring import BatchShape, RowBatch, score_batches, scoring_shape
from gram_jax.signals import StopRequest

SHAPE = scoring_shape(64)


def on_host(tree):
    return jax.tree.map(np.asarray, tree)


@pytest.fixture(scope="module")
def stage_config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    texts = [f"{name} is a word of {len(name)} letters" for name in dir(str)]
    Tokenizer.train(texts, 280).save(folder / "tokenizer")
    (folder / "train.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return Config(
        tokenizer=str(folder / "tokenizer"),
        model=tiny.config(vocab_size=280),
        compute=tiny.COMPUTE,
        data=DataConfig(train=(str(folder / "train.jsonl"),), row_length=64),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        train=TrainConfig(length=3.0, batch_rows=8),
        checkpoint=CheckpointConfig(every=100),
    )


def run(config, workdir, change):
    """A stage's loop, of which ``change`` has changed something first."""
    mesh = make_mesh(config.mesh)
    with (
        StopRequest() as stop,
        jax.set_mesh(mesh),
        CheckpointStore(workdir, config.checkpoint) as store,
    ):
        stage = _Stage(config, workdir, mesh, store, stop, quiet=True)
        change(stage)
        return stage.run()


def test_the_loop_moves_only_what_it_means_to(stage_config, tmp_path):
    assert run(stage_config, tmp_path, lambda stage: None).steps == 3


def test_the_loop_notices_a_state_that_is_left_on_the_host(stage_config, tmp_path):
    def leave_behind(stage):
        stage.state = on_host(stage.state)

    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        run(stage_config, tmp_path, leave_behind)


@pytest.mark.parametrize("sizes", [None, (2, 2, 2)], ids=str)
def test_the_engine_notices_a_model_that_is_left_on_the_host(sizes):
    mesh = tiny.mesh(*sizes) if sizes else None
    model = tiny.decoder(mesh=mesh)
    rows = list(pack(tiny.text_examples(0, 20), SHAPE))
    batches = [RowBatch(some, BatchShape(SHAPE, 4)) for some in (rows[:4], rows[4:8])]
    found = list(score_batches(model, batches, mesh=mesh))
    assert sum(map(len, found)) == sum(len(row.origins) for batch in batches for row in batch.rows)
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        list(score_batches(on_host(model), batches, mesh=mesh))


def test_placing_a_batch_is_meant(tmp_path):
    batch = np.arange(8, dtype=np.int32).reshape(8, 1)
    mesh = tiny.mesh(4, 2, 1)
    with no_surprises():
        placed = put(batch, mesh)
        with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
            placed + batch
    assert np.array_equal(placed, batch)
