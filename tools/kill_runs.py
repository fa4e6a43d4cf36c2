"""Kills training runs at random moments, and checks that this changes nothing.

  python tools/kill_runs.py --kills=100

Trains a tiny model by `python -m gram_jax.pretrain`, then pairs on it by `gram_jax.finetune`, once
without a kill. Then again and again, each run killed with SIGKILL at random moments and started
again until it is complete: some kills come at any moment of a run's life, from its first import to
its last line, the others while a checkpoint is being written. Each run that was killed must end
with the same parameters and optimiser state, bit for bit; the same lines in metrics.jsonl, all but
the time and the speed; and the same (tag, step, value) in TensorBoard's event files, each once.

Exit status 0 if all of that held, 1 if not (the folder of the run is kept and named).
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
VOCABULARY = 320
# No run takes longer on any machine; one that hangs is an error.
TIMEOUT = 300.0
# What a repetition cannot repeat.
CLOCK = ("time", "tokens_per_second")

RECIPE = """
from gram_jax.config import *

def get_config(data):
    return Config(
        seed=1,
        data=DataConfig(
            train=(f"{{data}}/{name}.jsonl",), validation=(f"{{data}}/{name}_held_out.jsonl",),
            row_length=128, workers=1, {data}),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        train=TrainConfig(length=24.0, batch_rows=8, validate_every=5, validation_rows=8, {train}),
        checkpoint=CheckpointConfig(every=2, keep_last=2, keep_every=10),
        {rest})
"""
PRETRAIN = {
    "name": "text",
    "data": "",
    "train": "",
    "rest": 'tokenizer=f"{data}/tokenizer", model=ModelConfig(vocab_size=320, hidden_size=64,'
    " num_layers=2, num_heads=2, num_kv_heads=2, head_dim=32, intermediate_size=128,"
    " max_position=256)",
}
FINETUNE = {
    "name": "pairs",
    "data": 'format="preferences"',
    "train": "last_blocks=1",
    "rest": 'init_from=f"{data}/pretrain",'
    ' objective=ObjectiveConfig(name="smoothed_pairwise", beta=0.1, chosen_ce=0.1)',
}
STAGES = {"pretrain": PRETRAIN, "finetune": FINETUNE}


@dataclasses.dataclass
class Counts:
    """What was done to the runs of a stage."""

    kills: int = 0
    during_a_save: int = 0
    before_the_first_checkpoint: int = 0
    before_the_first_step: int = 0
    runs: int = 0

    def __add__(self, other: Counts) -> Counts:
        mine, others = dataclasses.astuple(self), dataclasses.astuple(other)
        return Counts(*(a + b for a, b in zip(mine, others, strict=True)))


class Difference(Exception):
    """A run that was killed ended in another way than one that was not."""


def write_data(folder: Path) -> None:
    """Real text and preferences about it as small JSONL files, a tokenizer, and both recipes."""
    from gram_jax.data.builtin import reference_topics
    from gram_jax.data.tokenizer import Tokenizer

    texts = [" ".join(topic.text.split()) for topic in reference_topics()][:60]
    rng = random.Random(0)

    def shuffled(text: str) -> str:
        words = text.split()
        rng.shuffle(words)
        return " ".join(words)

    pairs = [
        {"prompt": t[:40], "chosen": t[40:120], "rejected": shuffled(t[40:120])} for t in texts
    ]
    for name, rows in (("text", [{"text": text[:600]} for text in texts]), ("pairs", pairs)):
        for file, part in ((name, rows[:45]), (f"{name}_held_out", rows[45:])):
            lines = "".join(json.dumps(row) + "\n" for row in part)
            (folder / f"{file}.jsonl").write_text(lines, encoding="utf-8")
    Tokenizer.train(texts, VOCABULARY).save(folder / "tokenizer")
    for stage, values in STAGES.items():
        (folder / f"{stage}.py").write_text(RECIPE.format(**values), encoding="utf-8")


class Stage:
    """One stage's command and the run of it that was never killed."""

    def __init__(self, name: str, data: Path, cache: Path) -> None:
        self.name, self.data, self.cache = name, data, cache
        self.reference = data / name
        self.seconds = 0.0

    def start(self, workdir: Path) -> subprocess.Popen[str]:
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(self.cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
        }
        config = f"--config={self.data}/{self.name}.py:{self.data}"
        command = [sys.executable, "-m", f"gram_jax.{self.name}", config, f"--workdir={workdir}"]
        # Files, not pipes: nobody reads while this waits for the moment to kill.
        with workdir.with_suffix(".log").open("a") as log:
            return subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=log, text=True
            )

    def run_whole(self) -> None:
        """The reference; the second time in its place, to know how long a warm run lives."""
        for _ in range(2):
            shutil.rmtree(self.reference, ignore_errors=True)
            began = time.monotonic()
            finish(self.start(self.reference), self.reference)
            self.seconds = time.monotonic() - began

    def run_killed(self, workdir: Path, kills: int, share: float, rng: random.Random) -> Counts:
        """Runs once to the end, with at most so many kills on the way.

        Raises:
          Difference: it ended in another way than the reference.
        """
        counts = Counts(runs=1)
        while counts.kills < kills:
            lines = count_lines(workdir)
            process = self.start(workdir)
            saving = rng.random() < share
            killed = (kill_in_save if saving else kill_any_time)(
                process, workdir, self.seconds, rng
            )
            if not killed:
                finish(process, workdir)
                break
            counts.kills += 1
            counts.during_a_save += bool(saves_under_way(workdir))
            counts.before_the_first_checkpoint += not checkpoints(workdir)
            counts.before_the_first_step += count_lines(workdir) <= lines
        else:
            finish(self.start(workdir), workdir)
        compare(workdir, self.reference)
        return counts


def finish(process: subprocess.Popen[str], workdir: Path) -> None:
    """Waits for a run that nobody kills.

    Raises:
      Difference: it did not end well.
    """
    try:
        status = process.wait(TIMEOUT)
    except subprocess.TimeoutExpired:
        status = None
    finally:
        process.kill()
    if status != 0:
        log = workdir.with_suffix(".log").read_text(errors="replace")[-3000:]
        raise Difference(f"{workdir}: a run ended with status {status}:\n{log}")


def kill_any_time(
    process: subprocess.Popen[str], workdir: Path, seconds: float, rng: random.Random
) -> bool:
    """Kills at a moment of a run's life that is as likely as any other; False if it was over."""
    try:
        process.wait(rng.uniform(0, seconds))
    except subprocess.TimeoutExpired:
        return kill(process)
    return False


def kill_in_save(
    process: subprocess.Popen[str], workdir: Path, seconds: float, rng: random.Random
) -> bool:
    """Kills some milliseconds into one of the next saves; False if the run was over before."""
    wanted, seen = rng.randint(1, 4), 0
    before: set[str] = saves_under_way(workdir)
    deadline = time.monotonic() + TIMEOUT
    while process.poll() is None and time.monotonic() < deadline:
        now = saves_under_way(workdir)
        seen += bool({name.partition(".")[0] for name in now - before})
        before = now
        if seen >= wanted:
            time.sleep(rng.uniform(0, 0.06))
            return kill(process)
        time.sleep(0.001)
    return False


def kill(process: subprocess.Popen[str]) -> bool:
    """Sends SIGKILL; False if the process had ended of itself."""
    if process.poll() is not None:
        return False
    process.kill()
    return process.wait() < 0


def names(folder: Path) -> list[str]:
    """Of all entries, in order; a folder that is not there yet has none."""
    try:
        return sorted(path.name for path in folder.iterdir())
    except FileNotFoundError:
        return []


def saves_under_way(workdir: Path) -> set[str]:
    return {name for name in names(workdir / "checkpoints") if ".writing" in name}


def checkpoints(workdir: Path) -> list[int]:
    return sorted(int(name) for name in names(workdir / "checkpoints") if name.isdigit())


def count_lines(workdir: Path) -> int:
    path = workdir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def compare(workdir: Path, reference: Path) -> None:
    """Compares the ends of two runs.

    Raises:
      Difference: names the first thing that is not the same.
    """
    kept, expected_kept = (names(path / "checkpoints") for path in (workdir, reference))
    if kept != expected_kept:
        raise Difference(f"{workdir}: holds the checkpoints {kept} for {expected_kept}")
    step = checkpoints(reference)[-1]
    ours, theirs = (arrays(path / "checkpoints" / str(step)) for path in (workdir, reference))
    if ours.keys() != theirs.keys():
        raise Difference(f"{workdir}: other arrays: {ours.keys() ^ theirs.keys()}")
    for name, array in theirs.items():
        if ours[name].dtype != array.dtype or ours[name].tobytes() != array.tobytes():
            raise Difference(f"{workdir}: {name} is not the same to the bit")
    lines = [metrics(path) for path in (workdir, reference)]
    for number, (a, b) in enumerate(zip(*lines, strict=False), start=1):
        if a != b:
            raise Difference(f"{workdir}: metrics.jsonl, line {number}: {a} for {b}")
    if len(lines[0]) != len(lines[1]):
        raise Difference(f"{workdir}: metrics.jsonl has {len(lines[0])} lines for {len(lines[1])}")
    found, expected = (list(scalars(path / "tensorboard")) for path in (workdir, reference))
    repeated = [k for k, n in collections.Counter(row[:2] for row in found).items() if n > 1]
    if repeated:
        raise Difference(f"{workdir}: TensorBoard has {repeated[:3]} more than once")
    if set(found) != set(expected):
        raise Difference(f"{workdir}: TensorBoard: {sorted(set(found) ^ set(expected))[:3]}")


def arrays(step_folder: Path) -> dict[str, Any]:
    """All arrays of a checkpoint by name, as numpy arrays in their stored dtypes."""
    import jax
    from orbax.checkpoint import v1 as ocp

    from gram_jax.checksums import named_leaves

    loaded = ocp.load_checkpointables(step_folder, dict.fromkeys(("weights", "optimizer")))
    return {name: np.asarray(jax.device_get(x)) for name, x in named_leaves(loaded).items()}


def metrics(workdir: Path) -> list[dict[str, Any]]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in CLOCK} for line in lines]


def scalars(folder: Path) -> Iterator[tuple[str, int, float]]:
    """(tag, step, value) of all event files, read without TensorBoard; 0 for the speed."""
    from tensorboardX.proto.event_pb2 import Event

    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:  # length (8 bytes), its checksum (4), the event, its checksum (4)
            length = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + length])
            for value in event.summary.value:
                clock = value.tag.rpartition("/")[2] in CLOCK
                yield value.tag, event.step, 0.0 if clock else value.simple_value
            data = data[16 + length :]


def run_stage(stage: Stage, kills: int, share: float, seed: int, folder: Path) -> Counts:
    """Runs of one stage until so many kills have happened."""
    rng = random.Random(f"{seed} {stage.name}")
    total, number = Counts(), 0
    while total.kills < kills:
        number += 1
        workdir = folder / f"{stage.name}_{number}"
        total += stage.run_killed(workdir, kills - total.kills, share, rng)
        shutil.rmtree(workdir)
        print(f"{stage.name}: run {number} is the same after {total.kills} kills", flush=True)
    return total


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100, help="how many, over both stages (100)")
    parser.add_argument(
        "--share", type=float, default=0.5, help="of the kills aimed at saves under way (0.5)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the moments (0)")
    parser.add_argument("--folder", help="where to work; a temporary folder by default")
    flags = parser.parse_args(arguments)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # Arrays are read here without saying where to: on this machine's one device.
    warnings.filterwarnings("ignore", message="Sharding info not provided")
    folder = Path(flags.folder or tempfile.mkdtemp(prefix="kill_runs_"))
    data = folder / "data"
    data.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    write_data(data)
    stages = [Stage(name, data, folder / "cache") for name in STAGES]
    for stage in stages:
        stage.run_whole()
        print(f"{stage.name}: a run takes {stage.seconds:.1f} s", flush=True)
    parts = [flags.kills - flags.kills // 2, flags.kills // 2]
    with ThreadPoolExecutor(len(stages)) as threads:
        # Both at once: a start waits for the disk and for one core most of the time.
        futures = [
            threads.submit(run_stage, stage, part, flags.share, flags.seed, folder)
            for stage, part in zip(stages, parts, strict=True)
        ]
    try:
        total = sum((future.result() for future in futures), Counts())
    except Difference as error:
        print(f"DIFFERENT: {error}", file=sys.stderr)
        return 1
    print(
        f"{total.kills} kills in {total.runs} runs: {total.during_a_save} while a checkpoint was"
        f" being written, {total.before_the_first_checkpoint} before the first checkpoint,"
        f" {total.before_the_first_step} before a first step; all ended the same."
        f" {time.monotonic() - began:.0f} s"
    )
    if not flags.folder:
        shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
