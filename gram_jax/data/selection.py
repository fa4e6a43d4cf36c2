"""Which rows of a source a stage uses: not all, where some are for validation or evaluation.

Two prompts are the same if they are after case and white space are evened out, without their system
messages. All choices are by the hash of a prompt or of a row's place, so they do not depend on who
makes them or when.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gram_jax.config import DataConfig
from gram_jax.data.judge import question_text, response_text
from gram_jax.data.ngrams import Keys, distinct_keys, shares_one
from gram_jax.data.records import Source
from gram_jax.data.shapes import detect_format, parse_row
from gram_jax.data.sources import Prompt, Row, TextRow, UnpairedRow, require_prompt
from gram_jax.data.token_records import ExampleCounts, TokenRecord, record_key
from gram_jax.errors import DataError


def _no_keys() -> Keys:
    return np.zeros(0, np.uint64)


@dataclasses.dataclass(frozen=True, slots=True)
class Selection:
    """What a stage uses of a source.

    Attributes:
      use: "train"; "validation", which uses all; or "held_out": the prompts of a training source
        that are held out for validation.
      holdout: share of the prompts that is held out.
      excluded: keys of the prompts of ``exclude``.
      exclude_ngrams: how many words in a row of the texts of ``exclude`` no row may have; 0 = any.
      ngrams: keys of these runs of words, sorted.
      drop: rows with these prompts or runs of words are left out; else they are only counted.
      near_duplicates: how alike a row may be to an earlier one before it is left out; 0 = not so.
      max_pairs: how many labelled pairs are drawn; 0 = all.
      draw_seed: seed of the draw.
    """

    use: str = "train"
    holdout: float = 0.0
    excluded: frozenset[int] = frozenset()
    drop: bool = True
    max_pairs: int = 0
    draw_seed: int = 0
    exclude_ngrams: int = 0
    near_duplicates: float = 0.0
    ngrams: Keys = dataclasses.field(default_factory=_no_keys, compare=False)

    @classmethod
    def of(cls, config: DataConfig, use: str) -> Selection:
        """The selection that the settings ask for; nothing is excluded yet."""
        if use != "train":
            return cls(use, config.holdout if use == "held_out" else 0.0)
        return cls(
            use,
            config.holdout,
            drop=config.on_overlap == "drop" or not config.exclude,
            max_pairs=config.max_pairs,
            draw_seed=config.draw_seed,
            exclude_ngrams=config.exclude_ngrams,
            near_duplicates=config.near_duplicates,
        )

    def excluding(self, sources: Sequence[Source]) -> Selection:
        """The selection without the prompts, and the runs of words, of evaluation files.

        Raises:
          DataError: a row of theirs is damaged or has columns of no format.
        """
        prompts, runs = set(), [_no_keys()]
        for record, file, line in _records_of(sources):
            prompt = _prompt_of(record, file, line)
            prompts.add(record_key(normalised(prompt)))
            if self.exclude_ngrams:
                texts = _texts_of_record(record, prompt, file, line)
                runs.append(distinct_keys(texts, self.exclude_ngrams))
        ngrams = np.unique(np.concatenate(runs))
        return dataclasses.replace(self, excluded=frozenset(prompts), ngrams=ngrams)

    def key(self) -> dict[str, Any]:
        """All but what is excluded, as plain values: rows of another selection are other rows."""
        later = {
            "exclude_ngrams": self.exclude_ngrams,
            "near_duplicates": self.near_duplicates,
        }
        return {
            "use": self.use,
            "holdout": self.holdout,
            "on_overlap": "drop" if self.drop else "count",
            "max_pairs": self.max_pairs,
            "draw_seed": self.draw_seed if self.max_pairs else 0,
            # Where they are not used, rows are those of versions that did not have them.
            **{name: value for name, value in later.items() if value},
        }

    def uses(self, row: Row, counts: ExampleCounts) -> bool:
        """Whether a row is used, as far as the row itself says; counts why it is not."""
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
        n = self.exclude_ngrams
        if n and any(shares_one(text, n, self.ngrams) for text in texts_of(row)):
            counts.overlapping_texts += 1
            return not self.drop
        return True

    def mark(self, records: Sequence[TokenRecord], place: str) -> None:
        """Gives the comparisons of a row their numbers in the draw; ``place`` names the row."""
        if not self.max_pairs:
            return
        first = 0  # pairs are numbered through a row, so that each reading draws the same ones
        for record in records:
            # A judge's record is one comparison, in one or in both orders; others hold all pairs.
            names = [0 if pair.b is None else i for i, pair in enumerate(record.pairs)]
            record.draws = tuple(
                record_key(f"{self.draw_seed}:{place}:0:{first + name}".encode()) for name in names
            )
            first += max(names, default=-1) + 1

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

    def drawn_tokens(self, tokens: int, draws: npt.NDArray[np.uint64], last: int) -> int:
        """About how many of the tokens of all records are those of pairs that are drawn."""
        return int(tokens * float((draws <= last).mean()))


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


def texts_of(row: Row) -> list[str]:
    """The texts of a row, each by itself: its text, or its prompt and its responses."""
    if isinstance(row, TextRow):
        return [row.text]
    responses = (row.response,) if isinstance(row, UnpairedRow) else row.responses
    return [question_text(row.prompt), *map(response_text, responses)]


def _records_of(sources: Sequence[Source]) -> Iterator[tuple[dict[str, Any], str, int]]:
    """(record, file, line) of each row of some files.

    Raises:
      DataError: a row is damaged.
    """
    for source in sources:
        for block in source.blocks(2**20):
            for line, record in block.records():
                if isinstance(record, DataError):
                    raise record
                yield record, block.file, line


def _prompt_of(record: dict[str, Any], file: str, line: int) -> Prompt:
    """The prompt of a row of an evaluation file, its text where it has no prompt."""
    if record.get("prompt") is not None:  # whatever else it has
        return require_prompt(record, file=file, line=line)
    format = detect_format(record, file=file, line=line)
    row = parse_row(record, format, file=file, line=line)
    return row.text if isinstance(row, TextRow) else row.prompt


def _texts_of_record(record: dict[str, Any], prompt: Prompt, file: str, line: int) -> list[str]:
    """All texts of a row of an evaluation file; its prompt where that is all it has."""
    try:
        format = detect_format(record, file=file, line=line)
        return texts_of(parse_row(record, format, file=file, line=line))
    except DataError:
        return [question_text(prompt)]
