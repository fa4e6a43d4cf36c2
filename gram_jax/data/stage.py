"""The rows of one stage of training: its sources prepared, opened and put in order."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from gram_jax.config import READINGS, Config, TrainConfig
from gram_jax.data.examples import Layout
from gram_jax.data.judge import JudgeTemplate
from gram_jax.data.loader import RowOrder
from gram_jax.data.meter import Meter
from gram_jax.data.prepare import Beam, prepare_rows
from gram_jax.data.rowset import Manifest, Rows, RowSet
from gram_jax.data.token_records import ExampleCounts
from gram_jax.data.tokenizer import Tokenizer
from gram_jax.distributed import is_main, main_first
from gram_jax.errors import UserError
from gram_jax.storage import Place, local_folder


@dataclasses.dataclass
class StageData:
    """What a stage trains and validates on."""

    train: Rows
    validation: Rows | None
    order: RowOrder
    layout: Layout

    @property
    def sequences(self) -> int:
        """S, the most candidates of a row."""
        return self.train.sets[0].shape.sequences

    def per_row(self, weights: Sequence[float]) -> dict[str, float]:
        """How many epochs, tokens and pairs a row is, in the mean.

        A pair that a judge sees in both orders is one.
        """
        return {
            "epochs": 1 / len(self.train),
            "tokens": self.train.mean("tokens", weights),
            "pairs": self.train.mean("pairs", weights) / self.layout.comparisons,
        }

    def identity(self) -> list[str]:
        """Ids of the rows that are trained on; a run that goes on must have the same ones."""
        return [rows.manifest.id for rows in self.train.sets]

    def check_begun_with(self, ids: list[str]) -> None:
        """Raises UserError unless the rows are those that a run has begun with."""
        if ids != self.identity():
            raise UserError(
                "the rows to train on are not those that this run has begun with: a source has"
                " changed and was prepared again, or another folder is given as"
                " config.data.prepared; put it back, or choose another workdir"
            )

    def text(self) -> list[str]:
        """Lines for a log: a line for each source."""
        return [
            rows_text(name, one.manifest, self.layout)
            for name, rows in (("train", self.train), ("validation", self.validation))
            for one in (rows.sets if rows else ())
        ]


def rows_text(name: str, m: Manifest, layout: Layout) -> str:
    """A line for a log: what was read and packed for the folder of rows ``name``.

    A pair that a judge sees in both orders is one, as in `StageData.per_row`.
    """
    pairs = m.packed["pairs"] // layout.comparisons
    what = ", ".join(source["spec"] for source in m.sources)
    return (
        f"{name} {what}: {ExampleCounts(**m.read).text()}; packed into {m.rows:,} rows of"
        f" {m.shape['tokens']:,} tokens, padding {m.padding:.2%}, pairs {pairs:,},"
        f" spilled {m.packed['spilled']:,}, repeated tokens {m.packed['repeated_tokens']:,}"
    )


def stage_data(
    config: Config,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    replace: bool,
    replace_validation: bool = False,
    quiet: bool = False,
) -> StageData:
    """Opens the rows of a stage, prepared in ``folder`` first where they are not there.

    Process 0 prepares, the others wait; all read the same files.

    Args:
      replace: rows of other sources or settings, left there by an earlier run, give way.
      replace_validation: those to validate on do, in any case.
      quiet: no progress is shown.

    Raises:
      UserError: a source cannot be used, or ``folder`` holds other rows.
    """
    names = list(_sources(config))
    replaced = {"train": replace, "validation": replace or replace_validation}

    def prepare() -> None:
        _prepare(config, tokenizer, folder, None, replace=replaced, quiet=quiet)

    main_first(prepare)
    opened = {name: RowSet(folder / name) for name in names}
    train = Rows([rows for name, rows in opened.items() if name.startswith("train/")])
    validation = [rows for name, rows in opened.items() if name.startswith("validation/")]
    order = RowOrder(train.sizes, config.seed, config.data.weights)
    return StageData(train, Rows(validation) if validation else None, order, stage_layout(config))


def prepare_stage(
    config: Config, tokenizer: Tokenizer, folder: Place, beam: Beam | None = None
) -> dict[str, Manifest]:
    """Makes the rows of a stage in ``folder``, unless they are there; by name what they are.

    Args:
      beam: what makes the rows; None for the processes of this machine.

    Raises:
      UserError: a source cannot be used, or ``folder`` holds other rows.
    """
    kept = {"train": False, "validation": False}
    return _prepare(config, tokenizer, folder, beam, replace=kept, quiet=False)


def _prepare(
    config: Config,
    tokenizer: Tokenizer,
    folder: Place,
    beam: Beam | None,
    *,
    replace: Mapping[str, bool],
    quiet: bool,
) -> dict[str, Manifest]:
    meter = Meter(quiet=quiet or not is_main())
    layout = stage_layout(config)
    return {
        name: prepare_rows(
            spec, config.data, tokenizer, folder / name,
            layout=layout, replace=replace[name.partition("/")[0]], meter=meter, use=use, beam=beam,
        )
        for name, (spec, use) in _sources(config).items()
    }  # fmt: skip


def _sources(config: Config) -> dict[str, tuple[str, str]]:
    """By the name of a folder of rows, the source and what it is used for."""
    data = config.data
    if not data.train:
        raise UserError(
            "config.data.train is empty; name a source, as in --config.data.train=FILE.jsonl"
        )
    held_out = data.train if data.holdout else ()
    return {
        f"{name}/{number}": (spec, use)
        for name, use, specs in (
            ("train", "train", data.train),
            ("validation", "validation", data.validation),
            ("validation", "held_out", held_out),
        )
        for number, spec in enumerate(specs)
    }


def stage_layout(config: Config) -> Layout:
    """What the objective of a stage needs of its rows."""
    objective, data = config.objective, config.data
    reading = READINGS[objective.name]
    targets = reading not in ("judge", "head") or objective.chosen_ce > 0
    if reading != "judge" and data.format != "pairs":
        return Layout(reading, targets)
    return Layout(reading, targets, JudgeTemplate.load(data.judge_template), data.judge_orders)


def num_steps(train: TrainConfig, per_row: Mapping[str, float]) -> int:
    """Optimiser steps of a stage, given how much of each unit of length a row is.

    Raises:
      UserError: the rows hold nothing of that unit.
    """
    if train.length_unit == "steps":
        return max(round(train.length), 1)
    share = per_row[train.length_unit]
    if not share:
        raise UserError(f"config.train.length_unit={train.length_unit!r}: the data has none")
    return max(math.ceil(train.length / (share * train.batch_rows)), 1)


def data_folder(config: Config, workdir: str | Path) -> Path:
    """Where the prepared rows of a run lie."""
    if config.data.prepared:
        return local_folder(config.data.prepared, "config.data.prepared")
    return Path(workdir) / "data"
