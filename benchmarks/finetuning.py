"""A preference fine-tuning step: gram_jax beside PyTorch in the way of preference trainers.

  python -m benchmarks.finetuning [--data=FOLDER] [--small]

Pairs with prompts of 256 tokens and responses of 128 on average (64 to 192), 56M parameters,
float32; the smoothed pairwise loss on sums of log-probs, backward, clipping, AdamW. gram_jax
computes a prompt once for both responses, in rows of the default length. The peer computes both
sequences in full, padded, in one batch of chosen and rejected, with the logits of all tokens; as
one batch is what preference trainers make, it is not cut up. The loss of every step must agree, and
the gradient norm of the first. Counted are pairs.
"""

from __future__ import annotations

from absl import flags

from benchmarks import needed, training, workloads
from benchmarks.command import finish, is_small, setting
from benchmarks.harness import OURS, speed_target
from benchmarks.results import Case
from gram_jax import entry
from gram_jax.config import ObjectiveConfig

_HALF = flags.DEFINE_bool("bfloat16", False, "Show the peer in bfloat16, too.")

TARGET = 3.0
PAIRS, PROMPT, RESPONSE = 4, 256, 128
BETA = 0.1
"""Of a sum of log-probs, so that the loss of random weights is no straight line."""


def main(_: list[str]) -> None:
    """Measures, prints and writes."""
    pairs, prompt, response = (2, 16, 8) if is_small() else (PAIRS, PROMPT, RESPONSE)
    with setting("56M") as s:
        sequences = workloads.pairs_of_ids(
            s.data, s.tokenizer, pairs, prompt=prompt, response=response
        )
        tokens = sum(2 * len(a) + len(b) + len(c) for a, b, c in sequences)
        groups = [(len(a) - 1, [len(b), len(c)]) for a, b, c in sequences]
        once = needed.once_a_prompt(s.config, groups, "responses")
        twice = needed.once_a_response(s.config, groups, "all")
        peak, timings, difference = training.measure(
            s,
            sequences,
            ObjectiveConfig(name="smoothed_pairwise", beta=BETA),
            row_length=0,
            work=pairs,
            unit="pairs",
            flops={OURS: needed.BACKWARD * once, "peer": needed.BACKWARD * twice},
            half=_HALF.value,
        )
    case = Case(
        name="56M",
        what=f"a step on {pairs} pairs, {tokens:,} tokens with each prompt twice",
        timings=timings,
        difference=difference,
        targets=[speed_target(TARGET, timings, "peer")],
    )
    finish("finetuning", peak, [case])


if __name__ == "__main__":
    entry.run(main, one_process=True)
