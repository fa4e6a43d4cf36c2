"""What the benchmarks of training share: the same steps taken by both sides in turn."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

from benchmarks.command import Setting
from benchmarks.harness import BFLOAT16, Worker, compare, has_bfloat16, measure_peak
from benchmarks.results import Timing
from gram_jax.config import ObjectiveConfig, OptimizerConfig

LEARNING_RATE = 1e-4


def measure(
    setting: Setting,
    sequences: list[list[Any]],
    objective: ObjectiveConfig,
    *,
    row_length: int,
    work: int,
    unit: str,
    flops: dict[str, float],
    half: bool = True,
) -> tuple[dict[str, float], list[Timing], float]:
    """Steps on one batch, always the same; the loss of each must agree, and the first's gradients.

    Args:
      setting: the model.
      sequences: of each example (prompt ids, response ids, ...); two are a pair.
      objective: the loss.
      row_length: of gram_jax's rows; 0 = the default.
      work, unit: what a step does, and in what.
      flops: that a step of each side needs.
      half: show the peer in bfloat16, too, where the processor has instructions for it.

    Returns:
      FLOP/s of matrix products by library, the timings, and the largest difference of any number.
    """
    both = {
        "model": str(setting.model),
        "sequences": sequences,
        "objective": dataclasses.asdict(objective),
        "learning_rate": LEARNING_RATE,
    }
    theirs = {**both, **_optimizer_arguments()}
    with contextlib.ExitStack() as stack:
        ours = stack.enter_context(Worker("ours:Training", **both, row_length=row_length))
        peer = stack.enter_context(Worker("peer:Training", **theirs))
        peak = measure_peak(ours, peer, setting.peak_size)
        peers = {"peer": (peer, "plain")}
        if half and has_bfloat16(peak):  # with weights of its own, as a step changes them
            other = stack.enter_context(Worker("peer:Training", **theirs))
            peers[BFLOAT16] = (other, BFLOAT16)
        timings, difference = compare(
            ours,
            peers,
            repetitions=setting.repetitions,
            work=work,
            unit=unit,
            flops={**flops, BFLOAT16: flops["peer"]},
            peak=peak,
            warm_up_counts=True,
        )
    return peak, timings, difference


def _optimizer_arguments() -> dict[str, object]:
    """gram_jax's default optimiser, for the peer's."""
    config = OptimizerConfig()
    return {
        "weight_decay": config.weight_decay,
        "betas": [config.beta1, config.beta2],
        "eps": config.eps,
        "clip": config.clip,
    }
