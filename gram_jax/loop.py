"""A stage of training from config to last checkpoint: the same loop for both stages.

The same command run again goes on from the newest checkpoint. The loop never waits for the step it
has just started: it reads the numbers of the step before, so the device always has work.
"""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gram_jax.checkpoints import CheckpointStore, RunInfo, load_model, versions
from gram_jax.config import FIXED, Config, differences, validate
from gram_jax.data.examples import ExampleCounts, read_examples, row_shape
from gram_jax.data.loader import PackedRows, RowOrder, device_batch
from gram_jax.data.tokenizer import Tokenizer
from gram_jax.errors import UserError
from gram_jax.mesh import check_divides, make_mesh
from gram_jax.models.decoder import Decoder, abstract_decoder, init_decoder
from gram_jax.objectives import Metrics, smoothing_floor
from gram_jax.reporting import MetricsLog, Progress
from gram_jax.rows import PackCounts, pack
from gram_jax.training import (
    COUNTS,
    TrainState,
    divide,
    init_state,
    make_eval_step,
    make_optimizer,
    make_train_step,
    peak_flops,
    split_model,
)


class NotFinite(UserError):
    """A loss or a gradient norm is NaN or infinite; the state that has it is never saved."""


@dataclasses.dataclass(frozen=True)
class StageResult:
    """What a stage ended with."""

    steps: int
    metrics: dict[str, float]  # of the last step
    validation: dict[str, float]  # empty where there is no validation data
    seconds: float


@dataclasses.dataclass
class _Data:
    """Packed rows of a stage and what the files became."""

    rows: PackedRows
    packed: PackCounts
    read: ExampleCounts


def _prepare(config: Config, files: tuple[str, ...], tokenizer: Tokenizer) -> _Data:
    """Reads, tokenises and packs files in memory.

    Raises:
      UserError: there is nothing to train on; DataError for a bad row.
    """
    paths = [path for entry in files for path in entry.split(",")]
    if not paths:
        raise UserError("config.data.train is empty; name JSONL files: --config.data.train=F.jsonl")
    shape, read, packed = row_shape(config.data), ExampleCounts(), PackCounts()
    examples = read_examples(paths, config.data, tokenizer, read)
    rows = list(pack(examples, shape, window=config.data.pack_window, counts=packed))
    if not rows:
        raise UserError(f"{', '.join(paths)}: no rows to train on")
    return _Data(PackedRows(rows, shape), packed, read)


def num_steps(config: Config, packed: PackCounts) -> int:
    """Optimiser steps of the stage; tokens and pairs are counted as the rows hold them."""
    train = config.train
    per_row = {
        "epochs": 1 / packed.rows,
        "tokens": packed.tokens / packed.rows,
        "pairs": packed.pairs / packed.rows,
    }
    if train.length_unit == "steps":
        return max(round(train.length), 1)
    if not per_row[train.length_unit]:
        raise UserError(f"config.train.length_unit={train.length_unit!r}: the data has none")
    return max(math.ceil(train.length / (per_row[train.length_unit] * train.batch_rows)), 1)


def run_stage(config: Config, workdir: str | Path, *, quiet: bool = False) -> StageResult:
    """Trains to the end, from the newest checkpoint in ``workdir`` if there is one.

    Raises:
      UserError: the config, the data or the checkpoint cannot be used, or training diverged.
    """
    validate(config)
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh), CheckpointStore(workdir, config.checkpoint) as store:
        return _Stage(config, Path(workdir), mesh, store, quiet).run()


class _Stage:
    """One run's parts, built in order; :meth:`run` is the loop."""

    def __init__(
        self, config: Config, workdir: Path, mesh: Mesh, store: CheckpointStore, quiet: bool
    ):
        self.mesh, self.store, self.workdir = mesh, store, workdir
        latest = store.latest()
        if latest is None:
            model, self.config, self.tokenizer, self.hf_info = _start(config, mesh)
        else:
            info = store.info(latest)
            self.config = _resumed(config, info.config)
            self.tokenizer, self.hf_info = store.tokenizer(latest), info.hf_info
            model = abstract_decoder(self.config.model, self.config.compute, mesh)
        c = self.config
        self.progress_enabled = False if quiet else None
        check_divides(mesh, c.model, c.train.batch_rows // c.train.accumulate)
        self.data = _prepare(c, c.data.train, self.tokenizer)
        self.validation = (
            _prepare(c, c.data.validation, self.tokenizer) if c.data.validation else None
        )
        self.order = RowOrder(len(self.data.rows), c.seed)
        self.steps = num_steps(c, self.data.packed)
        self.tx = make_optimizer(c.optimizer, self.steps)
        graph, trainable, frozen = split_model(model, c.train.last_blocks)
        if latest is None:
            self.state = init_state(self.tx, trainable, frozen)
        else:
            step = jax.ShapeDtypeStruct((), np.int32)
            opt_state = jax.eval_shape(self.tx.init, trainable)
            step, opt_state = jax.tree.map(lambda x: _on_devices(x, mesh), (step, opt_state))
            wanted = TrainState(step, trainable, frozen, opt_state)
            self.state = store.restore(latest, wanted)
        self.train_step = make_train_step(graph, self.tx, c.objective, c.data.row_sequences)
        self.eval_step = make_eval_step(graph, c.objective, c.data.row_sequences)
        self.start = latest or 0
        self.last: dict[str, float] = {}
        self.last_validation: dict[str, float] = {}
        peak = peak_flops(jax.devices()[0].device_kind)
        self.peak = peak * jax.device_count() if peak else None
        self.flops_per_token = 3 * c.model.flops_per_token(
            round(self.data.rows.context()), targets_per_token=self.data.rows.targets_per_token()
        )

    def run(self) -> StageResult:
        c, began = self.config, time.perf_counter()
        every, validate_every = c.checkpoint.every, c.train.validate_every
        with (
            MetricsLog(self.workdir, resume_step=self.start or -1) as self.log,
            Progress(
                self.steps,
                initial=self.start,
                log_every=c.train.log_every,
                description=c.objective.name,
                enabled=self.progress_enabled,
            ) as self.progress,
        ):
            self._announce()
            self.clock = time.perf_counter()
            pending: tuple[int, np.ndarray, Metrics] | None = None
            for step in range(self.start + 1, self.steps + 1):
                position = (step - 1) * c.train.batch_rows
                numbers = self.order.numbers(position, c.train.batch_rows)
                batch = device_batch(self.data.rows, numbers, c.train.accumulate, self.mesh)
                self.state, metrics = self.train_step(self.state, batch)
                if pending:
                    self._report(*pending)
                pending = (step, numbers, metrics)
                last = step == self.steps
                validate_now = last or (validate_every and step % validate_every == 0)
                save_now = last or step % every == 0
                if validate_now or save_now:
                    # Nothing is saved before this step's own numbers are known to be finite.
                    self._report(*pending)
                    pending = None
                    validated = bool(validate_now and self._validate(step))
                    if save_now:
                        self._save(step, validated)
                    self.clock = time.perf_counter()
        return StageResult(self.steps, self.last, self.last_validation, time.perf_counter() - began)

    def _announce(self) -> None:
        """What is about to run, in a few lines."""
        packed, read = self.data.packed, self.data.read
        write = self.progress.write
        write(
            f"model {self.config.model.family}, {self.config.model.num_parameters():,} parameters,"
            f" mesh {dict(self.mesh.shape)}"
        )
        write(f"data  {read.text()}")
        write(
            f"rows  {packed.rows:,} of {self.config.data.row_length} tokens,"
            f" padding {packed.padding:.1%}, spilled {packed.spilled:,},"
            f" repeated tokens {packed.repeated_tokens:,}, pairs {packed.pairs:,}"
        )
        if self.start:
            write(f"resuming after step {self.start} of {self.steps}")

    def _report(self, step: int, numbers: np.ndarray, metrics: Metrics) -> None:
        """Waits for a step's numbers, checks and logs them.

        Raises:
          NotFinite: names the step and the rows.
        """
        values = {k: float(v) for k, v in jax.device_get(metrics).items()}
        now = time.perf_counter()
        seconds, self.clock = max(now - self.clock, 1e-9), now
        bad = [k for k in ("loss", "grad_norm") if not math.isfinite(values[k])]
        if bad:
            raise NotFinite(
                f"step {step}: {', '.join(f'{k} is {values[k]}' for k in bad)}; rows"
                f" {numbers.tolist()} of the packed data. Nothing was saved since step"
                f" {self.store.latest() or 0}. A lower learning rate or stronger clipping may help;"
                " the same command goes on from the last checkpoint"
            )
        self.last = values
        rate = values["tokens"] / seconds
        shown: dict[str, float | str] = {"loss": values["loss"]}
        if "accuracy" in values:
            shown |= {k: values[k] for k in ("accuracy", "margin", "pairs")}
            if self.config.objective.name == "smoothed_pairwise":
                # The floor is that of the ranking loss; chosen_ce comes on top of it.
                if self.config.objective.chosen_ce:
                    shown["ranking"] = values["ranking_loss"]
                shown["floor"] = smoothing_floor(self.config.objective.label_smoothing)
        shown["tokens/s"] = rate
        if self.peak:
            shown["mfu"] = rate * self.flops_per_token / self.peak
        self.log.write(step, {**values, "tokens_per_second": rate})
        self.progress.update(step, shown)

    def _validate(self, step: int) -> bool:
        """Mean metrics over the first validation rows; False where there are none."""
        if self.validation is None:
            return False
        c, rows = self.config, self.validation.rows
        count = min(len(rows), c.train.validation_rows)
        sums: Any = None
        for begin in range(0, count, c.train.batch_rows):
            numbers = np.arange(begin, begin + c.train.batch_rows)
            numbers = np.where(numbers < count, numbers, rows.padding)
            found = self.eval_step(
                self.state, device_batch(rows, numbers, c.train.accumulate, self.mesh)
            )
            sums = found if sums is None else jax.tree.map(lambda a, b: a + b, sums, found)
        denominator, metrics = jax.device_get(sums)
        self.last_validation = {k: float(v) for k, v in divide(metrics, denominator).items()}
        self.log.write(step, self.last_validation, split="validation")
        shown = {k: v for k, v in self.last_validation.items() if k not in COUNTS}
        text = "  ".join(f"{k} {v:.4f}" for k, v in shown.items())
        self.progress.write(f"validation at step {step}, {count} rows: {text}")
        return math.isfinite(self.last_validation["loss"])

    def _save(self, step: int, validated: bool) -> None:
        metrics = self.last_validation if validated else self.last
        info = RunInfo(
            config=self.config,
            position=step * self.config.train.batch_rows,
            metrics=metrics,
            hf_info=self.hf_info,
            versions=versions(),
        )
        self.store.save(step, self.state, info, self.tokenizer, validated)


def _on_devices(leaf: jax.ShapeDtypeStruct, mesh: Mesh) -> jax.ShapeDtypeStruct:
    """The same array with its devices: left open, it would be restored onto those it was saved on.

    So a run can go on with another mesh, or another number of devices.
    """
    spec = leaf.sharding.spec if isinstance(leaf.sharding, NamedSharding) else PartitionSpec()
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))


def _start(config: Config, mesh: Mesh) -> tuple[Decoder, Config, Tokenizer, dict[str, Any] | None]:
    """The model a new run starts from, and the config with that model's own shape."""
    if config.init_from:
        loaded = load_model(config.init_from, config.compute, mesh)
        tokenizer = Tokenizer.load(config.tokenizer) if config.tokenizer else loaded.tokenizer
        config = dataclasses.replace(config, model=loaded.model.config)
        model, hf_info = loaded.model, loaded.hf_info
    elif config.tokenizer:
        tokenizer, hf_info = Tokenizer.load(config.tokenizer), None
        model = init_decoder(config.model, config.compute, config.seed, mesh)
    else:
        raise UserError(
            "set config.tokenizer (a folder with tokenizer.json), or config.init_from (a checkpoint"
            " or a Hugging Face folder, which brings its own)"
        )
    if tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} ids, but config.model.vocab_size is"
            f" {config.model.vocab_size}; make it at least as large, or choose another tokenizer"
        )
    return model, config, tokenizer, hf_info


def _resumed(config: Config, old: Config) -> Config:
    """The config to go on with; settings that give the state its meaning must not have changed.

    Raises:
      UserError: lists each such change.
    """
    # The shape was taken from init_from when the run began, and is the checkpoint's ever since.
    config = dataclasses.replace(config, model=old.model)
    changed = differences(old, config)
    refused = [f"  {path}: {a!r} -> {b!r}" for path, a, b, policy in changed if policy == FIXED]
    if refused:
        raise UserError(
            "a resumed run cannot change these settings; put them back or choose another workdir:\n"
            + "\n".join(refused)
        )
    return config
