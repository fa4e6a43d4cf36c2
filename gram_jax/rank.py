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
  # Long sequences lose the beginning of their prompt; four devices hold the model together
  python -m gram_jax.rank --checkpoint=DIR --input=a.jsonl --output=b.jsonl.gz \\
      --max_length=8192 --too_long=truncate --mesh=tensor=4

A run that was killed goes on when the same command is given again: until it is complete, its lines
stand in OUTPUT.partial, and what they belong to in OUTPUT.state.json.
"""

from __future__ import annotations

import sys

import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh

from gram_jax import entry
from gram_jax.checkpoints import load_model, reward_average
from gram_jax.config import ComputeConfig
from gram_jax.distributed import is_main
from gram_jax.errors import UserError
from gram_jax.mesh import make_mesh, parse_mesh
from gram_jax.models.decoder import compute_dtype
from gram_jax.ranking import METHODS
from gram_jax.ranking_job import Engine, RankingJob, run_ranking
from gram_jax.scorer import LikelihoodScorer
from gram_jax.scoring_job import ScoringJob

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Folder of the model.", required=True)
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
_REWARD = flags.DEFINE_enum(
    "reward", "likelihood", ["likelihood"], "What a reward is: the log-prob of the response."
)
_BETA = flags.DEFINE_float(
    "beta",
    None,
    "Log-odds per unit of reward, of a likelihood or a head with --method=reference. By default as"
    " the model was fine-tuned, else 1.",
)
_MAX_LENGTH = flags.DEFINE_integer(
    "max_length",
    0,
    "Most tokens of a prompt and one response. 0 = 2048, or the model's positions if they are"
    " fewer.",
)
_TOO_LONG = flags.DEFINE_enum(
    "too_long",
    "error",
    ["error", "truncate"],
    "A longer one: stop and name it; or cut the prompt from the left, then the response from the"
    " right, and say so in the row's column `truncated`.",
)
_BATCH_ROWS = flags.DEFINE_integer(
    "batch_rows", 0, "Rows computed at once. 0 = 4096 tokens on CPU, else 16384 per device."
)
_DTYPE = flags.DEFINE_enum(
    "dtype",
    "auto",
    ["auto", "float32", "bfloat16"],
    "Of matrix products: auto = float32 on CPU, bfloat16 elsewhere.",
)
_MESH = flags.DEFINE_string(
    "mesh",
    "",
    "How devices share the work, as in fsdp=2,tensor=4: data (copies of the model), fsdp and tensor"
    " (parts of it). data takes what is left.",
)


def main(_: list[str]) -> None:
    job = RankingJob(
        input=_INPUT.value,
        output=_OUTPUT.value,
        method=_METHOD.value or "",
        reference_index=_REFERENCE_INDEX.value,
    )
    if _BETA.value is not None and not _BETA.value > 0:
        raise UserError(f"--beta={_BETA.value} must be positive")
    # One device needs no mesh.
    mesh = make_mesh(parse_mesh(_MESH.value)) if len(jax.devices()) > 1 or _MESH.value else None
    result = run_ranking(job, lambda: _engine(mesh))
    if not is_main():
        return
    if result.was_complete:
        print(f"{job.output} is complete already; nothing was done", file=sys.stderr)
    print(result.summary.text())
    print(f"written to {job.output}", file=sys.stderr)


def _engine(mesh: Mesh | None) -> Engine:
    """The reward model that the flags describe."""
    loaded = load_model(_CHECKPOINT.value, ComputeConfig(dtype=_DTYPE.value), mesh)
    asked = ScoringJob(
        input=_INPUT.value,
        output=_OUTPUT.value,
        average=reward_average(_CHECKPOINT.value),
        max_length=_MAX_LENGTH.value,
        too_long=_TOO_LONG.value,
        batch_rows=_BATCH_ROWS.value,
    ).resolved(loaded.model.config, loaded.tokenizer, mesh)
    trained_beta = loaded.config.objective.beta if loaded.config else 1.0
    scorer = LikelihoodScorer(
        loaded=loaded,
        average=asked.average,
        beta=_BETA.value or trained_beta,
        row_length=asked.row_length,
        max_length=asked.max_length,
        too_long=asked.too_long,
        batch_rows=asked.batch_rows,
        mesh=mesh,
    )
    settings = {
        "checkpoint": loaded.fingerprint,
        "tokenizer": loaded.tokenizer.fingerprint(),
        "dtype": str(np.dtype(compute_dtype(loaded.model.compute))),
        "average": asked.average,
        "max_length": asked.max_length,
        "too_long": asked.too_long,
    }
    return Engine(scorer, settings, scorer.packed, scorer.engine)


if __name__ == "__main__":
    entry.run(main)
