"""What is varied: one setting of a reward model, and factors that change one thing of a base.

The base is stage 1 on text and on pairs of responses, then ``smoothed_pairwise`` with e = 0.05 on
all labelled pairs, all weights trained, and the sum of log-probs as the reward. Two settings that a
factor has no other choice but to change together are said in its note.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

STAGES_1 = ("text+pairs", "text", "pairs", "none")
ADAPTATIONS = ("whole", "LoRA", "last block", "head")
ALL = -1
"""All labelled pairs that a task has."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """How a reward model is made and read.

    Attributes:
      stage_1: what it is pretrained on; ``text+pairs`` spends the same tokens on both in turn.
      tokens: of stage 1, as a multiple of the scale's.
      width: of the model, as a multiple of the scale's.
      objective: of stage 2.
      smoothing: e, the probability that a label is wrong.
      average: of the log-probs of a response: sum or mean.
      regulariser: weight of the text-generation regulariser of Bradley-Terry.
      pairs: labelled ones, `ALL` or a number; 0 is no stage 2.
      adaptation: which weights stage 2 trains.
    """

    stage_1: str = "text+pairs"
    tokens: float = 1.0
    width: float = 1.0
    objective: str = "smoothed_pairwise"
    smoothing: float = 0.05
    average: str = "sum"
    regulariser: float = 0.0
    pairs: int = ALL
    adaptation: str = "whole"

    @property
    def name(self) -> str:
        """What differs from the base, as a file name."""
        changed = [
            f"{field.name}={getattr(self, field.name)}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != getattr(BASE, field.name)
        ]
        return ",".join(changed).replace(" ", "_") or "base"

    @property
    def first(self) -> Setting:
        """The base with this one's stage 1: settings that share it start from one checkpoint."""
        return dataclasses.replace(BASE, stage_1=self.stage_1, tokens=self.tokens, width=self.width)

    @property
    def untrained(self) -> bool:
        """Nothing is trained: a model as it is published is read."""
        return self.stage_1 == "none" and not self.pairs

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


BASE = Setting()


@dataclasses.dataclass(frozen=True)
class Factor:
    """One thing that is varied.

    Attributes:
      title: of its section.
      levels: by label, in the order of the table; one of them is the base.
      paper: what GRAM reports on it.
      note: what changes with it.
      base: what the levels are compared with.
    """

    title: str
    levels: dict[str, Setting]
    paper: str
    note: str = ""
    base: Setting = BASE


def _one(**changed: Any) -> Setting:
    return dataclasses.replace(BASE, **changed)


_PRETRAINED = _one(stage_1="none", average="mean", pairs=0)
_SMOOTHING = {f"e = {e:g}": _one(smoothing=e) for e in (0.0, 0.025, 0.05, 0.1, 0.2)}

FACTORS = {
    "stage_1": Factor(
        "Stage 1",
        {name: _one(stage_1=name) for name in STAGES_1},
        "Without stage 1 accuracy drops, most of all out of distribution.",
        "Each kind of stage 1 reads the same number of tokens; of pairs, prompts are read and not"
        " predicted. Pairs alone are trained at the rate of text, after text at a third of it.",
    ),
    "smoothing": Factor(
        "Label smoothing",
        {**_SMOOTHING, "smoothed_ce, e = 0.05": _one(objective="smoothed_ce")},
        "Without label smoothing accuracy drops; 0.1 in PyTorch's convention (e = 0.05) is used.",
        "smoothed_ce is the loss as it is written for likelihoods, which is not a ranking loss.",
    ),
    "readout": Factor(
        "Readout",
        {
            "likelihood, sum": BASE,
            "likelihood, mean": _one(average="mean"),
            "judge": _one(objective="judge"),
            "Bradley-Terry": _one(objective="bradley_terry"),
            "Bradley-Terry, frozen trunk": _one(objective="bradley_terry", adaptation="head"),
            "Bradley-Terry, text regulariser": _one(objective="bradley_terry", regulariser=0.01),
        },
        "The generative judge beats the discriminative head out of distribution by several points;"
        " in distribution the head can be better. A frozen trunk and a text-generation regulariser"
        " narrow the gap and do not close it.",
        "All start from one stage 1 and see the same labels with the same e; a judge sees each pair"
        " in both orders, and a head's scores are kept near zero (centring = 0.01).",
    ),
    "tokens": Factor(
        "Tokens of stage 1",
        {f"{share:g} x": _one(tokens=share) for share in (0.25, 1.0, 4.0)},
        "More unlabelled data in stage 1 is better, in and out of distribution.",
    ),
    "width": Factor(
        "Model size",
        {f"{width:g} x the width": _one(width=width) for width in (0.5, 1.0, 2.0)},
        "Larger models are better, out of distribution above all.",
        "Layers, tokens and learning rates stay the same.",
    ),
    "pairs": Factor(
        "Labelled pairs",
        {
            "0": _one(pairs=0),
            "100": _one(pairs=100),
            "1,000": _one(pairs=1000),
            "all": BASE,
        },
        "With few labels, or none, a model of stage 1 is already useful; labels add to it.",
        "Where there are fewer than 600 pairs they are read several times, 600 in all.",
    ),
    "pretrained": Factor(
        "From a language model",
        {
            "likelihood, mean, no labels": _PRETRAINED,
            "likelihood, mean": dataclasses.replace(_PRETRAINED, pairs=ALL),
            "judge, no labels": dataclasses.replace(_PRETRAINED, objective="judge"),
            "judge": dataclasses.replace(_PRETRAINED, objective="judge", pairs=ALL),
            "judge, after pairs": _one(stage_1="pairs", objective="judge"),
            "Bradley-Terry": _one(stage_1="none", objective="bradley_terry"),
        },
        "All of its models start from instruction-tuned language models; without stage 1 on pairs"
        " of responses the judge is worse, and with labels better than without.",
        "The mean of log-probs, as the judge, has no length of its own to overcome.",
        base=_PRETRAINED,
    ),
    "adaptation": Factor(
        "Adaptation",
        {
            "whole model": BASE,
            "LoRA": _one(adaptation="LoRA"),
            "last block": _one(adaptation="last block"),
            "head (Bradley-Terry)": _one(objective="bradley_terry", adaptation="head"),
        },
        "All weights are trained; frozen trunks are compared as baselines only.",
        "A likelihood has no head of its own, so a head alone is Bradley-Terry's.",
    ),
}
"""By name, as in --factors; NAME_mean is NAME around the mean per token."""

_MEAN = "_mean"


def _around_the_mean(factor: Factor) -> Factor:
    """The same factor, with the mean of log-probs as the reward wherever it is a likelihood."""

    def mean(setting: Setting) -> Setting:
        likelihood = setting.objective.startswith("smoothed")
        return dataclasses.replace(setting, average="mean") if likelihood else setting

    levels = {label: mean(setting) for label, setting in factor.levels.items()}
    return dataclasses.replace(
        factor, title=f"{factor.title} (mean)", levels=levels, base=mean(factor.base)
    )


FACTORS |= {
    name + _MEAN: _around_the_mean(factor)
    for name, factor in FACTORS.items()
    if name not in ("readout", "pretrained")
}


def usual_factors(task: str, scale: str) -> list[str]:
    """What is varied in a task at a scale, unless one says otherwise.

    Of preferences, whose responses differ in length, around the mean as well: a sum is a length.
    """
    own = {"labels": ["readout"], "pretrained": ["pretrained"]}
    both = [name for name in FACTORS if name != "pretrained"]
    sums = [name for name in both if not name.endswith(_MEAN)]
    return own.get(scale) or (both if task == "preferences" else sums)


def settings_of(factors: Sequence[str], labels: Collection[str] = ()) -> list[Setting]:
    """The bases, then the settings of these factors, or those of ``labels`` only; each once."""
    found = [FACTORS[name].base for name in factors] or [BASE]
    for name in factors:
        levels = FACTORS[name].levels
        found += [setting for label, setting in levels.items() if not labels or label in labels]
    return list(dict.fromkeys(found))


def runs_of(
    settings: Sequence[Setting], seeds: Sequence[int], *, pretrained: bool
) -> list[tuple[Setting, int]]:
    """Each setting with each seed, a seed after the other, so that each has every level early.

    A published model that is read as it is has no seed: it has the first one only.
    """
    return [
        (setting, seed)
        for seed in seeds
        for setting in settings
        if seed == seeds[0] or not (pretrained and setting.untrained)
    ]
