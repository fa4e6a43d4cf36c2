"""Tokens computed when a preference file is scored: gram_jax beside padded batches. Counted only.

  python -m benchmarks.preferences [--data=FOLDER] [--small]

The file has several pairs a prompt. `gram_jax.score` reads a file on a disk by prompts, wherever
their lines stand, and computes a prompt once for the responses of a row, and a response that
several pairs have once a block; the peer computes both sequences of every pair, all of the file
sorted by length, in padded batches of 4096 tokens. Counted are the places of all rows or batches,
padding included: as the command does it, and in the order of the file, which is how it reads one
that is compressed. Longer sequences than 2048 tokens are cut.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.command import finish, is_small, setting
from benchmarks.corpus import preference_rows
from benchmarks.harness import say
from benchmarks.results import Case, Target
from benchmarks.workloads import padded_places
from gram_jax import entry
from gram_jax.checkpoints import load_model
from gram_jax.config import ComputeConfig
from gram_jax.grouping import IntArray, rows_of
from gram_jax.scorer import RewardSettings, Scorer
from gram_jax.scoring import Running
from gram_jax.scoring_input import check_input, read_blocks
from gram_jax.scoring_job import BLOCK_BATCHES

TARGET = 0.6
BATCH_TOKENS = 4096


def main(_: list[str]) -> None:
    """Counts, prints and writes."""
    with setting("56M") as s:
        rows = list(preference_rows(s.data))[: 200 if is_small() else None]
        prompts = len({row["prompt"] for row in rows})
        say(f"{len(rows):,} pairs of {prompts:,} prompts")
        settings = RewardSettings(reading="likelihood", too_long="truncate")
        scorer = Scorer(load_model(s.model, ComputeConfig()), settings)
        path = s.scratch / "pairs.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        by_prompt = check_input(path, ()).by_prompt
        cases = []
        for name, order in (("by prompts", by_prompt), ("in the file's order", None)):
            ours, lengths = count_ours(scorer, path, order)
            theirs = padded_places(lengths, BATCH_TOKENS)
            cases.append(
                Case(
                    name=name,
                    what=f"{len(rows):,} pairs of {prompts:,} prompts, {sum(lengths):,} tokens:"
                    f" {ours:,} places computed, the peer {theirs:,}",
                    timings=[],
                    difference=None,
                    targets=[
                        Target(
                            what="tokens computed, peer = 100 %",
                            goal=TARGET,
                            reached=ours / theirs,
                            unit="%",
                            at_most=True,
                        )
                    ],
                )
            )
    finish("preferences", {}, cases)


def count_ours(scorer: Scorer, path: Path, order: IntArray | None) -> tuple[int, list[int]]:
    """Places that `gram_jax.score` computes for a file, and the length of each of its sequences."""
    block_tokens = BLOCK_BATCHES * scorer.shapes[-1].places
    places, lengths = 0, list[int]()
    rows = None if order is None else rows_of(path, order)
    blocks = read_blocks(path, scorer.encoder, start=0, block_tokens=block_tokens, rows=rows)
    for block in blocks:
        examples = block.sequences.examples()
        places += Running(examples, scorer.shapes, first=block.lines[0].number == 1).places
        by_key = {example.key: example for example in examples}
        for line in block.lines:
            for key, number in line.places:
                example: Any = by_key[key]
                lengths.append(len(example.prompt) + len(example.responses[number]))
    return places, lengths


if __name__ == "__main__":
    entry.run(main, one_process=True)
