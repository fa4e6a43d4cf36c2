"""The models of `experiments.rlhf`: pretrained ones, the three rewards, and what these get right.

All three rewards of a seed start from one pretrained model and see the same pairs in stage 2. What
is complete in the work folder is left as it is; what was interrupted goes on.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from experiments.rlhf_settings import REWARDS, Sizes, Work, policy_seed
from experiments.stages import run_once
from gram_jax.bootstrap import clustered_accuracy
from gram_jax.checkpoints import load_model
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
from gram_jax.data.docstring_task import write_docstring_task
from gram_jax.data.sources import read_jsonl
from gram_jax.data.tokenizer import Tokenizer
from gram_jax.errors import UserError
from gram_jax.evaluation import Floats
from gram_jax.model_card import export_checkpoint
from gram_jax.reward_model import stored_settings
from gram_jax.scorer import Question, Scorer, judge_probability

JUDGE_TEMPLATE = Path(__file__).parent / "rlhf_judge.toml"
ROPE_THETA = 1e6
"""Tunix 0.1.7's model of Llama 3 computes with this one, whatever its config says."""

_TRAINING = 1000
"""Prompts that are kept for GRPO."""


def prepare(sizes: Sizes, work: Work, seed: int, seeds: int) -> None:
    """Makes all that the policies of a seed need, of ``seeds`` in all.

    Raises:
      UserError: the work folder has files of other sizes.
    """
    _claim(sizes, work)
    _write_data(sizes, work)
    other = policy_seed(seed, seeds)
    for each in tqdm((seed, other), f"stage 1, seed {seed}", unit="model"):
        run_once(pretrain_config(sizes, work, each), work.pretrained(each))
    if not (work.policy(other) / "config.json").is_file():
        export_checkpoint(work.pretrained(other), work.policy(other))
    for name in tqdm(REWARDS, f"stage 2, seed {seed}", unit="model"):
        run_once(reward_config(sizes, work, seed, name), work.reward(seed, name))
        _write_accuracy(work, seed, name)


def _claim(sizes: Sizes, work: Work) -> None:
    """Models that were made with other sizes must not be taken for these."""
    path = work.root / "sizes.json"
    own = _of_models(sizes)
    if path.is_file():
        if json.loads(path.read_text("utf-8")) != own:
            raise UserError(
                f"{work.root} holds models of other sizes; name another --workdir or delete it"
            )
        return
    work.root.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(own, indent=1) + "\n", encoding="utf-8")


def _of_models(sizes: Sizes) -> dict[str, Any]:
    """What of the sizes models and prompts depend on; the rest may differ between runs."""
    decisive = (
        "vocabulary", "hidden", "layers", "texts", "pretrain_steps", "pairs", "pairs_per_kind",
        "prompt_tokens", "check_prompts",
    )  # fmt: skip
    return {name: getattr(sizes, name) for name in decisive}


def _write_data(sizes: Sizes, work: Work) -> None:
    """The docstring task, a tokenizer and the prompts of GRPO and of the checks; once."""
    if work.prompts.is_file():
        return
    files = write_docstring_task(work.data, seed=0, pairs_per_kind=sizes.pairs_per_kind)
    # Both files are in random order.
    texts = [row for _, row in itertools.islice(read_jsonl(files.text), sizes.texts)]
    known = [row for _, row in read_jsonl(files.pairs)]
    for path, rows in ((work.text, texts), (work.pairs, known[: sizes.pairs])):
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        path.write_text("".join(lines), encoding="utf-8")
    tokenizer = Tokenizer.train((row["text"] for row in texts), sizes.vocabulary)
    tokenizer.save(work.tokenizer)
    rng = random.Random(0)
    training = _objects(known, tokenizer, sizes, rng)[:_TRAINING]
    checks = [
        {**row, "set": name}
        for name, path in (("in", files.pairs_in), ("out", files.pairs_out))
        for row in _objects([row for _, row in read_jsonl(path)], tokenizer, sizes, rng)[
            : sizes.check_prompts // 2
        ]
    ]
    if len(checks) < sizes.check_prompts:
        raise UserError(
            f"there are {len(checks)} held-out prompts of at most {sizes.prompt_tokens} tokens, and"
            f" {sizes.check_prompts} are wanted: this Python has too few docstrings"
        )
    text = json.dumps({"training": training, "checks": checks}, indent=1, ensure_ascii=False)
    work.prompts.write_text(text + "\n", encoding="utf-8")


def _objects(
    rows: Iterable[dict[str, Any]], tokenizer: Tokenizer, sizes: Sizes, rng: random.Random
) -> list[dict[str, str]]:
    """Objects whose prompt is short enough, with their own docstring, in random order."""
    truths = {row["prompt"]: row["chosen"] for row in rows}
    prompts = sorted(truths)
    lengths = map(len, tokenizer.encode_prompts(prompts))
    short = [p for p, n in zip(prompts, lengths, strict=True) if n <= sizes.prompt_tokens]
    rng.shuffle(short)
    return [{"prompt": prompt, "truth": truths[prompt]} for prompt in short]


def pretrain_config(sizes: Sizes, work: Work, seed: int) -> Config:
    """Stage 1: next token on prompts with their docstrings, as the quickstart has it."""
    heads = max(sizes.hidden // 32, 1)
    return Config(
        seed=seed,
        tokenizer=str(work.tokenizer),
        model=ModelConfig(
            vocab_size=sizes.vocabulary,
            hidden_size=sizes.hidden,
            num_layers=sizes.layers,
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=32,
            intermediate_size=3 * sizes.hidden,
            max_position=2048,
            rope_theta=ROPE_THETA,
        ),
        data=DataConfig(
            train=(str(work.text),),
            validation=(str(work.data / "text_validation.jsonl"),),
            row_length=256,
            prepared=str(work.rows("text")),
            workers=1,
        ),
        objective=ObjectiveConfig(name="next_token"),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup=0.05, final=0.05, beta2=0.98),
        train=TrainConfig(
            length=sizes.pretrain_steps, batch_rows=2, log_every=100, validation_rows=32
        ),
        checkpoint=CheckpointConfig(every=100_000, keep_last=1),
    )


def reward_config(sizes: Sizes, work: Work, seed: int, name: str) -> Config:
    """Stage 2 of a reward: the same pairs, label smoothing and learning rate for all three."""
    objective = REWARDS[name]
    judge, likelihood = name == "judge", name == "likelihood"
    return Config(
        seed=seed,
        init_from=str(work.pretrained(seed)),
        data=DataConfig(
            format="preferences",
            train=(str(work.pairs),),
            row_length=512,
            judge_template=str(JUDGE_TEMPLATE) if judge else "",
            judge_orders="random",
            prepared=str(work.rows(name)),
            workers=1,
        ),
        objective=ObjectiveConfig(
            name=objective,
            label_smoothing=0.05,
            # Log-probs of responses differ by tens of nats.
            beta=0.1 if likelihood else 1.0,
            chosen_ce=1.0 if likelihood else 0.0,
            centring=0.01 if name == "bradley_terry" else 0.0,
        ),
        optimizer=OptimizerConfig(learning_rate=4e-4, warmup=0.05, final=0.05, beta2=0.98),
        train=TrainConfig(length=sizes.pairs, length_unit="pairs", batch_rows=6, log_every=50),
        checkpoint=CheckpointConfig(every=100_000, keep_last=1),
    )


def _write_accuracy(work: Work, seed: int, name: str) -> None:
    """What the reward gets right of held-out pairs, with intervals by prompt."""
    path = work.accuracy(seed, name)
    if path.is_file():
        return
    folder = work.reward(seed, name)
    settings = stored_settings(folder)
    if settings.reading == "likelihood":
        # As GRPO reads it (experiments/rlhf_tunix.py), not the sum that it was trained as.
        settings = dataclasses.replace(settings, average="mean")
    scorer = Scorer(load_model(folder, ComputeConfig()), settings)
    found = {}
    for which in ("in", "out"):
        rows = [row for _, row in read_jsonl(work.data / f"pairs_{which}.jsonl")]
        margin = _margins(scorer, rows)
        right = np.where(margin == 0, 0.5, margin > 0).astype(np.float64)
        interval = clustered_accuracy(right, [row["prompt"] for row in rows], seed=0)
        found[which] = {**interval._asdict(), "n": len(rows)}
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"{folder}: accuracy {found['in']['value']:.3f} in, {found['out']['value']:.3f} out")


def _margins(scorer: Scorer, rows: list[dict[str, Any]]) -> Floats:
    questions = [
        Question(row["prompt"], [row["chosen"], row["rejected"]], [(0, 1)]) for row in rows
    ]
    margins = []
    for verdict in scorer.score(questions):
        if verdict.rewards is not None:
            margins.append(verdict.rewards[0] - verdict.rewards[1])
        else:
            assert verdict.forward is not None and verdict.backward is not None
            margins.append(judge_probability(verdict.forward, verdict.backward)[0] - 0.5)
    return np.array(margins, np.float64)
