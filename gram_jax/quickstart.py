"""From nothing to a scored, exported reward model: no network, no data, no accelerator.

  python -m gram_jax.quickstart [--workdir=runs/quickstart] [--seed=0] [--scale=1]

Data: docstrings of the installed Python. A reward model for them prefers an object's own docstring
to one that was damaged. The run trains a tokenizer, pretrains a small decoder on docstrings (stage
1), fine-tunes it on preference pairs with the smoothed pairwise loss (stage 2), scores held-out
pairs at initialisation and after each stage, exports a Hugging Face folder and checks that the
reloaded export gives the same log-probs. --scale=4 trains both stages four times as long.

It calls what you would call with your own data: the stages are those of gram_jax.pretrain and
gram_jax.finetune, the scores those of gram_jax.score.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from gram_jax import entry
from gram_jax.checkpoints import LoadedModel, load_model
from gram_jax.config import (
    CheckpointConfig,
    ComputeConfig,
    Config,
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    TrainConfig,
)
from gram_jax.data.docstring_task import TaskFiles, write_docstring_task
from gram_jax.data.sources import read_jsonl
from gram_jax.data.tokenizer import Tokenizer
from gram_jax.errors import UserError
from gram_jax.loop import run_stage
from gram_jax.model_card import export_checkpoint
from gram_jax.models.decoder import init_decoder
from gram_jax.quickstart_report import Scores, print_and_save
from gram_jax.reporting import duration
from gram_jax.scorer import RewardSettings
from gram_jax.scoring_job import ScoringJob, run_job

_WORKDIR = flags.DEFINE_string("workdir", "runs/quickstart", "Where everything is written.")
_SEED = flags.DEFINE_integer("seed", 0, "Of data, weights and order.")
_SCALE = flags.DEFINE_float("scale", 1.0, "Length of both stages, as a multiple of the default.")

VOCABULARY = 2048
ROW_LENGTH = 256
PRETRAIN_STEPS, FINETUNE_STEPS = 900, 90
STAGES = ("initialisation", "after stage 1", "after stage 2")


def pretrain_config(files: TaskFiles, tokenizer: Path, seed: int, scale: float) -> Config:
    """Stage 1: next token on docstrings and language-reference topics."""
    return Config(
        seed=seed,
        tokenizer=str(tokenizer),
        model=ModelConfig(
            vocab_size=VOCABULARY,
            hidden_size=128,
            num_layers=4,
            num_heads=4,
            num_kv_heads=4,
            head_dim=32,
            intermediate_size=384,
            max_position=1024,
            tie_embeddings=True,
        ),
        data=DataConfig(
            train=(str(files.text),),
            validation=(str(files.text_validation),),
            row_length=ROW_LENGTH,
        ),
        objective=ObjectiveConfig(name="next_token"),
        # Many small steps: so early in training they are worth more than fewer, larger ones.
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup=0.05, final=0.05, beta2=0.98),
        train=TrainConfig(
            length=PRETRAIN_STEPS * scale, batch_rows=2, log_every=100, validation_rows=32
        ),
        checkpoint=CheckpointConfig(every=100_000, keep_last=1),
    )


def finetune_config(files: TaskFiles, init_from: Path, seed: int, scale: float) -> Config:
    """Stage 2: the smoothed pairwise loss on the likelihoods of both responses."""
    return Config(
        seed=seed,
        init_from=str(init_from),
        data=DataConfig(
            format="preferences",
            train=(str(files.pairs),),
            validation=(str(files.pairs_validation),),
            row_length=2 * ROW_LENGTH,
            row_sequences=16,
            row_pairs=16,
        ),
        objective=ObjectiveConfig(
            name="smoothed_pairwise", label_smoothing=0.05, beta=0.1, chosen_ce=1.0
        ),
        optimizer=OptimizerConfig(learning_rate=4e-4, warmup=0.05, final=0.05, beta2=0.98),
        train=TrainConfig(
            length=FINETUNE_STEPS * scale, batch_rows=4, log_every=20, validation_rows=24
        ),
        checkpoint=CheckpointConfig(every=100_000, keep_last=1),
    )


def score_sets(name: str, loaded: LoadedModel, files: TaskFiles, folder: Path) -> dict[str, Scores]:
    """Scores both evaluation sets with one model; by name of the set."""
    found: dict[str, Scores] = {}
    for which, path in (("in", files.pairs_in), ("out", files.pairs_out)):
        output = folder / f"{name.replace(' ', '_')}_{which}.jsonl"
        job = ScoringJob(
            input=str(path), output=str(output), reward=RewardSettings(row_length=ROW_LENGTH)
        )
        run_job(job, lambda: loaded)
        rows = [row for _, row in read_jsonl(output)]
        rewards = np.array([row["reward"] for row in rows])
        lengths = np.array([row["num_tokens"] for row in rows])
        kinds = [row["subset"] for row in rows]
        found[which] = Scores(rewards[:, 0] - rewards[:, 1], lengths[:, 0], lengths[:, 1], kinds)
    return found


def check_export(folder: Path, scored: Path, pairs: Path, work: Path) -> float:
    """Largest difference between log-probs of the reloaded export and those scored before.

    Relative where a log-prob is above 1 in size: max |a - b| / max(1, |b|).
    """
    again = work / "export_out.jsonl"
    job = ScoringJob(
        input=str(pairs), output=str(again), reward=RewardSettings(row_length=ROW_LENGTH)
    )
    run_job(job, lambda: load_model(folder, ComputeConfig()))
    a, b = (np.array([row["logprob"] for _, row in read_jsonl(path)]) for path in (again, scored))
    return float((np.abs(a - b) / np.maximum(1, np.abs(b))).max())


def main(_: list[str]) -> None:
    began = time.perf_counter()
    work, seed, scale = Path(_WORKDIR.value), _SEED.value, _SCALE.value
    if scale <= 0:
        raise UserError(f"--scale={scale} must be positive")
    scores_folder = work / "scores"
    scores_folder.mkdir(parents=True, exist_ok=True)
    seconds: dict[str, float] = {}

    def done(name: str, since: float) -> float:
        now = time.perf_counter()
        seconds[name] = now - since
        print(f"== {name}: {duration(now - since)}", flush=True)
        return now

    files = write_docstring_task(work / "data", seed=seed, pairs_per_kind=120)
    print(files.summary)
    tokenizer = Tokenizer.train((row["text"] for _, row in read_jsonl(files.text)), VOCABULARY)
    tokenizer.save(work / "tokenizer")
    clock = done("data and tokenizer", began)

    stage_1 = pretrain_config(files, work / "tokenizer", seed, scale)
    run_stage(stage_1, work / "pretrain")
    clock = done("stage 1", clock)
    stage_2 = finetune_config(files, work / "pretrain", seed, scale)
    result = run_stage(stage_2, work / "finetune")
    clock = done("stage 2", clock)

    compute = ComputeConfig()
    random_model = init_decoder(stage_1.model, compute, seed)
    models = (
        LoadedModel(random_model, tokenizer, f"random, seed {seed}", None, stage_1),
        load_model(work / "pretrain", compute),
        load_model(work / "finetune", compute),
    )
    scores = {
        stage: score_sets(stage, model, files, scores_folder)
        for stage, model in zip(STAGES, models, strict=True)
    }
    clock = done("scoring", clock)

    if (work / "export" / "gram_config.json").is_file():  # of an earlier quickstart here
        shutil.rmtree(work / "export")
    folder = export_checkpoint(work / "finetune", work / "export")
    scored = scores_folder / f"{STAGES[2].replace(' ', '_')}_out.jsonl"
    difference = check_export(folder, scored, files.pairs_out, scores_folder)
    if not difference <= 1e-5:
        raise RuntimeError(f"{folder}: reloaded log-probs differ by {difference:.2e} (relative)")
    done("export and check", clock)

    facts: dict[str, Any] = {
        "seed": seed,
        "scale": scale,
        "data": files.summary,
        "parameters": stage_1.model.num_parameters(),
        "device": jax.devices()[0].device_kind,
        "export": str(folder),
        "export_difference": difference,
        "finetune_steps": result.steps,
        "seconds": seconds,
        "total_seconds": time.perf_counter() - began,
        "objective": dataclasses.asdict(stage_2.objective),
    }
    print_and_save(work, scores, facts)
    (work / "facts.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    entry.run(main, one_process=True)
