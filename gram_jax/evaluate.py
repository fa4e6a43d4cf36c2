"""Evaluates a reward model on preference pairs and benchmarks.

  python -m gram_jax.evaluate --checkpoint=CHECKPOINT --data=F.jsonl,G.jsonl --output=DIR

CHECKPOINT is a folder of ours (a workdir, or one step of it) or a Hugging Face folder. Data files
are JSONL (plain, .gz or .zst), Parquet, ArrayRecord or datasets folders, or a .json list. A row is

  {"prompt": ..., "chosen": ..., "rejected": ...[, "subset": ...]}

or has the published columns of RewardBench, RewardBench 2, RM-Bench, JudgeBench, LLMBar or HHH,
whose official sums are then printed as well. DIR gets

  results.json    every number, with settings, versions, and the SHA-256 of the data
  results.jsonl   a row per pair: rewards, margin, right, tie or wrong, lengths
  results.md      the tables, to be pasted
  report.html     the page to read, with figures

More examples:

  # A judge, and prompts that go through the chat template as a user's message
  python -m gram_jax.evaluate --checkpoint=DIR --reward=judge --data=bench.parquet \\
      --output=runs/eval --chat --too_long=truncate
  # What the second run gains over the first on the same pairs; no checkpoint is needed
  python -m gram_jax.evaluate --compare=runs/eval_a,runs/eval_b

  # Two processes that share the work, as on two machines (docs/hosts.md)
  launch/local.sh 2 python -m gram_jax.evaluate --checkpoint=DIR --data=F.jsonl --output=runs/eval

A run that was killed goes on when the same command is given again: until it is complete, answers
stand in DIR/answers.shards. docs/evaluation.md says what each number means.
"""

from __future__ import annotations

import sys
from pathlib import Path

from absl import flags

from gram_jax import entry
from gram_jax.benchmarks import BENCHMARKS
from gram_jax.comparison import compare_runs
from gram_jax.distributed import is_main
from gram_jax.errors import UserError
from gram_jax.evaluation_job import REPORT, EvaluationJob, run_evaluation
from gram_jax.mesh import parse_mesh
from gram_jax.piecework import fits, own_mesh
from gram_jax.ranking_job import Engine
from gram_jax.reward_model import define_flags, flag_mesh, flag_scorer
from gram_jax.signals import StopRequest
from gram_jax.storage import local_folder

define_flags(checkpoint_required=False)
_DATA = flags.DEFINE_list("data", [], "Files to evaluate on, joined by commas.")
_OUTPUT = flags.DEFINE_string("output", None, "Folder to write.")
_BENCHMARK = flags.DEFINE_enum(
    "benchmark", None, list(BENCHMARKS), "What the files are. By default as their columns say."
)
_CHAT = flags.DEFINE_bool(
    "chat",
    False,
    "Prompts that are text become a user's message, so that they go through the chat template.",
)
_SEED = flags.DEFINE_integer("seed", 0, "Of the bootstrap.")
_COMPARE = flags.DEFINE_list(
    "compare", [], "Two folders of earlier evaluations: how much better the second is, by subset."
)


def main(_: list[str]) -> None:
    if _COMPARE.value:
        if len(_COMPARE.value) != 2 or _DATA.value or _OUTPUT.value:
            raise UserError("--compare=DIR,DIR takes two folders, and neither --data nor --output")
        comparison = compare_runs(*_COMPARE.value, seed=_SEED.value)
        if is_main():
            print(comparison.text())
        return
    for name in ("checkpoint", "data", "output"):
        if not flags.FLAGS[name].value:
            raise UserError(f"--{name} is missing; --help explains the command")
    job = EvaluationJob(
        checkpoint=flags.FLAGS.checkpoint,
        data=tuple(_DATA.value),
        output=str(local_folder(_OUTPUT.value, "--output")),
        benchmark=_BENCHMARK.value or "",
        chat=_CHAT.value,
        seed=_SEED.value,
        stall_seconds=flags.FLAGS.stall_seconds,
    )
    spread = parse_mesh(flags.FLAGS.mesh)
    with StopRequest("stopped by SIGTERM; the same command goes on after what is written"):
        together = not fits(spread)
        mesh = flag_mesh() if together else own_mesh(spread)
        text = run_evaluation(job, lambda: Engine.of(flag_scorer(mesh)), together=together)
    if not is_main():
        return
    print(text)
    print(f"report {Path(job.output) / REPORT}", file=sys.stderr)


if __name__ == "__main__":
    entry.run(main)
