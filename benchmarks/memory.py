"""Memory of a compiled scoring step and of a compiled training step, as the vocabulary grows.

  python -m benchmarks.memory [--small]

Nothing is computed: XLA says of each compiled step how many bytes it needs beside its arguments
(weights, moments, the batch) and its results. Logits of all targets at once, [B, M, V] float32,
would be the largest array by far, and grow with the vocabulary; a step must need far less.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from benchmarks.command import finish, is_small
from benchmarks.harness import say
from benchmarks.models import SHAPES
from benchmarks.results import Case, Target
from benchmarks.step_memory import scoring_bytes, share_of_logits, training_bytes
from gram_jax import entry
from gram_jax.config import ModelConfig
from gram_jax.report import Table
from gram_jax.scoring import scoring_shape

VOCABULARIES = (32_000, 64_000, 96_000, 152_000)
ROWS, TOKENS = 8, 512
MEBI = 2**20

SHARE = 0.05
"""Most that may be left of an array of all logits."""


def step_bytes(config: ModelConfig, tokens: int, rows: int) -> NDArray[np.int64]:
    """[B, M, V] in float32, the scoring step and the training step, on rows of so many tokens."""
    shape = scoring_shape(tokens)
    logits = 4 * rows * shape.targets * config.vocab_size
    say(f"  V {config.vocab_size:,}, {rows} rows of {tokens} tokens")
    return np.array(
        [logits, scoring_bytes(config, shape, rows), training_bytes(config, tokens, rows)]
    )


def main(_: list[str]) -> None:
    """Compiles, prints and writes."""
    base = SHAPES["tiny" if is_small() else "56M"]
    vocabularies = (512, 4096) if is_small() else VOCABULARIES
    rows, tokens = (8, 128) if is_small() else (ROWS, TOKENS)
    models = [dataclasses.replace(base, vocab_size=vocab_size) for vocab_size in vocabularies]
    found = [step_bytes(model, tokens, rows) for model in models]
    longer = [step_bytes(model, 2 * tokens, rows) for model in (models[0], models[-1])]
    table = [
        (f"{model.vocab_size:,}", *(f"{x / MEBI:,.0f}" for x in sizes),
         f"{4 * model.vocab_size * model.hidden_size / MEBI:,.0f}")
        for model, sizes in zip(models, found, strict=True)
    ]  # fmt: skip
    headers = ["V", "[B, M, V] float32", "scoring step", "training step", "[V, D] float32"]
    print(f"Temporary memory of {rows} rows of {tokens} tokens, MiB:")
    print(Table(headers, table).text(), end="\n\n")
    shares = share_of_logits(found[0], found[-1], *longer)
    targets = [
        Target(
            what=f"{name} step: growth with vocabulary x targets, of [B, M, V]'s", goal=SHARE,
            reached=share, unit="%", at_most=True,
        )
        for name, share in zip(("scoring", "training"), shares, strict=True)
    ]  # fmt: skip
    each = "; ".join(
        f"V {model.vocab_size}: scoring {sizes[1]}, training {sizes[2]}"
        for model, sizes in zip(models, found, strict=True)
    )
    case = Case(
        name="tiny" if is_small() else "56M",
        what=f"bytes of compiled steps, {rows} rows of {tokens} tokens: {each}",
        timings=[],
        difference=None,
        targets=targets,
    )
    finish("memory", {}, [case])


if __name__ == "__main__":
    entry.run(main, one_process=True)
