"""Which rows of a source a stage uses: not all, where some are for validation or evaluation.

Two prompts are the same if they are after case and white space are evened out, without their system
messages. All choices are by the hash of a prompt or of a row's place, so they do not depend on who
makes them or when.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gram_jax.config import DataConfig
from gram_jax.data.judge import question_text
from gram_jax.data.records import Source
from gram_jax.data.shapes import detect_format, parse_row
from gram_jax.data.sources import Prompt, Row, TextRow, require_prompt
from gram_jax.data.token_records import ExampleCounts, TokenRecord, record_key
from gram_jax.errors import DataError


@dataclasses.dataclass(frozen=True, slots=True)
class Selection:
    """What a stage uses of a source.

    Attributes:
      use: "train"; "validation", which uses all; or "held_out": the prompts of a training source
        that are held out for validation.
      holdout: share of the prompts that is held out.
      excluded: keys of the prompts of ``exclude``.
      drop: rows with these prompts are left out; else they are only counted.
      max_pairs: how many labelled pairs are drawn; 0 = all.
      draw_seed: seed of the draw.
    """

    use: str = "train"
    holdout: float = 0.0
    excluded: frozenset[int] = frozenset()
    drop: bool = True
    max_pairs: int = 0
    draw_seed: int = 0

    @classmethod
    def of(cls, config: DataConfig, use: str) -> Selection:
        """The selection that the settings ask for; ``excluded`` is still empty."""
        if use != "train":
            return cls(use, config.holdout if use == "held_out" else 0.0)
        drop = config.on_overlap == "drop" or not config.exclude
        return cls(use, config.holdout, frozenset(), drop, config.max_pairs, config.draw_seed)

    def key(self) -> dict[str, Any]:
        """All but ``excluded``, as plain values: rows of another selection are other rows."""
        return {
            "use": self.use,
            "holdout": self.holdout,
            "on_overlap": "drop" if self.drop else "count",
            "max_pairs": self.max_pairs,
            "draw_seed": self.draw_seed if self.max_pairs else 0,
        }

    def uses(self, row: Row, counts: ExampleCounts) -> bool:
        """Whether a row is used; counts why it is not."""
        if not self.holdout and not self.excluded:
            return True
        text = normalised(row.text if isinstance(row, TextRow) else row.prompt)
        held_out = record_key(b"held out: " + text) < self.holdout * 2**64
        if held_out != (self.use == "held_out"):
            counts.other_part += 1
            return False
        if record_key(text) in self.excluded:
            counts.overlapping_rows += 1
            return not self.drop
        return True

    def mark(self, records: Sequence[TokenRecord], place: str) -> None:
        """Gives the comparisons of a row their numbers in the draw; ``place`` names the row."""
        if not self.max_pairs:
            return
        for number, record in enumerate(records):
            # A judge's record is one comparison, in one or in both orders.
            names = (0 if pair.b is None else i for i, pair in enumerate(record.pairs))
            record.draws = tuple(
                record_key(f"{self.draw_seed}:{place}:{number}:{name}".encode()) for name in names
            )

    def last_drawn(self, draws: npt.NDArray[np.uint64], file: str) -> int:
        """The highest number in the draw that is still drawn; of n pairs, those with the lowest.

        So the pairs of a draw are among those of any larger one with the same seed.

        Raises:
          DataError: there are fewer pairs than are to be drawn.
        """
        distinct = np.unique(draws)
        if len(distinct) < self.max_pairs:
            reason = (
                f"has {len(distinct):,} pairs that can be used, fewer than config.data.max_pairs="
                f"{self.max_pairs}; ask for fewer, or join more files with commas"
            )
            raise DataError(reason, file=file)
        return int(distinct[self.max_pairs - 1])


def drawn(record: TokenRecord, last: int, counts: ExampleCounts) -> TokenRecord | None:
    """A record with those of its pairs that are drawn, and their responses; None if none is."""
    pairs = [pair for pair, draw in zip(record.pairs, record.draws, strict=True) if draw <= last]
    counts.undrawn_pairs += len(set(record.draws)) - len({d for d in record.draws if d <= last})
    if len(pairs) == len(record.pairs):
        return record
    if not pairs:
        return None
    kept = sorted({response for pair in pairs for response in pair.members()})
    return TokenRecord(
        record.key,
        record.prompt,
        tuple(record.responses[place] for place in kept),
        tuple(
            dataclasses.replace(
                pair, a=kept.index(pair.a), b=None if pair.b is None else kept.index(pair.b)
            )
            for pair in pairs
        ),
        record.reference and tuple(record.reference[place] for place in kept),
    )


def normalised(prompt: Prompt) -> bytes:
    """What two prompts that are the same have in common."""
    if not isinstance(prompt, str):
        prompt = [message for message in prompt if message["role"] not in ("system", "tools")]
    return " ".join(question_text(prompt).split()).casefold().encode("utf-8")


def prompts_of(sources: Sequence[Source]) -> frozenset[int]:
    """Keys of the prompts of evaluation files, of texts where there are no prompts.

    Raises:
      DataError: a row is damaged or has columns of no format.
    """
    found = set()
    for source in sources:
        for block in source.blocks(2**20):
            for line, record in block.records():
                if isinstance(record, DataError):
                    raise record
                found.add(record_key(normalised(_prompt_of(record, block.file, line))))
    return frozenset(found)


def _prompt_of(record: dict[str, Any], file: str, line: int) -> Prompt:
    if record.get("prompt") is not None:  # whatever else it has
        return require_prompt(record, file=file, line=line)
    format = detect_format(record, file=file, line=line)
    row = parse_row(record, format, file=file, line=line)
    return row.text if isinstance(row, TextRow) else row.prompt
