"""A run goes on where it stopped on another mesh, with another number of devices."""

import dataclasses
import json
import shutil

import jax
import pytest

from gram_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    TrainConfig,
)
from gram_jax.data.tokenizer import Tokenizer
from gram_jax.loop import run_stage

MODEL = ModelConfig(
    vocab_size=264,
    hidden_size=32,
    num_layers=1,
    num_heads=2,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=32,
    max_position=64,
)
WHOLE = MeshConfig(data=-1)
CUT = MeshConfig(data=2, fsdp=2, tensor=2)
LONG = MeshConfig(data=1, fsdp=2, context=4)


def losses(workdir):
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if line["split"] == "train"}


@pytest.mark.skipif(jax.device_count() != 8, reason="needs eight devices")
@pytest.mark.parametrize(("begun", "resumed"), [(WHOLE, CUT), (LONG, CUT)], ids=str)
def test_a_run_goes_on_on_another_mesh(tmp_path, begun, resumed):
    texts = [f"Number {i} is followed by number {i + 1}." for i in range(60)]
    data = tmp_path / "text.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    Tokenizer.train(texts, MODEL.vocab_size).save(tmp_path / "tokenizer")
    config = Config(
        tokenizer=str(tmp_path / "tokenizer"),
        model=MODEL,
        mesh=begun,
        data=DataConfig(train=(str(data),), row_length=64),
        train=TrainConfig(length=4, batch_rows=8),
        checkpoint=CheckpointConfig(every=2),
    )
    run_stage(config, tmp_path / "one", quiet=True)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    shutil.rmtree(tmp_path / "two" / "checkpoints" / "4")
    run_stage(dataclasses.replace(config, mesh=resumed), tmp_path / "two", quiet=True)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
