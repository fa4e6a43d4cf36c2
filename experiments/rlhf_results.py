"""What is kept of a run of `experiments.rlhf`: JSON files, which tables and figures are made from.

RESULTS/seedN_REWARD.json is one policy trained against one reward, RESULTS/seedN_best_of_n.json
what the rewards pick among samples of the untrained policy. A file says with what settings it was
made; one that is there with the settings asked for is not made again.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, TypeVar

from gram_jax.errors import UserError

BEST = "best_of_n"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """The policy on the held-out prompts [P], with samples [P, S], after some steps.

    Attributes:
      step: 0 before training.
      kl: [P], nats: of the policy from its start, over a whole response, mean over the samples.
      gold, equal, named, proxy: [P, S]: chrF; chrF at equal length; share of parameters named, None
        for prompts without any; the reward trained on.
      characters, finished: [P, S]: length; 1 where the response ended by itself.
      texts: of the first sample of some prompts.
    """

    step: int
    kl: list[float]
    gold: list[list[float]]
    equal: list[list[float]]
    named: list[list[float] | None]
    proxy: list[list[float]]
    characters: list[list[int]]
    finished: list[list[int]]
    texts: list[str]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A policy trained against one reward.

    Attributes:
      settings: all that decides it (`rlhf_settings.described`).
      facts: machine, versions, date, seconds by part, what the models before it came to.
      prompts: [P], the held-out prompts; sets: [P], ``in`` or ``out``.
      steps: of each step of GRPO, the mean and the standard deviation of its rewards.
      checks: by step.
    """

    settings: dict[str, Any]
    facts: dict[str, Any]
    prompts: list[str]
    sets: list[str]
    steps: list[dict[str, float]]
    checks: list[Check]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Best:
    """Best of N among samples of the untrained policy, by what picks.

    Attributes:
      settings, facts, prompts: as of a `Run`.
      sizes: N.
      gold, equal, named: by picker, [P][len(sizes)], the expected rule of the pick; of prompts
        without parameters ``named`` is None.
      correlation, equal_correlation, length_correlation: by picker, [P], of its numbers with chrF,
        with chrF at equal length and with the length, over the samples of a prompt.
    """

    settings: dict[str, Any]
    facts: dict[str, Any]
    prompts: list[str]
    sets: list[str]
    sizes: list[int]
    gold: dict[str, list[list[float]]]
    equal: dict[str, list[list[float]]]
    named: dict[str, list[list[float] | None]]
    correlation: dict[str, list[float | None]]
    equal_correlation: dict[str, list[float | None]]
    length_correlation: dict[str, list[float | None]]


def run_path(results: Path, seed: int, what: str) -> Path:
    """``what``: a reward, or `BEST`."""
    return results / f"seed{seed}_{what}.json"


def is_done(path: Path, settings: dict[str, Any]) -> bool:
    """Whether the file is there and was made with these settings."""
    return path.is_file() and _values(path).get("settings") == settings


def write(path: Path, result: Run | Best) -> None:
    """Whole or not at all; the folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    text = json.dumps(_rounded(dataclasses.asdict(result)), ensure_ascii=False)
    partial.write_text(_folded(text) + "\n", encoding="utf-8")
    partial.replace(path)


def read_run(path: Path) -> Run:
    """The inverse of `write`.

    Raises:
      UserError: the file is no run.
    """
    values = _values(path)
    try:
        checks = [Check(**check) for check in values.pop("checks")]
        return Run(**values, checks=checks)
    except (KeyError, TypeError) as error:
        raise _not_ours(path, error) from None


def read_best(path: Path) -> Best:
    """The inverse of `write`.

    Raises:
      UserError: the file is no result of best of N.
    """
    try:
        return Best(**_values(path))
    except TypeError as error:
        raise _not_ours(path, error) from None


def _values(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise _not_ours(path, error) from None
    if not isinstance(values, dict):
        raise _not_ours(path, TypeError("not an object"))
    return values


def _not_ours(path: Path, error: Exception) -> UserError:
    return UserError(
        f"{path}: not a result of experiments.rlhf ({error}); delete it, and run again"
    )


T = TypeVar("T")


def _rounded(value: T) -> T:
    """Numbers to five digits: files stay small, and nothing here is known better."""
    if isinstance(value, float):
        return float(f"{value:.5g}")  # type: ignore[return-value]
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}  # type: ignore[return-value]
    if isinstance(value, list):
        return [_rounded(v) for v in value]  # type: ignore[return-value]
    return value


def _folded(text: str) -> str:
    """A line for each check and each field, so that a change shows where it is."""
    for name in ("facts", "prompts", "sets", "steps", "checks", "sizes", "gold", "equal", "named"):
        text = text.replace(f', "{name}": ', f',\n"{name}": ')
    return text.replace(', {"step":', ',\n{"step":')
