"""The quickstart's data as files: what a user would have on disk, made from the installed Python.

Text to pretrain on, preference pairs to fine-tune on, and two sets of held-out pairs: objects of
the packages trained on (``in``), and packages of which nothing was seen (``out``).
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from gram_jax.data import builtin
from gram_jax.data.builtin import Docstring, distinct
from gram_jax.data.docstrings import (
    KINDS,
    DocstringPair,
    preference_pairs,
    pretraining_text,
    split,
)
from gram_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class TaskFiles:
    """Paths of the task's JSONL files, and a line that says what they hold."""

    text: Path
    text_validation: Path
    pairs: Path
    pairs_validation: Path
    pairs_in: Path
    pairs_out: Path
    summary: str


def write_docstring_task(folder: str | Path, *, seed: int, pairs_per_kind: int) -> TaskFiles:
    """Writes the files; the same Python and packages and the same seed give the same bytes.

    Args:
      folder: made if missing.
      seed: of the damage done to docstrings and of the order of rows.
      pairs_per_kind: of each kind of damage, in each of the two evaluation sets.

    Raises:
      UserError: this Python has too few docstrings (a stripped-down installation).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    standard = builtin.standard_library_docstrings().docstrings
    known = builtin.package_docstrings(builtin.IN_DISTRIBUTION).docstrings
    inside = distinct([*standard, *known])
    unseen = builtin.package_docstrings(builtin.OUT_OF_DISTRIBUTION).docstrings
    outside = distinct(unseen, seen=inside)
    train, held_out = split(inside)
    if min(len(train), len(held_out) * 10, len(outside)) < 500:
        raise UserError(
            f"this Python has {len(train)} docstrings to train on and {len(outside)} in other"
            " packages; the quickstart needs 500 of each (an installation without sources?)"
        )
    rng = random.Random(seed)
    texts = ["".join(pretraining_text(d)) for d in (*train, *builtin.reference_topics())]
    rng.shuffle(texts)
    pairs, _ = preference_pairs(train, train, seed=seed, per_docstring=len(KINDS))
    rng.shuffle(pairs)
    # A prompt is on one side only: a twentieth of the prompts is for validation.
    prompts = sorted({pair.prompt for pair in pairs})
    rng.shuffle(prompts)
    for_validation = set(prompts[: len(prompts) // 20])
    files = TaskFiles(
        text=folder / "text.jsonl",
        text_validation=folder / "text_validation.jsonl",
        pairs=folder / "pairs.jsonl",
        pairs_validation=folder / "pairs_validation.jsonl",
        pairs_in=folder / "pairs_in.jsonl",
        pairs_out=folder / "pairs_out.jsonl",
        summary=(
            f"{len(train):,} docstrings to train on, {len(held_out):,} held out, {len(outside):,}"
            f" from packages never seen; {len(pairs):,} pairs"
        ),
    )
    _write(files.text, [{"text": text} for text in texts])
    held_out_texts = ["".join(pretraining_text(d)) for d in held_out]
    _write(files.text_validation, [{"text": text} for text in held_out_texts])
    _write(files.pairs, [_row(p) for p in pairs if p.prompt not in for_validation])
    _write(files.pairs_validation, [_row(p) for p in pairs if p.prompt in for_validation])
    _write(files.pairs_in, _evaluation_rows(held_out, seed, pairs_per_kind))
    _write(files.pairs_out, _evaluation_rows(outside, seed, pairs_per_kind))
    return files


def _evaluation_rows(
    docstrings: Sequence[Docstring], seed: int, per_kind: int
) -> list[dict[str, str]]:
    """Pairs of the damage kinds in equal numbers, as far as there are so many."""
    rng = random.Random(seed)
    # About half of the docstrings give a pair of a kind, and no kind needs more than per_kind.
    asked = rng.sample(docstrings, min(len(docstrings), 8 * per_kind))
    pairs, _ = preference_pairs(asked, docstrings, seed=seed, per_docstring=len(KINDS))
    rng.shuffle(pairs)
    by_kind: dict[str, list[DocstringPair]] = defaultdict(list)
    for pair in pairs:
        by_kind[pair.kind].append(pair)
    return [_row(pair) for kind in KINDS for pair in by_kind[kind][:per_kind]]


def _row(pair: DocstringPair) -> dict[str, str]:
    return {
        "prompt": pair.prompt,
        "chosen": pair.chosen,
        "rejected": pair.rejected,
        "subset": pair.kind,
        "package": pair.package,
    }


def _write(path: Path, rows: Iterable[dict[str, str]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
