"""A stage of an experiment: run once, resumed where it was stopped, left as it is when complete."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

from gram_jax.config import Config
from gram_jax.loop import run_stage

_DONE = "done.json"


def run_once(config: Config, workdir: Path) -> dict[str, Any]:
    """Runs a stage, or goes on with it; what came out of it, of an earlier run if it is complete.

    Returns:
      steps, metrics, validation and seconds as of `gram_jax.loop.StageResult`, and wall_seconds,
      which has the start of the stage as well; of the last run of one that was interrupted.
    """
    done = workdir / _DONE
    if not done.is_file():
        began = time.perf_counter()
        result = run_stage(config, workdir, quiet=True)
        facts = dataclasses.asdict(result) | {"wall_seconds": time.perf_counter() - began}
        done.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return stage_facts(workdir)


def stage_facts(workdir: Path) -> dict[str, Any]:
    """What came out of a stage that is complete."""
    facts: dict[str, Any] = json.loads((workdir / _DONE).read_text("utf-8"))
    return facts
