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

from gram_jax import watchdog
from gram_jax.checkpoints import RunInfo, load_model, load_tokenizer
from gram_jax.config import FIXED, READINGS, Config
from gram_jax.config_rules import differences, to_dict, validate
from gram_jax.data.judge import label_ids
from gram_jax.data.loader import device_batch
from gram_jax.data.stage import data_folder, num_steps, stage_data
from gram_jax.data.tokenizer import Tokenizer
from gram_jax.distributed import is_main
from gram_jax.errors import UserError
from gram_jax.mesh import check_divides, make_mesh, no_surprises
from gram_jax.models.adapters import adapters_of, attach
from gram_jax.models.decoder import Decoder, abstract_decoder, init_decoder
from gram_jax.objectives import Metrics, smoothing_floor
from gram_jax.readouts import Readout
from gram_jax.reporting import Log, Logs, MetricsLog, Progress
from gram_jax.saving import CheckpointStore, NotFinite
from gram_jax.signals import Preempted, StopRequest
from gram_jax.storage import local_folder
from gram_jax.training import (
    COUNTS,
    TrainState,
    divide,
    flops_per_token,
    init_state,
    make_eval_step,
    make_optimizer,
    make_train_step,
    peak_flops,
    split_model,
    trainable_names,
)
from gram_jax.versions import versions
from gram_jax.wandb_log import WandbLog, check_wandb
from gram_jax.watchdog import watched


@dataclasses.dataclass(frozen=True)
class StageResult:
    """What a stage ended with."""

    steps: int
    metrics: dict[str, float]  # of the last step
    validation: dict[str, float]  # empty where there is no validation data
    seconds: float


def run_stage(config: Config, workdir: str | Path, *, quiet: bool = False) -> StageResult:
    """Trains to the end, from the newest checkpoint in ``workdir`` if there is one.

    Raises:
      UserError: the config, the data or a checkpoint cannot be used, training diverged, or its end
        could not be saved.
      Preempted: SIGTERM came; before the loop, or after a step whose checkpoint is saved.
    """
    validate(config)
    if config.train.wandb_project:
        check_wandb()
    workdir = local_folder(workdir, "--workdir")
    with StopRequest() as stop:
        mesh = make_mesh(config.mesh)
        with jax.set_mesh(mesh), CheckpointStore(workdir, config.checkpoint) as store:
            return _Stage(config, workdir, mesh, store, stop, quiet).run()


class _Stage:
    """One run's parts, built in order; `run` is the loop."""

    def __init__(
        self,
        config: Config,
        workdir: Path,
        mesh: Mesh,
        store: CheckpointStore,
        stop: StopRequest,
        quiet: bool,
    ):
        self.mesh, self.store, self.stop, self.workdir = mesh, store, stop, workdir
        self.progress_enabled = None if is_main() and not quiet else False
        self.changes: list[str] = []
        newest = store.newest()
        if newest is None:
            self.config, self.tokenizer = config, stage_tokenizer(config)
            begun: list[str] = []
        else:
            _, info, self.tokenizer = newest
            self.config, self.changes = _resumed(config, info.config)
            begun = info.data.get("train", [])
        # Before the weights, as this may take long. What a run has begun to train on is never
        # replaced; what it is validated on may be. A folder that is named may be others' as well.
        own = not config.data.prepared
        self.data = stage_data(
            self.config,
            self.tokenizer,
            data_folder(config, workdir),
            replace=own and newest is None,
            replace_validation=own,
            quiet=quiet,
        )
        if newest is None:
            model, self.config, self.hf_info = _start(self.config, self.tokenizer, mesh)
        else:
            self.data.check_begun_with(begun)
            self.hf_info = info.hf_info
            model = abstract_decoder(self.config.model, self.config.compute, mesh)
        c = self.config
        rows = c.train.batch_rows // c.train.accumulate
        check_divides(mesh, c.model, rows, c.data.row_length)
        self.steps = num_steps(c.train, self.data.per_row(c.data.weights))
        self.tx = make_optimizer(c.optimizer, self.steps)
        model = attach(model, adapters_of(c), c.seed)
        graph, trainable, frozen = split_model(model, c.train)
        if newest is None:
            self.start, self.state = 0, init_state(self.tx, trainable, frozen)
        else:
            step = jax.ShapeDtypeStruct((), np.int32)
            opt_state = jax.eval_shape(self.tx.init, trainable)
            step, opt_state = jax.tree.map(lambda x: _on_devices(x, mesh), (step, opt_state))
            wanted = TrainState(step, trainable, frozen, opt_state)
            self.start, self.state = store.restore(wanted)
        readout = self._readout()
        self.train_step = make_train_step(graph, self.tx, c.objective, readout)
        self.eval_step = make_eval_step(graph, c.objective, readout)
        self.last: dict[str, float] = {}
        self.last_validation: dict[str, float] = {}
        peak = peak_flops(jax.devices()[0].device_kind)
        self.peak = peak * jax.device_count() if peak else None
        self.flops_per_token = flops_per_token(
            c.model,
            c.train,
            round(self.data.train.context()),
            self.data.train.targets_per_token(c.data.weights),
        )

    def _readout(self) -> Readout | None:
        """How sequences are scored; fills in what a checkpoint says of its judge."""
        reading, template = self.data.layout.reading, self.data.layout.template
        self.judge: dict[str, Any] | None = None
        labels = None
        if template is not None:
            # Stage 1 may be on pairs of responses; its labels are of no use yet.
            labels = label_ids(template, self.tokenizer) if reading == "judge" else None
            self.judge = {"template": template.to_dict(), "labels": labels}
        return None if reading == "text" else Readout(reading, self.data.sequences, labels)

    def run(self) -> StageResult:
        c, began = self.config, time.perf_counter()
        every, validate_every = c.checkpoint.every, c.train.validate_every
        logs = self._open_logs()
        self.stop.wait_for_steps()
        with (
            logs as self.log,
            watched(c.train.stall_seconds, "training"),
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
                numbers = self.data.order.numbers(position, c.train.batch_rows)
                last = step == self.steps
                with no_surprises():
                    batch = device_batch(self.data.train, numbers, c.train.accumulate, self.mesh)
                    self.state, metrics = self.train_step(self.state, batch)
                    if pending:
                        self._report(*pending)
                    stop = self.stop.at_step(self.mesh) and not last
                pending = (step, numbers, metrics)
                validate_now = last or (validate_every and step % validate_every == 0)
                save_now = last or stop or step % every == 0
                if validate_now or save_now:
                    # Nothing is saved before this step's own numbers are known to be finite.
                    self._report(*pending)
                    pending = None
                    validated = bool(validate_now and self._validate(step))
                    if save_now:
                        self._save(step, validated)
                    if stop:
                        self._stop(step)
                    self.clock = time.perf_counter()
                self.store.poll()
            self.store.finish()
        return StageResult(self.steps, self.last, self.last_validation, time.perf_counter() - began)

    def _open_logs(self) -> Logs:
        c, start, logs = self.config, self.start or -1, list[Log]()
        if is_main():
            on_error = c.checkpoint.on_error
            logs.append(MetricsLog(self.workdir, resume_step=start, on_error=on_error))
            if project := c.train.wandb_project:
                logs.append(WandbLog(self.workdir, project, to_dict(c), resume_step=start))
        return Logs(logs)

    def _announce(self) -> None:
        """What is about to run, in a few lines."""
        write = self.progress.write
        write(
            f"model {self.config.model.family}, {self.config.model.num_parameters():,} parameters,"
            f" mesh {dict(self.mesh.shape)}"
        )
        if jax.tree.leaves(self.state.frozen):
            trained = self.state.trainable
            count = sum(leaf.size for leaf in jax.tree.leaves(trained))
            write(f"trained: {count:,} parameters ({', '.join(trainable_names(trained))})")
        for line in self.data.text():
            write(line)
        if self.start:
            write(f"resuming after step {self.start} of {self.steps}")
        for change in self.changes:
            write(f"changed: {change}")

    def _report(self, step: int, numbers: np.ndarray, metrics: Metrics) -> None:
        """Waits for a step's numbers, checks and logs them.

        Raises:
          NotFinite: names the step and the rows.
        """
        values = self._numbers(metrics)
        watchdog.progress()
        now = time.perf_counter()
        seconds, self.clock = max(now - self.clock, 1e-9), now
        bad = [k for k in ("loss", "grad_norm") if not math.isfinite(values[k])]
        if bad:
            raise NotFinite(
                f"step {step}: {', '.join(f'{k} is {values[k]}' for k in bad)}; rows"
                f" {numbers.tolist()} of the packed data. Nothing was saved since step"
                f" {self.store.last_saved() or 0}. A lower learning rate or stronger clipping may"
                " help; the same command goes on from the last checkpoint"
            )
        self.last = values
        rate = values["tokens"] / seconds
        shown: dict[str, float | str] = {"loss": values["loss"]}
        if "accuracy" in values:
            shown |= {k: values[k] for k in ("accuracy", "margin", "pairs")}
            if self.config.objective.name != "smoothed_ce":
                # The floor is that of the ranking loss; other terms come on top of it.
                if values["loss"] != values["ranking_loss"]:
                    shown["ranking"] = values["ranking_loss"]
                shown["floor"] = smoothing_floor(self.config.objective.label_smoothing)
        shown["tokens/s"] = rate
        if self.peak:
            shown["mfu"] = rate * self.flops_per_token / self.peak
        self.log.write(step, {**values, "tokens_per_second": rate})
        self.progress.update(step, shown)

    def _validate(self, step: int) -> bool:
        """Mean metrics over validation rows; False where there are none, or the loss is no number.

        The rows are spread over all of them: packing puts long examples first, and sources lie end
        to end, so the first rows would be the longest examples of the first source.
        """
        if self.data.validation is None:
            return False
        c, rows = self.config, self.data.validation
        count = min(len(rows), c.train.validation_rows)
        spread = np.arange(count) * len(rows) // max(count, 1)
        sums: Any = None
        for begin in range(0, count, c.train.batch_rows):
            numbers = np.full(c.train.batch_rows, rows.padding)
            part = spread[begin : begin + c.train.batch_rows]
            numbers[: len(part)] = part
            found = self.eval_step(
                self.state, device_batch(rows, numbers, c.train.accumulate, self.mesh)
            )
            sums = found if sums is None else jax.tree.map(lambda a, b: a + b, sums, found)
            watchdog.progress()
        denominator, metrics = jax.device_get(sums)
        self.last_validation = self._numbers(divide(metrics, denominator))
        self.log.write(step, self.last_validation, split="validation")
        shown = {k: v for k, v in self.last_validation.items() if k not in COUNTS}
        text = "  ".join(f"{k} {v:.4f}" for k, v in shown.items())
        self.progress.write(f"validation at step {step}, {count} rows: {text}")
        return math.isfinite(self.last_validation["loss"])

    def _numbers(self, metrics: Metrics) -> dict[str, float]:
        """Metrics as plain numbers; a pair that a judge sees in both orders counts once."""
        values = {k: float(v) for k, v in jax.device_get(metrics).items()}
        if "pairs" in values:
            # The step counts comparisons: each order of a pair, and they may lie in two steps.
            values["pairs"] /= self.data.layout.comparisons
        return values

    def _save(self, step: int, validated: bool) -> None:
        metrics = self.last_validation if validated else self.last
        info = RunInfo(
            config=self.config,
            position=step * self.config.train.batch_rows,
            metrics=metrics,
            hf_info=self.hf_info,
            versions=versions(),
            validated=validated,
            data={"train": self.data.identity()},
            judge=self.judge,
        )
        # The steps up to here are not repeated, so what is known of them must not be lost.
        self.log.sync()
        self.store.save(step, self.state, info, self.tokenizer)
        watchdog.progress()

    def _stop(self, step: int) -> None:
        """Ends a run that was asked to stop, once its checkpoint is on the disk.

        Raises:
          Preempted: always.
        """
        saved = self.store.last_saved() or 0
        raise Preempted(
            f"stopped by SIGTERM after step {step} of {self.steps}; the same command goes on after"
            f" step {saved}"
        )


def _on_devices(leaf: jax.ShapeDtypeStruct, mesh: Mesh) -> jax.ShapeDtypeStruct:
    """The same array with its devices: left open, it would be restored onto those it was saved on.

    So a run can go on with another mesh, or another number of devices.
    """
    spec = leaf.sharding.spec if isinstance(leaf.sharding, NamedSharding) else PartitionSpec()
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))


def stage_tokenizer(config: Config) -> Tokenizer:
    """The tokenizer of a new run.

    Raises:
      UserError: the config names none, or it cannot be used.
    """
    if config.tokenizer:
        return Tokenizer.load(config.tokenizer)
    if config.init_from:
        return load_tokenizer(config.init_from)
    raise UserError(
        "set config.tokenizer (a folder with tokenizer.json), or config.init_from (a checkpoint"
        " or a Hugging Face folder, which brings its own)"
    )


def _start(
    config: Config, tokenizer: Tokenizer, mesh: Mesh
) -> tuple[Decoder, Config, dict[str, Any] | None]:
    """The model a new run starts from, and the config with that model's own shape."""
    if not config.init_from:
        _check_vocabulary(tokenizer, config)
        return init_decoder(config.model, config.compute, config.seed, mesh), config, None
    loaded = load_model(config.init_from, config.compute, mesh)
    if READINGS[config.objective.name] != "head" or config.objective.chosen_ce:
        loaded.model.unembedding_vd()  # a classifier says that it has none
    config = dataclasses.replace(config, model=loaded.model.config)
    _check_vocabulary(tokenizer, config)
    return loaded.model, config, loaded.hf_info


def _check_vocabulary(tokenizer: Tokenizer, config: Config) -> None:
    if tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} ids, but config.model.vocab_size is"
            f" {config.model.vocab_size}; make it at least as large, or choose another tokenizer"
        )


def _resumed(config: Config, old: Config) -> tuple[Config, list[str]]:
    """The config to go on with, and how it differs from that of the checkpoint, a line a setting.

    Settings that give the state its meaning must not have changed.

    Raises:
      UserError: lists each such change.
    """
    # The shape was taken from init_from when the run began, and is the checkpoint's ever since.
    config = dataclasses.replace(config, model=old.model)
    changed = differences(old, config)
    lines = {f"{path}: {a!r} -> {b!r}": policy for path, a, b, policy in changed}
    refused = [f"  {line}" for line, policy in lines.items() if policy == FIXED]
    if refused:
        raise UserError(
            "a resumed run cannot change these settings; put them back or choose another workdir:\n"
            + "\n".join(refused)
        )
    return config, list(lines)
