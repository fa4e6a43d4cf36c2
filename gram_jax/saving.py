"""The checkpoints of one run: saved in the background, kept as configured, restored on resuming.

One save runs at a time; one that falls while another runs waits for it. A save appears under its
step's name as a whole or not at all, and older checkpoints are deleted only once it is on the disk,
so a save that fails, or a kill at any moment, costs nothing that was there before.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from orbax.checkpoint import v1 as ocp

from gram_jax.appending import sync_folder
from gram_jax.checkpoints import (
    FOLDER,
    RUN_FILE,
    RunInfo,
    first_whole,
    load_state,
    quiet_orbax,
    read_run_info,
    reason,
    state_parts,
    step_folders,
    step_tokenizer,
    system_error,
)
from gram_jax.checksums import Leaf, describe, listed, write_manifest
from gram_jax.config import CheckpointConfig
from gram_jax.data.tokenizer import Tokenizer
from gram_jax.distributed import barrier, is_main, process_count, told_by_all
from gram_jax.errors import UserError
from gram_jax.reporting import warn
from gram_jax.training import TrainState

# STEP is the name of a checkpoint that is whole and on the disk. Before and after that:
_WRITING, _DELETING, _DAMAGED = ".writing", ".deleting", ".damaged"


class NotFinite(UserError):
    """A loss, a gradient or a weight is NaN or infinite; the state that has it is never saved."""


class SaveFailed(UserError):
    """A checkpoint could not be written; those before it are as they were."""


class CheckpointStore:
    """The checkpoints of one run. Use as a context manager: leaving it waits for the last save.

    With several processes, all of them must make the same calls.
    """

    def __init__(self, workdir: str | Path, config: CheckpointConfig):
        self.folder = Path(workdir).absolute() / FOLDER
        self._config = config
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="save")
        self._saving: tuple[int, Future[None]] | None = None
        self._failed: SaveFailed | None = None
        self._first = is_main()
        quiet_orbax()
        if self._first:
            self.folder.mkdir(parents=True, exist_ok=True)
        self._clean()
        barrier("checkpoints cleaned")

    def latest(self) -> int | None:
        """The newest step that is saved as a whole."""
        found = step_folders(self.folder)
        return int(found[0].name) if found else None

    def last_saved(self) -> int | None:
        """`latest` after the save that is running, for a message about what ends the run."""
        try:
            self.wait()
        except SaveFailed as failed:
            self._warn(str(failed))
        barrier("last save")
        return self.latest()

    def newest(self) -> tuple[int, RunInfo, Tokenizer] | None:
        """The newest step whose small files are whole, and what they say; None for a new run.

        Raises:
          UserError: there are checkpoints, and all are damaged.
        """
        folders = step_folders(self.folder)
        if not folders:
            damaged = sorted(self.folder.glob(f"*{_DAMAGED}*"))
            if damaged:
                raise UserError(
                    f"{self.folder}: there are only damaged checkpoints"
                    f" ({listed(p.name for p in damaged)}); choose another workdir to start over"
                )
            return None
        return first_whole(
            folders,
            lambda folder: (int(folder.name), read_run_info(folder), step_tokenizer(folder)),
            quiet=True,
        )

    def restore(self, abstract_state: TrainState) -> tuple[int, TrainState]:
        """The newest step that is not damaged, and its state, on the shardings given.

        Damaged checkpoints after it are moved aside, as the run will save those steps again.

        Raises:
          UserError: all are damaged, or they are of another model.
        """
        folders = step_folders(self.folder)
        step, state = first_whole(
            folders, lambda folder: (int(folder.name), load_state(folder, abstract_state))
        )
        if self._first:
            for folder in folders:
                if int(folder.name) > step:
                    _move_aside(folder)
        barrier("checkpoint restored")
        return step, state

    def save(self, step: int, state: TrainState, info: RunInfo, tokenizer: Tokenizer) -> None:
        """Starts a save; waits for one still running.

        Raises:
          NotFinite: the state is not finite; nothing is saved.
          SaveFailed: this save or the one before failed, and config.checkpoint.on_error is "stop".
        """
        self.wait()
        parts = state_parts(state)
        leaves, bad = describe(parts)
        if bad:
            raise NotFinite(
                f"step {step}: {listed(bad)} {'is' if len(bad) == 1 else 'are'} not finite."
                f" Nothing was saved since step {self.latest() or 0}. A lower learning rate or"
                " stronger clipping may help; the same command goes on from the last checkpoint"
            )
        if self._failed:
            self._clean()
        self._failed = None
        try:
            files = _small_files(info, tokenizer) if self._first else {}
            response = ocp.save_checkpointables_async(self._written(step), parts)
        except Exception as error:
            if system_error(error) is None:
                raise  # a defect
            self._go_on(self._fail(step, error))
            return
        self._saving = step, self._thread.submit(self._commit, step, response, leaves, files)

    def poll(self) -> None:
        """Says at once that a save failed, without waiting for one that still runs.

        Raises:
          SaveFailed: it did, and config.checkpoint.on_error is "stop".
        """
        # Several processes would notice at different steps.
        if self._saving and self._saving[1].done() and process_count() == 1:
            self.wait()

    def wait(self) -> None:
        """Waits for the save that is running.

        Raises:
          SaveFailed: it failed, and config.checkpoint.on_error is "stop".
        """
        if (failed := self._agreed(self._settled())) is not None:
            self._go_on(failed)

    def finish(self) -> None:
        """Waits for the last save of a run.

        Raises:
          SaveFailed: it failed, whatever config.checkpoint.on_error says.
        """
        failed = self._agreed(self._settled()) or self._failed
        if failed:
            raise failed

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self.wait()
            elif (failed := self._settled()) is not None:
                # What stopped the run is the other error, maybe in this process alone.
                self._warn(str(failed))
        finally:
            self._thread.shutdown()
            # Parts of a save that failed may have been written after it was known to have failed.
            self._clean()

    def _written(self, step: int) -> Path:
        """The folder of a save until it is whole."""
        return self.folder / f"{step}{_WRITING}"

    def _commit(
        self, step: int, response: Any, leaves: Mapping[str, Leaf], files: Mapping[str, bytes]
    ) -> None:
        """In the background: completes a save, gives it its name, deletes what it replaces.

        Raises:
          Exception: whatever the save failed of; nothing has the step's name.
        """
        response.result()  # all processes have written their parts
        if not self._first:
            return
        folder = self._written(step)
        (folder / "files").mkdir()
        for name, content in files.items():
            (folder / "files" / name).write_bytes(content)
        write_manifest(folder, leaves)
        _sync_tree(folder)
        folder.rename(self.folder / str(step))
        sync_folder(self.folder)
        try:
            self._delete_old()
        except OSError as error:
            self._warn(f"{self.folder}: old checkpoints could not be deleted: {error}")

    def _settled(self) -> SaveFailed | None:
        """Waits for the save that is running; how it failed, None if it did not."""
        if self._saving is None:
            return None
        step, future = self._saving
        try:
            future.result()
        except Exception as error:
            # Whatever a save died of: the run has a state that is not on the disk.
            self._fail(step, error)
            return self._failed
        finally:
            if future.done():
                self._saving = None
        return None

    def _agreed(self, mine: SaveFailed | None) -> SaveFailed | None:
        """How the save failed in the first process in which it did, told to all of them.

        Process 0 gives a save its name, so it may be the only one to see it fail; processes that
        disagree on that would wait for each other in vain.
        """
        told = told_by_all("" if mine is None else str(mine))
        first = next(filter(None, told), None)
        if mine is None and first is not None:
            self._failed = mine = SaveFailed(first)
        return mine

    def _fail(self, step: int, error: Exception) -> SaveFailed:
        self._clean()
        newest = self.latest()
        self._failed = SaveFailed(
            f"step {step}: the checkpoint could not be saved: {reason(error)}. Earlier checkpoints"
            f" in {self.folder} are whole, the newest is"
            f" {'none' if newest is None else f'step {newest}'}"
        )
        self._failed.__cause__ = error
        return self._failed

    def _go_on(self, failed: SaveFailed) -> None:
        """Raises or warns, as config.checkpoint.on_error says."""
        if self._config.on_error == "stop":
            raise failed
        self._warn(f"{failed}; going on, as config.checkpoint.on_error says")

    def _clean(self) -> None:
        """Removes what saves and deletions that did not come to their end have left."""
        if self._first:
            for left in self.folder.iterdir():
                if _WRITING in left.name or left.name.endswith(_DELETING):
                    shutil.rmtree(left, ignore_errors=True)

    def _warn(self, line: str) -> None:
        if self._first:
            warn(line)

    def _delete_old(self) -> None:
        """Deletes the checkpoints that nothing says to keep."""
        c, folders = self._config, step_folders(self.folder)
        kept = set(folders[: c.keep_last])
        if c.keep_every:
            kept |= {folder for folder in folders if int(folder.name) % c.keep_every == 0}
        if c.keep_best:
            losses = {f: loss for f in folders if (loss := _validation_loss(f)) is not None}
            kept |= set(sorted(losses, key=lambda f: losses[f])[:1])
        for folder in set(folders) - kept:
            # Renamed first: a kill meanwhile must not leave half a checkpoint under its name.
            gone = folder.with_name(folder.name + _DELETING)
            folder.rename(gone)
            shutil.rmtree(gone)


def _small_files(info: RunInfo, tokenizer: Tokenizer) -> dict[str, bytes]:
    """What lies beside the state, by file name."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        files = {p.name: p.read_bytes() for p in sorted(Path(folder).iterdir()) if p.is_file()}
    return {**files, RUN_FILE: json.dumps(info.to_json(), indent=2).encode()}


def _validation_loss(step_folder: Path) -> float | None:
    """None where there is none, or where it cannot be trusted."""
    try:
        info = read_run_info(step_folder)
    except UserError:
        return None
    return info.metrics["loss"] if info.validated else None


def _move_aside(folder: Path) -> None:
    number, target = 1, folder.with_name(folder.name + _DAMAGED)
    while target.exists():
        number += 1
        target = folder.with_name(f"{folder.name}{_DAMAGED}.{number}")
    folder.rename(target)


def _sync_tree(folder: Path) -> None:
    """Waits until all files of a folder are on the disk."""
    for root, _, files in os.walk(folder):
        for name in files:
            descriptor = os.open(Path(root, name), os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_folder(Path(root))
