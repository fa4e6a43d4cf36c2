"""Commands run by several processes, through launch/local.sh, and what their results must be.

Shared by the tests of several processes; the model is tiny, and all of them use the same one.
"""

import io
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from gram_jax.checkpoints import load_model
from gram_jax.config import ComputeConfig, MeshConfig
from gram_jax.data.tokenizer import Tokenizer
from gram_jax.distributed import process_count
from gram_jax.evaluation_job import EvaluationJob, run_evaluation
from gram_jax.models.decoder import weight_name
from gram_jax.piecework import by_pieces, own_mesh
from gram_jax.ranking_by_pieces import rank_pieces
from gram_jax.ranking_job import Engine, RankingJob, run_ranking
from gram_jax.scorer import RewardSettings, Scorer
from gram_jax.scoring_by_pieces import run_pieces
from gram_jax.scoring_job import ScoringJob, run_job

ROOT = Path(__file__).parents[1]
LAUNCH = [str(ROOT / "launch" / "local.sh")]
TIMEOUT = 240
"""Seconds for any command here: ten times what the slowest takes on two idle cores."""

PRETRAIN = """
from gram_jax.config import *

def get_config(data):
    model = ModelConfig(
        vocab_size=264, hidden_size=32, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=16,
        intermediate_size=32, max_position=64,
    )
    return Config(
        tokenizer=f"{data}/tokenizer",
        model=model,
        data=DataConfig(train=(f"{data}/text.jsonl",), row_length=64),
        train=TrainConfig(length=6, batch_rows=8, log_every=1),
        checkpoint=CheckpointConfig(every=3),
    )
"""
FINETUNE = """
from gram_jax.config import *

def get_config(data):
    return Config(
        init_from=f"{data}/one",
        data=DataConfig(
            format="preferences", train=(f"{data}/pairs.jsonl",), row_length=64, row_sequences=8,
            row_pairs=4,
        ),
        objective=ObjectiveConfig(name="smoothed_pairwise", chosen_ce=1.0),
        train=TrainConfig(length=3, batch_rows=8, log_every=1),
        checkpoint=CheckpointConfig(every=100),
    )
"""


def make_work(folder):
    """Puts data, a tokenizer and the configs of two stages into a folder."""
    texts = [f"Number {i} is followed by number {i + 1}." for i in range(120)]
    write(folder / "text.jsonl", [{"text": text} for text in texts])
    pairs = [
        {"prompt": f"What follows {i}?", "chosen": f"Number {i + 1}.", "rejected": f"Not {i}."}
        for i in range(60)
    ]
    write(folder / "pairs.jsonl", pairs)
    Tokenizer.train(texts, 264).save(folder / "tokenizer")
    (folder / "pretrain.py").write_text(PRETRAIN)
    (folder / "finetune.py").write_text(FINETUNE)
    return folder


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read(path):
    return [json.loads(line) for line in path.read_bytes().splitlines()]


# A shell cannot trap what it was started ignoring, and jobs in the background ignore SIGINT.
HEARS_SIGINT = [
    sys.executable,
    "-c",
    "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL);"
    " os.execvp(sys.argv[1], sys.argv[1:])",
]


def start(command, processes=2, **environment):
    """Processes that compute together, through the launcher."""
    fast = {
        # As in conftest.py: what one test compiles, the next finds; but on CPU process 0 alone.
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
        # The time goes into compiling, for next to no computation.
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
    }
    return subprocess.Popen(
        [*HEARS_SIGINT, *LAUNCH, str(processes), *map(str, command)],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", **fast, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process):
    """Its status, standard output and standard error."""
    try:
        out, err = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        for _ in range(2):  # the second ends a process that has not noticed the first
            process.terminate()
            time.sleep(1)
        pytest.fail(f"not done after {TIMEOUT} s: {process.communicate(timeout=10)}")
    return process.returncode, out, err


def run(module, *flags, expected=0, **settings):
    status, out, err = end(start([sys.executable, "-m", f"gram_jax.{module}", *flags], **settings))
    assert status == expected, f"status {status}\n{out}\n{err}"
    return out, err


def train(work, stage, name, *flags, **settings):
    """Runs a stage in the folder of that name; returns what was said."""
    config = f"--config={work}/{stage}.py:{work}"
    return run(stage, config, f"--workdir={work}/{name}", *flags, **settings)


def losses(workdir):
    lines = [line for line in read(workdir / "metrics.jsonl") if line["split"] == "train"]
    steps = [line["step"] for line in lines]
    assert steps == sorted(set(steps)), "each step is logged once, by one process"
    return {line["step"]: (line["loss"], line["grad_norm"]) for line in lines}


def check_same_losses(workdir, expected):
    found, expected = losses(workdir), losses(expected)
    assert found.keys() == expected.keys()
    for step in expected:
        assert found[step] == pytest.approx(expected[step], rel=1e-5)


def check_same_weights(checkpoint, expected):
    models = [load_model(path, ComputeConfig()).model for path in (checkpoint, expected)]
    found, expected = (jax.tree_util.tree_leaves_with_path(model) for model in models)
    for (path, a), (_, b) in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5, err_msg=weight_name(path))


def before_the_end(workdir, copy):
    shutil.copytree(workdir, copy)
    shutil.rmtree(copy / "checkpoints" / "6")
    return copy


def rows_to_score(count):
    rows = []
    for i in range(count):
        row = {"id": i, "prompt": f"What follows {i // 4}?"}
        if i % 3 == 0:
            row |= {"chosen": f"Number {i + 1}.", "rejected": "No, no"}
        elif i % 3 == 1:
            row |= {"responses": ["a b", "Number", "a b"]}
        else:
            row |= {"response": f"{i} then"}
        rows.append(row)
    return rows


def rows_to_rank(count):
    rows = []
    for i in range(count):
        responses = [f"Number {i + k}." for k in range(i % 3 + 1)]
        rows.append({"id": i, "prompt": f"What follows {i}?", "responses": responses})
        if i % 2:
            rows[-1]["best_response"] = 0
    return rows


def pairs_to_evaluate(count):
    return [
        {
            "prompt": f"What follows {i // 2}?",
            "chosen": f"Number {i + 1}.",
            "rejected": f"Not {i}, no.",
            "subset": f"s{i % 3}",
        }
        for i in range(count)
    ]


def score_rows(folder, checkpoint, name, stream=None):
    job = ScoringJob(
        input=f"{folder}/score.jsonl", output=f"{folder}/{name}.scores", reward=SETTINGS
    )
    load, mesh = loader(checkpoint)
    if by_pieces(job.output, MeshConfig()):
        return run_pieces(job, load, mesh=mesh, stream=stream)
    return run_job(job, load, mesh=mesh, stream=stream)


def rank_rows(folder, checkpoint, name, stream=None):
    job = RankingJob(input=f"{folder}/rank.jsonl", output=f"{folder}/{name}.ranks")
    load, mesh = loader(checkpoint)
    do = rank_pieces if by_pieces(job.output, MeshConfig()) else run_ranking
    return do(job, lambda: Engine.of(Scorer(load(), SETTINGS, mesh)), stream=stream)


def evaluate_pairs(folder, checkpoint, name, stream=None):
    job = EvaluationJob(
        checkpoint="c", data=(f"{folder}/evaluate.jsonl",), output=f"{folder}/{name}"
    )
    load, mesh = loader(checkpoint)
    return run_evaluation(job, lambda: Engine.of(Scorer(load(), SETTINGS, mesh)), stream=stream)


SETTINGS = RewardSettings(row_length=64, batch_rows=2)
ONE_JOB = {"score": score_rows, "rank": rank_rows, "evaluate": evaluate_pairs}


def loader(checkpoint):
    """What loads a checkpoint, and the mesh that it is loaded on: this process's, if there are
    several, else one device."""
    mesh = own_mesh(MeshConfig()) if process_count() > 1 else None
    return lambda: load_model(checkpoint, ComputeConfig(), mesh), mesh


def all_jobs(folder, checkpoint, name):
    """Scores, ranks and evaluates, as this process or as one of many."""
    for job in ONE_JOB.values():
        job(folder, checkpoint, name, io.StringIO())


class Interrupted(io.StringIO):
    """A console at which Ctrl-C is pressed when so many pieces lie in a folder."""

    def __init__(self, folder, pieces):
        super().__init__()
        self.folder, self.pieces = folder, pieces

    def write(self, text):
        if len(list(self.folder.glob("0*.json"))) >= self.pieces:
            raise KeyboardInterrupt
        return super().write(text)


def check_same_rows(found, expected):
    """Rows of `rank` or `evaluate`: numbers to 1e-5, all else to the letter."""
    assert len(found) == len(expected) > 0
    for a, b in zip(found, expected, strict=True):
        assert a.keys() == b.keys()
        rewards = [abs(reward) for reward in b["rewards"]]
        for name, value in b.items():
            if name in ("rewards", "margin", "p"):
                atol = 2e-5 * max(1, *rewards)
                np.testing.assert_allclose(a[name], value, rtol=0, atol=atol)
            else:
                assert a[name] == value


def check_same_scores(found, expected):
    assert [row["id"] for row in found] == [row["id"] for row in expected]
    for a, b in zip(found, expected, strict=True):
        assert a.keys() == b.keys()
        assert a["num_tokens"] == b["num_tokens"]
        np.testing.assert_allclose(a["logprob"], b["logprob"], rtol=1e-5)


def wait_until(condition, process):
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            pytest.fail(f"did not get there: {end(process)}")
        time.sleep(0.05)
