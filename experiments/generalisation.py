"""Does a generative reward model generalise? Trains and evaluates it, one factor at a time.

  python -m experiments.generalisation --task=docstrings
  python -m experiments.generalisation --task=docstrings --scale=labels --level=judge
  python -m experiments.generalisation --task=preferences --data=DATA
  python -m experiments.generalisation --task=docstrings --scale=pretrained --pretrained=FOLDER

Each factor changes one thing of a base (experiments/settings.py): stage 1, label smoothing,
readout, tokens of stage 1, model size, labelled pairs, adaptation. Every setting is run with each
seed, in --workers processes of one core each. What a run gave is kept in experiments/results/TASK,
and a run that is there is not repeated; one that was interrupted goes on from its checkpoint.
Tables and figures are made of these files by `python -m experiments.report`.

What --scale makes of it:

  cpu         small models, a few hours of one core (default)
  labels      all labelled pairs of the docstring task instead of 2,000; varies the readout
  pretrained  few pairs, from the language model in --pretrained=FOLDER instead of random weights;
              `python -m experiments.smollm2` makes such a folder without a hub
  gpu         120 million parameters, all of the text, all pairs several times: for a machine with
              an accelerator (--workers=1 there)

Results of a scale other than cpu go to TASK-SCALE.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from absl import flags
from tqdm import tqdm

from experiments import results, training
from experiments.settings import FACTORS, Setting, runs_of, settings_of, usual_factors
from experiments.tasks import SCALES, SMOKE, TASKS, Scale, Task, make_task
from gram_jax import entry
from gram_jax.errors import UserError

_TASK = flags.DEFINE_enum("task", "docstrings", TASKS, "Data set.")
_DATA = flags.DEFINE_string("data", "", "Folder of the data set preferences.")
_PRETRAINED = flags.DEFINE_string(
    "pretrained", "", "Hugging Face folder of the language model of --scale=pretrained."
)
_FACTORS = flags.DEFINE_list(
    "factors", None, "What to vary, by default what the scale is for; the base is always run."
)
_LEVELS = flags.DEFINE_multi_string(
    "level", [], "Levels of these factors to run, by their label in the tables; none means all."
)
_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds of each setting.")
_SCALE = flags.DEFINE_enum(
    "scale", "cpu", ["cpu", "labels", "pretrained", "gpu", "smoke"],
    "How large models and data are; smoke: a minute, no meaning.",
)  # fmt: skip
_WORKERS = flags.DEFINE_integer("workers", 2, "Runs at once, each a process on a core of its own.")
_WORK = flags.DEFINE_string("work", "runs/experiments", "Where data and checkpoints go.")
_RESULTS = flags.DEFINE_string("results", str(results.RESULTS), "Where what is kept goes.")


def main(_: list[str]) -> None:
    settings, seeds = _settings(), [int(seed) for seed in _SEEDS.value]
    scale = _scale()
    name = _TASK.value if _SCALE.value == "cpu" else f"{_TASK.value}-{_SCALE.value}"
    work, kept = Path(_WORK.value) / name, Path(_RESULTS.value) / name
    task = make_task(_TASK.value, scale, work / "data", _DATA.value, _PRETRAINED.value)
    results.write_sets(task, kept)
    missing = [
        (setting, seed)
        for setting, seed in runs_of(settings, seeds, pretrained=scale.pretrained)
        if not results.is_done(kept, setting, seed, task)
    ]
    print(f"{name}: {len(settings)} settings x {len(seeds)} seeds, {len(missing)} runs to do")
    firsts = list(dict.fromkeys((setting.first, seed) for setting, seed in missing))
    training.prepare(task, missing, work)
    with _pool(_WORKERS.value) as pool:
        _each(pool, "stage 1", _pretrain, [(task, *one, work) for one in firsts])
        _each(pool, "stage 2 and evaluation", _run, [(task, *one, work, kept) for one in missing])


def _settings() -> list[Setting]:
    factors, levels = _FACTORS.value, _LEVELS.value
    if factors is None:
        factors = usual_factors(_TASK.value, _SCALE.value)
    unknown = [name for name in factors if name not in FACTORS]
    if unknown:
        raise UserError(f"--factors={unknown[0]}: there are {', '.join(FACTORS)}")
    labels = [label for name in factors for label in FACTORS[name].levels]
    missing = [label for label in levels if label not in labels]
    if missing:
        raise UserError(f"--level={missing[0]}: there are {'; '.join(dict.fromkeys(labels))}")
    return settings_of(factors, levels)


def _scale() -> Scale:
    if _SCALE.value == "smoke":
        return SMOKE
    scales = SCALES[_TASK.value]
    if _SCALE.value not in scales:
        raise UserError(f"--scale={_SCALE.value}: {_TASK.value} has {', '.join(scales)} and smoke")
    return scales[_SCALE.value]


def _pool(workers: int) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")
    cores = sorted(os.sched_getaffinity(0))
    numbers = context.Queue()
    for worker in range(workers):
        numbers.put([cores[worker % len(cores)]] if workers > 1 else cores)
    return ProcessPoolExecutor(workers, context, _start_worker, (numbers,))


def _start_worker(cores: Any) -> None:
    # Before JAX starts its threads, as many as it is given cores: small models gain by one each.
    os.sched_setaffinity(0, cores.get())
    entry.enable_compilation_cache()
    # A worker left alone by a killed command would go on in the workdirs of the next one.
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _each(
    pool: ProcessPoolExecutor,
    doing: str,
    function: Callable[..., str],
    asked: Sequence[tuple[Any, ...]],
) -> None:
    futures = [pool.submit(function, *arguments) for arguments in asked]
    try:
        for future in tqdm(as_completed(futures), doing, len(futures), unit="run"):
            tqdm.write(future.result())
    except BaseException:
        for future in futures:
            future.cancel()
        raise


def _pretrain(task: Task, setting: Setting, seed: int, work: Path) -> str:
    training.pretrain(task, setting, seed, work)
    return f"stage 1 {setting.name}, seed {seed}"


def _run(task: Task, setting: Setting, seed: int, work: Path, kept: Path) -> str:
    trained = training.train(task, setting, seed, work)
    record = results.evaluate(task, setting, seed, trained)
    results.write(kept, setting, seed, record)
    # Its numbers are kept; checkpoints of a hundred runs are gigabytes.
    shutil.rmtree(work / "stage_2" / setting.name / f"seed{seed}", ignore_errors=True)
    found = "  ".join(f"{name} {one['accuracy']:.3f}" for name, one in record["sets"].items())
    return f"{setting.name}, seed {seed}: {found}"


if __name__ == "__main__":
    entry.run(main, one_process=True)
