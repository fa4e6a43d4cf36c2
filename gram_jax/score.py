"""Scores responses with a reward model: JSONL in, the same rows with their scores out.

  python -m gram_jax.score --checkpoint=CHECKPOINT --input=pairs.jsonl --output=scored.jsonl

CHECKPOINT is a folder of ours (a workdir, or one step of it) or a Hugging Face folder (config.json,
safetensors, tokenizer.json). Files may end in .gz, and be URLs (docs/preparing.md). A row of the
input is one of

  {"prompt": ..., "response": ...}
  {"prompt": ..., "responses": [..., ...]}
  {"prompt": ..., "chosen": ..., "rejected": ...}

where prompts and responses are text, or chat messages [{"role": ..., "content": ...}], which go
through the tokenizer's chat template. The output has the same rows in the same order, and in each

  logprob      log-prob of the response given the prompt, in nats
  num_tokens   tokens of the response, its end token included
  reward       logprob, or logprob / num_tokens for a model of mean log-probs (--average)

with lists, chosen first, where a row has several candidates. With chosen and rejected, the share of
pairs in which the chosen response has the higher reward is printed at the end.

With --reward=head, reward is the number of the model's head, and there is no logprob. With
--reward=judge a row has two responses, or one and a column `reference` to compare it with. The
judge reads both orders; log_odds holds log p(first label) - log p(second label) with the row's
first response shown first, then shown second; reward is the mean over both orders of the
probability that a response is the better one, so that the two rewards of a row add up to 1. The
label's template is the checkpoint's, or --template=FILE.toml (docs/judge.md).

More examples:

  # The mean log-prob per token, and each token's own
  python -m gram_jax.score --checkpoint=DIR --input=a.jsonl --output=b.jsonl.gz \\
      --average=mean --per_token
  # Sequences of up to 8192 tokens; longer ones lose the beginning of their prompt
  python -m gram_jax.score --checkpoint=DIR --input=a.jsonl --output=b.jsonl \\
      --max_length=8192 --too_long=truncate
  # A model that needs the memory of four devices
  python -m gram_jax.score --checkpoint=DIR --input=a.jsonl --output=b.jsonl --mesh=tensor=4

  # Two processes that share the work, as on two machines (docs/hosts.md)
  launch/local.sh 2 python -m gram_jax.score --checkpoint=DIR --input=a.jsonl --output=b.jsonl

Lines with the same prompt that stand close together share its computation. A run that was killed
goes on when the same command is given again: until it is complete, its lines stand in
OUTPUT.partial, and what they belong to in OUTPUT.state.json; those of several processes stand in
OUTPUT.shards.
"""

from __future__ import annotations

import sys

from absl import flags

from gram_jax import entry
from gram_jax.distributed import is_main
from gram_jax.errors import UserError
from gram_jax.mesh import parse_mesh
from gram_jax.piecework import by_pieces, own_mesh
from gram_jax.reward_model import define_flags, flag_mesh, flag_model, flag_settings
from gram_jax.scoring_by_pieces import run_pieces
from gram_jax.scoring_job import JobResult, ScoringJob, run_job
from gram_jax.signals import StopRequest
from gram_jax.storage import is_url, local_output

define_flags()
_INPUT = flags.DEFINE_string("input", None, "JSONL file to score.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "JSONL file to write.", required=True)
_PER_TOKEN = flags.DEFINE_bool(
    "per_token", False, "Write each token's log-prob, in the column `token_logprobs`."
)


def main(_: list[str]) -> None:
    settings = flag_settings()
    if _PER_TOKEN.value and settings.reading != "likelihood":
        raise UserError(
            f"--per_token: a {settings.reading} has no log-probs of tokens; leave it out, or add"
            " --reward=likelihood"
        )
    stop = StopRequest("stopped by SIGTERM; the same command goes on after what is written")
    with local_output(_OUTPUT.value, writes=is_main()) as output, stop:
        job = ScoringJob(
            input=_INPUT.value,
            output=output,
            reward=settings,
            per_token=_PER_TOKEN.value,
            stall_seconds=flags.FLAGS.stall_seconds,
        )
        result = _run(job)
    if not is_main():
        return
    if result.was_complete:
        print(f"{_OUTPUT.value} is complete already; nothing was done", file=sys.stderr)
    print(result.summary.text())
    print(f"written to {_OUTPUT.value}", file=sys.stderr)


def _run(job: ScoringJob) -> JobResult:
    """In pieces, or all processes together."""
    spread = parse_mesh(flags.FLAGS.mesh)
    # Pieces lie beside the output, where every process writes; a store is written once, at the end.
    if not is_url(_OUTPUT.value) and by_pieces(job.output, spread):
        mesh = own_mesh(spread)
        return run_pieces(job, flag_model(mesh), mesh=mesh)
    mesh = flag_mesh()
    return run_job(job, flag_model(mesh), mesh=mesh)


if __name__ == "__main__":
    entry.run(main)
