"""A pretraining step: gram_jax beside transformers and PyTorch's fused AdamW.

  python -m benchmarks.pretraining [--data=FOLDER] [--small]

8 rows of 512 tokens, 56M parameters, float32: forward, cross-entropy, backward, clipping, AdamW.
Every row is one document, so that both compute the same. The loss of every step must agree, and the
gradient norm of the first. The share of the peak is FLOPs of a step / (seconds x FLOP/s of matrix
products by XLA), with the FLOPs of `benchmarks.needed`: products only, causal attention counted
once, the backward pass as two forward passes.
"""

from __future__ import annotations

from benchmarks import needed, training, workloads
from benchmarks.command import finish, is_small, setting
from benchmarks.harness import OURS, speed_target
from benchmarks.results import Case, Target
from gram_jax import entry
from gram_jax.config import ObjectiveConfig

SPEED, SHARE = 2.0, 0.45
ROWS, LENGTH = 8, 512


def main(_: list[str]) -> None:
    """Measures, prints and writes."""
    rows, length = (2, 32) if is_small() else (ROWS, LENGTH)
    with setting("56M") as s:
        # The first token is context: a row computes `length` tokens and predicts as many.
        ids = workloads.rows_of_text(s.data, s.tokenizer, rows, length + 1)
        flops = needed.BACKWARD * needed.once_a_prompt(s.config, [(0, [length])] * rows, "all")
        peak, timings, difference = training.measure(
            s,
            [[one[:1], one[1:]] for one in ids],
            ObjectiveConfig(name="next_token"),
            row_length=length,
            work=rows * length,
            unit="tokens",
            flops={OURS: flops, "peer": flops},
        )
    shares = [flops / (seconds * peak["XLA"]) for seconds in timings[0].seconds]
    case = Case(
        name="56M",
        what=f"a step on {rows} x {length} tokens, {flops / 1e12:.2f} TFLOP",
        timings=timings,
        difference=difference,
        targets=[
            speed_target(SPEED, timings, "peer"),
            Target(
                what="share of the peak",
                goal=SHARE,
                reached=flops / (timings[0].median * peak["XLA"]),
                unit="%",
                low=min(shares),
                high=max(shares),
            ),
        ],
    )
    finish("pretraining", peak, [case])


if __name__ == "__main__":
    entry.run(main, one_process=True)
