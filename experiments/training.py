"""From a setting and a seed to a trained reward model: the configs of both stages, and their runs.

Learning rates were set once, by what is trained, and are the same for every objective; none was
chosen by looking at a held-out set.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from experiments.scoring import margins, reward_settings
from experiments.settings import ALL, Setting
from experiments.stages import run_once, stage_facts
from experiments.tasks import JUDGE_TEMPLATE, Task
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
from gram_jax.data.stage import stage_data
from gram_jax.data.tokenizer import Tokenizer
from gram_jax.models.decoder import init_decoder

RATES = {"whole": 5e-4, "last block": 5e-4, "LoRA": 2e-3, "head": 1e-2}
"""Peak learning rates of stage 2."""

_LEAST_PAIRS = 600
"""That are read in stage 2; fewer are read several times."""
_CALIBRATED = 200
"""Labelled pairs that `unit_beta` looks at."""
_TEXT_SHARE = 0.6
"""Of the tokens of stage 1 on text and pairs."""
_ADAPTED: dict[str, dict[str, Any]] = {
    "whole": {},
    "last block": {"last_blocks": 1},
    "LoRA": {"lora_rank": 8},
    "head": {"head_only": True},
}


class Trained(NamedTuple):
    """A reward model.

    Attributes:
      model: ready to score with.
      configs: of the stages it went through.
      facts: what came out of each: steps, seconds, metrics.
    """

    model: LoadedModel
    configs: dict[str, Config]
    facts: dict[str, dict[str, Any]]


def model_config(task: Task, setting: Setting) -> ModelConfig:
    """A Llama of the scale's shape at the setting's width; unread where ``init_from`` has one."""
    scale = task.scale
    if scale.pretrained:
        return ModelConfig()
    hidden = int(scale.hidden_size * setting.width)
    head = min(hidden, 32 if hidden < 512 else 64)
    return ModelConfig(
        vocab_size=scale.vocabulary,
        hidden_size=hidden,
        num_layers=scale.layers,
        num_heads=hidden // head,
        num_kv_heads=hidden // head,
        head_dim=head,
        intermediate_size=3 * hidden,
        max_position=2048,
        tie_embeddings=True,
    )


def stage_1(task: Task, setting: Setting, seed: int, work: Path) -> Iterator[tuple[Path, Config]]:
    """The runs of stage 1 in their order: a workdir and its config. None where there is no stage 1.

    Each goes on from the one before; settings that have the same stage 1 share its workdirs.
    """
    scale = task.scale
    tokens = scale.tokens * setting.tokens
    shares = {
        "text+pairs": {"text": _TEXT_SHARE, "pairs": 1 - _TEXT_SHARE},
        "text": {"text": 1.0},
        "pairs": {"pairs": 1.0},
        "none": {},
    }[setting.stage_1]
    before = str(task.pretrained or "")
    for part, share in shares.items():
        text = part == "text"
        row, rows = scale.text_row, scale.text_rows
        if not text:
            row, rows = scale.pair_row, max(1, scale.text_rows * scale.text_row // scale.pair_row)
        # A model that has begun is not to forget: a third of the rate.
        rate = (1e-3 if before else 3e-3) * scale.rate
        workdir = work / "stage_1" / setting.first.name / f"seed{seed}" / part
        yield (
            workdir,
            _prepared(
                work,
                Config(
                    seed=seed,
                    init_from=before,
                    tokenizer="" if before else str(task.tokenizer),
                    model=model_config(task, setting),
                    data=DataConfig(
                        train=(str(task.text if text else task.responses),),
                        format="text" if text else "pairs",
                        judge_template="" if text else str(JUDGE_TEMPLATE),
                        row_length=row,
                    ),
                    objective=ObjectiveConfig(name="next_token"),
                    optimizer=OptimizerConfig(
                        learning_rate=rate, warmup=0.05, final=0.05, beta2=0.98
                    ),
                    train=TrainConfig(
                        length=tokens * share, length_unit="tokens", batch_rows=rows, log_every=100
                    ),
                    checkpoint=CheckpointConfig(every=100_000, keep_last=1),
                ),
            ),
        )
        before = str(workdir)


def stage_2(
    task: Task, setting: Setting, seed: int, work: Path, init_from: str, beta: float
) -> Config:
    """Stage 2: from a checkpoint, or from random weights where ``init_from`` is empty."""
    scale = task.scale
    judge = setting.objective == "judge"
    # A judge reads a pair twice, with the question and both responses in each.
    row_pairs = scale.pair_row / (_tokens_of_a_pair(task) * (2 if judge else 1))
    labelled = _lines(task.pairs)
    pairs = labelled * scale.epochs if setting.pairs == ALL else setting.pairs
    head = setting.objective == "bradley_terry"
    rate = RATES[setting.adaptation] * scale.rate
    config = Config(
        seed=seed,
        init_from=init_from,
        tokenizer="" if init_from else str(task.tokenizer),
        model=model_config(task, setting),
        data=DataConfig(
            train=(str(task.pairs),),
            format="preferences",
            max_pairs=0 if setting.pairs == ALL else setting.pairs,
            draw_seed=seed,
            judge_template=str(JUDGE_TEMPLATE) if judge else "",
            row_length=scale.pair_row,
        ),
        objective=ObjectiveConfig(
            name=setting.objective,
            label_smoothing=setting.smoothing,
            beta=beta,
            average=setting.average,
            chosen_ce=setting.regulariser,
            centring=0.01 if head else 0.0,
        ),
        optimizer=OptimizerConfig(learning_rate=rate, warmup=0.05, final=0.05, beta2=0.98),
        train=TrainConfig(
            length=float(max(pairs, min(_LEAST_PAIRS, labelled))),
            length_unit="pairs",
            batch_rows=max(1, round(scale.step_pairs / row_pairs)),
            log_every=20,
            **_ADAPTED[setting.adaptation],
        ),
        checkpoint=CheckpointConfig(every=100_000, keep_last=1),
    )
    return _prepared(work, config)


def _prepared(work: Path, config: Config) -> Config:
    """The config with a folder for its rows, which all runs that need the same rows share."""
    data = dataclasses.asdict(config.data)
    layout = config.objective.name, config.objective.chosen_ce > 0
    digest = hashlib.sha256(json.dumps([data, layout], sort_keys=True).encode()).hexdigest()[:12]
    config.data.prepared = str(work / "rows" / digest)
    return config


def prepare(task: Task, settings: Iterable[tuple[Setting, int]], work: Path) -> int:
    """Makes the rows of all stages of these settings and seeds; returns how many sets there are."""
    configs = [
        config
        for setting, seed in settings
        for config in (
            *(config for _, config in stage_1(task, setting, seed, work)),
            *([stage_2(task, setting, seed, work, "", 1.0)] if setting.pairs else []),
        )
    ]
    folders = {config.data.prepared: config for config in configs}
    tokenizer = Tokenizer.load(task.tokenizer)
    for folder, config in tqdm(folders.items(), "rows", unit="set"):
        stage_data(config, tokenizer, Path(folder), replace=False, quiet=True)
    return len(folders)


def _lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for _ in file)


def _tokens_of_a_pair(task: Task) -> float:
    """About: four characters a token, the prompt once; of the first hundred pairs."""
    with task.pairs.open(encoding="utf-8") as file:
        lengths = [len(line) / 4 for line, _ in zip(file, range(100), strict=False)]
    return sum(lengths) / len(lengths)


def pretrain(task: Task, setting: Setting, seed: int, work: Path) -> Path | None:
    """Runs stage 1, or goes on with it; where stage 2 starts from, None for random weights."""
    last = task.pretrained
    for workdir, config in stage_1(task, setting, seed, work):
        last = workdir
        run_once(config, workdir)
    return last


def train(task: Task, setting: Setting, seed: int, work: Path) -> Trained:
    """Both stages, each resumed where it was, or taken as it is if it is complete."""
    configs: dict[str, Config] = {}
    facts: dict[str, dict[str, Any]] = {}
    last = pretrain(task, setting, seed, work)
    for workdir, config in stage_1(task, setting, seed, work):
        configs[f"stage 1, {workdir.name}"] = config
        facts[f"stage 1, {workdir.name}"] = stage_facts(workdir)
    if setting.pairs:
        workdir = work / "stage_2" / setting.name / f"seed{seed}"
        beta = unit_beta(task, setting, _loaded(task, setting, seed, last))
        config = stage_2(task, setting, seed, work, "" if last is None else str(last), beta)
        configs["stage 2"] = config
        facts["stage 2"] = run_once(config, workdir)
        last = workdir
    if not configs:
        configs["start"] = _start_config(task, setting, seed)
    return Trained(_loaded(task, setting, seed, last), configs, facts)


def unit_beta(task: Task, setting: Setting, start: LoadedModel) -> float:
    """b of D = b (s_chosen - s_rejected), such that at the start D has a deviation of 1.

    Sums of log-probs differ by tens of nats and their means by tenths, more in one task than in
    another; D is to be of the size at which the loss has its minimum. Measured on the first
    labelled pairs, rounded to two digits. A head, or a judge's log-odds, need none: 1.
    """
    settings = reward_settings(task, setting)
    if settings.reading != "likelihood":
        return 1.0
    found = margins(start, settings, task.pairs, _CALIBRATED)
    return float(f"{1 / found.margin.std():.2g}")


def _loaded(task: Task, setting: Setting, seed: int, folder: Path | None) -> LoadedModel:
    """A checkpoint's model, or a random one."""
    compute = ComputeConfig()
    if folder is not None:
        return load_model(folder, compute)
    config = _start_config(task, setting, seed)
    tokenizer = Tokenizer.load(task.tokenizer)
    model = init_decoder(config.model, compute, seed)
    return LoadedModel(model, tokenizer, f"random, seed {seed}", None, config)


def _start_config(task: Task, setting: Setting, seed: int) -> Config:
    """Of a model that was not trained at all."""
    return Config(
        seed=seed,
        init_from=str(task.pretrained or ""),
        model=model_config(task, setting),
        tokenizer=str(task.tokenizer),
    )
