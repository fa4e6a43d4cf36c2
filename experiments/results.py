"""What is kept of a run: its setting, its configs, and what it said of every held-out pair.

experiments/results/TASK/SETTING/seedN.json, a few kilobytes each, which tables and figures are made
of; sets.json beside them says which prompts the pairs are of and what their lengths alone say. An
outcome is a digit: 2 right, 1 a tie, 0 wrong.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.scoring import margins, reward_settings
from experiments.settings import Setting
from experiments.tasks import Scale, Task
from experiments.training import Trained
from gram_jax.config import Config
from gram_jax.config_rules import to_dict
from gram_jax.data.ngrams import Keys, distinct_keys, shares_one
from gram_jax.data.sources import read_jsonl
from gram_jax.data.tokenizer import Tokenizer
from gram_jax.errors import UserError
from gram_jax.evaluation import Floats
from gram_jax.versions import versions

RESULTS = Path(__file__).parent / "results"
SETS = "sets.json"
_WORDS = 8
"""In a row, of a response and of the text: more than chance, as of docstrings that share a
paragraph."""


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """The pairs of a held-out set, n of them.

    Attributes:
      prompts: [n], a number for each different prompt.
      subsets: [n].
      longer: [n], outcomes of preferring the response of more tokens.
      known: [n], 1 where a response has 8 words in a row that the text of stage 1 has, 0 where none
        has; empty where nobody looked.
    """

    prompts: list[int]
    subsets: list[str]
    longer: str
    known: str = ""


def write_sets(task: Task, folder: Path) -> None:
    """Writes sets.json.

    Raises:
      UserError: there is one, of other pairs.
    """
    path = folder / SETS
    tokenizer = Tokenizer.load(task.tokenizer)
    sets = {}
    keys = None
    if task.name == "docstrings":  # of other texts too many are read by parts of the sizes here
        keys = distinct_keys((row["text"] for _, row in read_jsonl(task.text)), _WORDS)
    for name, file in task.sets.items():
        rows = [row for _, row in read_jsonl(file)]
        prompts = [json.dumps(row["prompt"]) for row in rows]  # which may be messages
        numbers = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
        texts = [row[side] for row in rows for side in ("chosen", "rejected")]
        lengths = np.array([len(ids) for ids in tokenizer.encode_responses(texts)]).reshape(-1, 2)
        held_out = HeldOut(
            [numbers[prompt] for prompt in prompts],
            [row.get("subset", "") for row in rows],
            digits(lengths[:, 0] - lengths[:, 1]),
            "" if keys is None else _known(rows, keys),
        )
        sets[name] = dataclasses.asdict(held_out)
    kept = {"digests": dict(task.digests), "left_out": dict(task.left_out), "sets": sets}
    if path.is_file() and json.loads(path.read_text())["digests"] != dict(task.digests):
        raise UserError(
            f"{path} is of other data (docstrings of other packages, or another version of the"
            " files): choose another --results, or delete it with the runs beside it"
        )
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(kept) + "\n")


def _known(rows: Sequence[dict[str, Any]], keys: Keys) -> str:
    found = (
        any(shares_one(row[side], _WORDS, keys) for side in ("chosen", "rejected")) for row in rows
    )
    return "".join("01"[one] for one in found)


def read_sets(folder: Path) -> dict[str, HeldOut]:
    sets = json.loads((folder / SETS).read_text())["sets"]
    return {name: HeldOut(**values) for name, values in sets.items()}


def read_left_out(folder: Path) -> dict[str, int]:
    """Rows that were too long for the scale, by file."""
    found: dict[str, int] = json.loads((folder / SETS).read_text()).get("left_out", {})
    return found


def digits(margins: Any) -> str:
    """Outcomes of margins [n], a digit each."""
    return "".join(str(int(1 + np.sign(m))) for m in margins)


def outcomes(text: str) -> Floats:
    """1 right, 0.5 tie, 0 wrong, [n]."""
    return np.array([int(c) / 2 for c in text])


def path_of(folder: Path, setting: Setting, seed: int) -> Path:
    return folder / setting.name / f"seed{seed}.json"


def is_done(folder: Path, setting: Setting, seed: int, task: Task) -> bool:
    """Whether this run is there.

    Raises:
      UserError: a file of its name is of another setting or of another scale.
    """
    path = path_of(folder, setting, seed)
    if not path.is_file():
        return False
    found = json.loads(path.read_text())
    if found["setting"] != setting.to_json() or Scale(**found["scale"]) != task.scale:
        raise UserError(f"{path} is of another setting or scale; delete it or choose --results")
    return True


def evaluate(task: Task, setting: Setting, seed: int, trained: Trained) -> dict[str, Any]:
    """Scores all held-out sets; what is to be kept, ready for JSON."""
    settings = reward_settings(task, setting)
    began = time.perf_counter()
    sets = {}
    for name, path in task.sets.items():
        margin, truncated = margins(trained.model, settings, path)
        text = digits(margin)
        sets[name] = {
            "outcomes": text,
            "accuracy": float(outcomes(text).mean()),
            "margin_mean": float(margin.mean()),
            "margin_std": float(margin.std()),
            "truncated": truncated,
        }
    return {
        "task": task.name,
        "seed": seed,
        "setting": setting.to_json(),
        "scale": dataclasses.asdict(task.scale),
        "parameters": trained.model.model.config.num_parameters(),
        "reward": {"reading": settings.reading, "average": settings.average},
        "sets": sets,
        "training": trained.facts,
        "evaluation_seconds": time.perf_counter() - began,
        "configs": {name: _changed(config) for name, config in trained.configs.items()},
        "versions": versions(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _changed(config: Config) -> dict[str, Any]:
    """What differs from the defaults, which a config of these versions fills in."""

    def changed(values: dict[str, Any], usual: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in values.items():
            if isinstance(value, dict):
                inner = changed(value, usual[name])
                if inner:
                    found[name] = inner
            elif value != usual[name]:
                # Where a file lies says nothing about the run; what is in it does (sets.json).
                found[name] = Path(value).name if name in _PATHS else value
        return found

    values = to_dict(config)
    values["data"]["train"] = [Path(path).name for path in values["data"]["train"]]
    return changed(values, to_dict(Config()))


_PATHS = ("init_from", "tokenizer", "judge_template", "prepared")


def write(folder: Path, setting: Setting, seed: int, record: dict[str, Any]) -> None:
    """Through a temporary file, so that an interrupted run leaves nothing that looks complete."""
    path = path_of(folder, setting, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    temporary.replace(path)


def read_runs(folder: Path, setting: Setting) -> dict[int, dict[str, Any]]:
    """The runs of a setting, by seed."""
    paths = sorted((folder / setting.name).glob("seed*.json"))
    runs = [json.loads(path.read_text()) for path in paths]
    return {run["seed"]: run for run in runs if run["setting"] == setting.to_json()}


def all_runs(folder: Path) -> Iterator[dict[str, Any]]:
    """Every run of a task."""
    for path in sorted(folder.glob("*/seed*.json")):
        yield json.loads(path.read_text())


def stacked(runs: Sequence[dict[str, Any]], name: str) -> Floats:
    """Outcomes [seeds, n] of a held-out set."""
    return np.stack([outcomes(run["sets"][name]["outcomes"]) for run in runs])
