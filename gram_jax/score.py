"""Scores responses with a reward model: JSONL in, the same rows with their scores out.

  python -m gram_jax.score --checkpoint=CHECKPOINT --input=pairs.jsonl --output=scored.jsonl

CHECKPOINT is a folder of ours (a workdir, or one step of it) or a Hugging Face folder (config.json,
safetensors, tokenizer.json). Files may end in .gz. A row of the input is one of

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

More examples:

  # The mean log-prob per token, and each token's own
  python -m gram_jax.score --checkpoint=DIR --input=a.jsonl --output=b.jsonl.gz \\
      --average=mean --per_token
  # Sequences of up to 8192 tokens; longer ones lose the beginning of their prompt
  python -m gram_jax.score --checkpoint=DIR --input=a.jsonl --output=b.jsonl \\
      --max_length=8192 --too_long=truncate
  # A model that needs the memory of four devices
  python -m gram_jax.score --checkpoint=DIR --input=a.jsonl --output=b.jsonl --mesh=tensor=4

  # Two processes that share the work, as on two machines
  launch/local.sh 2 python -m gram_jax.score --checkpoint=DIR --input=a.jsonl --output=b.jsonl

Lines with the same prompt that stand close together share its computation. A run that was killed
goes on when the same command is given again: until it is complete, its lines stand in
OUTPUT.partial, and what they belong to in OUTPUT.state.json.
"""

from __future__ import annotations

import sys

import jax
from absl import flags

from gram_jax import entry
from gram_jax.checkpoints import load_model, reward_average
from gram_jax.config import ComputeConfig
from gram_jax.distributed import is_main
from gram_jax.mesh import make_mesh, parse_mesh
from gram_jax.scoring_job import ScoringJob, run_job

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Folder of the model.", required=True)
_INPUT = flags.DEFINE_string("input", None, "JSONL file to score.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "JSONL file to write.", required=True)
_REWARD = flags.DEFINE_enum(
    "reward", "likelihood", ["likelihood"], "What a score is: the log-prob of the response."
)
_AVERAGE = flags.DEFINE_enum(
    "average",
    None,
    ["sum", "mean"],
    "The reward is the log-prob, or the log-prob per token. By default as the model was fine-tuned,"
    " else sum.",
)
_ROW_LENGTH = flags.DEFINE_integer(
    "row_length",
    0,
    "Tokens of a row, in which short sequences lie side by side. 0 = 2048, or as many as the model"
    " has positions if they are fewer, or max_length if it is more.",
)
_MAX_LENGTH = flags.DEFINE_integer(
    "max_length",
    0,
    "Most tokens of a prompt and one response. 0 = row_length, or the model's positions.",
)
_TOO_LONG = flags.DEFINE_enum(
    "too_long",
    "error",
    ["error", "truncate"],
    "A longer one: stop and name it; or cut the prompt from the left (BOS and its last token stay),"
    " then the response from the right, and say so in the row's column `truncated`.",
)
_BATCH_ROWS = flags.DEFINE_integer(
    "batch_rows", 0, "Rows computed at once. 0 = 4096 tokens on CPU, else 16384 per device."
)
_PER_TOKEN = flags.DEFINE_bool(
    "per_token", False, "Write each token's log-prob, in the column `token_logprobs`."
)
_ADD_EOS = flags.DEFINE_bool("add_eos", True, "The end token is part of a response.")
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
    job = ScoringJob(
        input=_INPUT.value,
        output=_OUTPUT.value,
        average=_AVERAGE.value or reward_average(_CHECKPOINT.value),
        row_length=_ROW_LENGTH.value,
        max_length=_MAX_LENGTH.value,
        too_long=_TOO_LONG.value,
        batch_rows=_BATCH_ROWS.value,
        per_token=_PER_TOKEN.value,
        add_eos=_ADD_EOS.value,
    )
    compute = ComputeConfig(dtype=_DTYPE.value)
    # One device needs no mesh.
    mesh = make_mesh(parse_mesh(_MESH.value)) if len(jax.devices()) > 1 or _MESH.value else None
    result = run_job(job, lambda: load_model(_CHECKPOINT.value, compute, mesh), mesh=mesh)
    if not is_main():
        return
    if result.was_complete:
        print(f"{job.output} is complete already; nothing was done", file=sys.stderr)
    print(result.summary.text())
    print(f"written to {job.output}", file=sys.stderr)


if __name__ == "__main__":
    entry.run(main)
