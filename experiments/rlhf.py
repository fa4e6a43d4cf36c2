"""Does a reward train a policy? GRPO against three rewards, and best of N, on the docstring task.

  tests/clients/environments.sh tunix        # once: Tunix, in an environment of its own
  python -m experiments.rlhf [--seeds=3] [--workdir=runs/rlhf] [--results=FOLDER]

For each seed: a small decoder is pretrained on docstrings, and three rewards (likelihood, judge,
Bradley-Terry) are fine-tuned from it on the same pairs. Another seed's decoder is the policy; it
writes docstrings, and Tunix's GRPO trains it against each reward, with the reward in the same JAX
process. What it writes for held-out objects is judged by a rule that no reward has seen: how much
it is like the object's own docstring (chrF). The same rule judges what each reward picks among
samples of the untrained policy.

A run that is in RESULTS with the same settings is not made again, and a stopped one goes on. Tables
and figures: python -m experiments.report.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from absl import flags

from benchmarks.harness import machine
from experiments.rlhf_report import RESULTS
from experiments.rlhf_results import BEST, is_done, run_path
from experiments.rlhf_rewards import prepare
from experiments.rlhf_settings import REWARDS, SMALL, Sizes, Work, described
from gram_jax import entry
from gram_jax.errors import UserError

_WORKDIR = flags.DEFINE_string("workdir", "runs/rlhf", "Folder of models and texts.")
_RESULTS = flags.DEFINE_string("results", str(RESULTS), "Folder of the runs' JSON files.")
_SEEDS = flags.DEFINE_integer("seeds", 3, "How many seeds, from 0.")
_SMALL = flags.DEFINE_bool("small", False, "Tiny sizes: only whether it runs.")
_SET = flags.DEFINE_multi_string(
    "set", [], "A size to change, as in --set=steps=20; experiments/rlhf_settings.py lists them."
)

ROOT = Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True, slots=True)
class Pending:
    """A result that is to be made: of a seed, a reward or `BEST`."""

    seed: int
    what: str
    path: str
    settings: dict[str, Any]


def pending(sizes: Sizes, seeds: int, results: Path) -> list[Pending]:
    """What is not there yet with these settings; best of N first, as it tells the most soonest."""
    found = []
    for seed in range(seeds):
        for what in (BEST, *REWARDS):
            settings = described(sizes, seed, seeds, what)
            path = run_path(results, seed, what)
            if not is_done(path, settings):
                found.append(Pending(seed, what, str(path.absolute()), settings))
    return found


def tunix_python() -> Path:
    """The Python of the environment with Tunix, which lies in the one that this runs in.

    Raises:
      UserError: there is none.
    """
    path = Path(sys.prefix) / "clients" / "tunix"
    if not (path / "installed").is_file():
        raise UserError(
            f"there is no environment with Tunix in {path}; tests/clients/environments.sh tunix"
            " makes it"
        )
    return path / "bin" / "python"


def sizes_of(small: bool, changes: list[str]) -> Sizes:
    """The sizes asked for.

    Raises:
      UserError: a change names no size, or gives it no number.
    """
    sizes = SMALL if small else Sizes()
    for change in changes:
        name, _, text = change.partition("=")
        old = getattr(sizes, name, None) if name in Sizes.__dataclass_fields__ else None
        if old is None:
            known = ", ".join(Sizes.__dataclass_fields__)
            raise UserError(f"--set={change}: {name!r} is no size; there are {known}")
        try:
            sizes = dataclasses.replace(sizes, **{name: type(old)(text)})
        except ValueError:
            raise UserError(f"--set={change}: {name} is a number, as {old}") from None
    return sizes


def main(_: list[str]) -> None:
    sizes = sizes_of(_SMALL.value, _SET.value)
    if _SEEDS.value < 1:
        raise UserError(f"--seeds={_SEEDS.value} must be positive")
    work, results = Work(Path(_WORKDIR.value).absolute()), Path(_RESULTS.value)
    missing = pending(sizes, _SEEDS.value, results)
    if not missing:
        print(f"complete already: {_SEEDS.value} seeds in {results}")
        return
    python = tunix_python()
    for seed in sorted({each.seed for each in missing}):
        prepare(sizes, work, seed, _SEEDS.value)
        _run_with_tunix(python, sizes, work, [each for each in missing if each.seed == seed])
    print(f"{len(missing)} results written to {results}")


def _run_with_tunix(python: Path, sizes: Sizes, work: Work, asked: list[Pending]) -> None:
    """Makes results whose models are there."""
    plan = work.root / "plan.json"
    values = {
        "work": str(work.root),
        "sizes": dataclasses.asdict(sizes),
        "machine": machine(),
        "pending": [dataclasses.asdict(each) for each in asked],
    }
    plan.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    status = subprocess.run(
        [python, "-m", "experiments.rlhf_tunix", plan], cwd=ROOT, env=_environment(), check=False
    ).returncode
    if status:
        raise UserError(f"the process with Tunix ended with status {status}; it says why above")


def _environment() -> dict[str, str]:
    """Our code, no network, and compiled functions kept from one run to the next."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    given = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    return {
        "JAX_COMPILATION_CACHE_DIR": str(cache / "gram_jax" / "jax_tunix"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        **given,
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


if __name__ == "__main__":
    entry.run(main, one_process=True)
