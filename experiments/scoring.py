"""What a reward model says of a file of pairs."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.settings import Setting
from experiments.tasks import JUDGE_TEMPLATE, Task
from gram_jax.benchmarks.items import Item, answer
from gram_jax.checkpoints import LoadedModel
from gram_jax.data.judge import JudgeTemplate
from gram_jax.data.sources import read_jsonl
from gram_jax.evaluation import Floats
from gram_jax.scorer import Question, RewardSettings, Scorer


class Margins(NamedTuple):
    """Of n pairs, in their order.

    Attributes:
      margin: [n], reward(chosen) - reward(rejected); of a judge, the log-odds' mean over both
        orders. Above zero is right.
      truncated: pairs of which something was cut to fit.
    """

    margin: Floats
    truncated: int


def reward_settings(task: Task, setting: Setting) -> RewardSettings:
    """How the reward of a setting is read, after stage 2 and without it."""
    reading = {"judge": "judge", "bradley_terry": "head"}.get(setting.objective, "likelihood")
    return RewardSettings(
        reading=reading,
        average=setting.average,
        row_length=task.scale.pair_row,
        too_long="truncate",
        template=JudgeTemplate.load(JUDGE_TEMPLATE) if reading == "judge" else None,
    )


def margins(
    model: LoadedModel, settings: RewardSettings, path: Path, most: int | None = None
) -> Margins:
    """Scores the pairs of a file, {"prompt", "chosen", "rejected"}, or its first ``most``."""
    scorer = Scorer(model, settings)
    items = [
        Item("", "", str(line), row["prompt"], (row["chosen"], row["rejected"]), ((0, 1),),
             path.name, line, ())
        for line, row in islice(read_jsonl(path), most)
    ]  # fmt: skip
    verdicts = scorer.score(Question(item.prompt, item.responses, item.pairs) for item in items)
    answers = [answer(i, v, scorer.beta) for i, v in zip(items, verdicts, strict=True)]
    return Margins(
        np.array([float(one.margin[0]) for one in answers]),
        sum(one.verdict.truncated for one in answers),
    )
