"""Ranks the responses to each prompt: JSONL in, the same rows with their rankings out.

  python -m gram_jax.rank --checkpoint=CHECKPOINT --input=responses.jsonl --output=ranked.jsonl

CHECKPOINT is a folder of ours (a workdir, or one step of it) or a Hugging Face folder. Files may
end in .gz. A row of the input is

  {"prompt": ..., "responses": [..., ...]}

where prompts and responses are text or chat messages. The output has the same rows in the same
order, other columns too, and in each

  rewards      a number per response, to be compared within the row
  ranking      places of the responses (from 0), best first
  best         the place of the best response
  comparisons  how many comparisons of two responses were made

What a reward is, and what it costs, depends on --method:

  scalar       the model's own reward (likelihood and head); no comparisons
  reference    p(it beats a reference response): the column `reference`, or --reference_index
  keep_best    finds the best of N in N - 1 comparisons; `ranking` names it alone, and `rewards` are
               p(it beats the best), null for responses that never met it
  round_robin  compares each with each, N (N - 1) / 2 times; Bradley-Terry ratings in log-odds

If rows say which response is best, by `best_response` (its place) or `scores` (a number each), the
share of rows in which it was found is printed at the end.

More examples:

  # How much better than the first response, as a probability
  python -m gram_jax.rank --checkpoint=DIR --input=a.jsonl --output=b.jsonl \\
      --method=reference --reference_index=0
  # The best of each row only, by a Hugging Face model as a judge that reads your own template
  python -m gram_jax.rank --checkpoint=DIR --input=a.jsonl --output=b.jsonl \\
      --reward=judge --template=judge.toml --method=keep_best
  # Long sequences lose the beginning of their prompt; four devices hold the model together
  python -m gram_jax.rank --checkpoint=DIR --input=a.jsonl --output=b.jsonl.gz \\
      --max_length=8192 --too_long=truncate --mesh=tensor=4

  # Two processes that share the work, as on two machines (docs/hosts.md)
  launch/local.sh 2 python -m gram_jax.rank --checkpoint=DIR --input=a.jsonl --output=b.jsonl

A run that was killed goes on when the same command is given again: until it is complete, its lines
stand in OUTPUT.partial, and what they belong to in OUTPUT.state.json; those of several processes
stand in OUTPUT.shards.
"""

from __future__ import annotations

import sys

from absl import flags

from gram_jax import entry
from gram_jax.distributed import is_main
from gram_jax.mesh import parse_mesh
from gram_jax.piecework import by_pieces, own_mesh
from gram_jax.ranking import METHODS
from gram_jax.ranking_by_pieces import rank_pieces
from gram_jax.ranking_job import Engine, RankingJob, RankingResult, run_ranking
from gram_jax.reward_model import define_flags, flag_mesh, flag_scorer
from gram_jax.signals import StopRequest
from gram_jax.storage import is_url, local_output

define_flags()
_INPUT = flags.DEFINE_string("input", None, "JSONL file to rank.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "JSONL file to write.", required=True)
_METHOD = flags.DEFINE_enum(
    "method",
    None,
    METHODS,
    "How to rank. By default round_robin for a judge, scalar for a likelihood or a head.",
)
_REFERENCE_INDEX = flags.DEFINE_integer(
    "reference_index",
    None,
    "With --method=reference: the place (from 0) of the response that the others are compared with."
    " By default it is in the column `reference`.",
)


def main(_: list[str]) -> None:
    stop = StopRequest("stopped by SIGTERM; the same command goes on after what is written")
    with local_output(_OUTPUT.value, writes=is_main()) as output, stop:
        job = RankingJob(
            input=_INPUT.value,
            output=output,
            method=_METHOD.value or "",
            reference_index=_REFERENCE_INDEX.value,
            stall_seconds=flags.FLAGS.stall_seconds,
        )
        result = _run(job)
    if not is_main():
        return
    if result.was_complete:
        print(f"{_OUTPUT.value} is complete already; nothing was done", file=sys.stderr)
    print(result.summary.text())
    print(f"written to {_OUTPUT.value}", file=sys.stderr)


def _run(job: RankingJob) -> RankingResult:
    """In pieces, or all processes together."""
    spread = parse_mesh(flags.FLAGS.mesh)
    # Pieces lie beside the output, where every process writes; a store is written once, at the end.
    if not is_url(_OUTPUT.value) and by_pieces(job.output, spread):
        mesh = own_mesh(spread)
        return rank_pieces(job, lambda: Engine.of(flag_scorer(mesh)))
    return run_ranking(job, lambda: Engine.of(flag_scorer(flag_mesh())))


if __name__ == "__main__":
    entry.run(main)
