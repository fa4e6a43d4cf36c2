"""Checkpoints: Orbax V1, written in the background, each step folder self-contained and checked.

WORKDIR/checkpoints/STEP holds the training state, and beside it what is needed to use it without
the run it came from: config, tokenizer, position in the data, versions, checksums. So a step
folder, or the workdir (its newest step), is what every command takes as CHECKPOINT. Whatever is
loaded is compared with its checksums first; where a workdir was named and its newest checkpoint is
damaged, the one before it is used. How a run writes them is in gram_jax/saving.py.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
from jax.sharding import Mesh

from gram_jax import hf
from gram_jax.checksums import (
    DAMAGE_ERRNOS,
    Damaged,
    Leaf,
    changed,
    describe,
    leaf_name,
    listed,
    named_leaves,
    verify_files,
)
from gram_jax.config import ComputeConfig, Config
from gram_jax.config_rules import from_dict, to_dict
from gram_jax.data.tokenizer import Tokenizer
from gram_jax.distributed import is_main
from gram_jax.errors import UserError
from gram_jax.models.adapters import adapters_of, attach, merged
from gram_jax.models.decoder import Decoder, abstract_decoder
from gram_jax.reporting import warn
from gram_jax.training import TrainState, merge_model, split_model

FOLDER = "checkpoints"
RUN_FILE = "run.json"
_SAMPLE = 2**20  # bytes
_WHAT_IT_IS = (
    "A checkpoint is a workdir of pretrain or finetune, one of its"
    f" {FOLDER}/STEP folders, or a Hugging Face folder (config.json and safetensors)"
)
T = TypeVar("T")


@dataclasses.dataclass
class RunInfo:
    """What a state means: stored in each checkpoint as run.json."""

    config: Config
    position: int  # rows consumed
    metrics: dict[str, float]
    hf_info: dict[str, Any] | None  # what an export must give back, see gram_jax.hf.HfInfo
    versions: dict[str, str]
    validated: bool = False  # whether metrics["loss"] is a validation loss, to rank by
    data: dict[str, Any] = dataclasses.field(default_factory=dict)  # which rows it was trained on
    judge: dict[str, Any] | None = None  # {"template": ..., "labels": [id, id]} of a judge

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "config": to_dict(self.config)}


def step_folders(folder: Path) -> list[Path]:
    """The checkpoints in a folder, newest first."""
    if not folder.is_dir():
        return []
    found = [p for p in folder.iterdir() if p.name.isdigit() and p.is_dir()]
    return sorted(found, key=lambda p: int(p.name), reverse=True)


def find_step_folder(path: str | Path) -> Path:
    """The step folder that a CHECKPOINT of ours means: itself, or the newest of a workdir.

    Raises:
      UserError: there is none.
    """
    return candidates(path)[0]


def candidates(path: str | Path) -> list[Path]:
    """The step folders that a CHECKPOINT may mean, best first; one if it is a step folder.

    Raises:
      UserError: there is none.
    """
    path = Path(path)
    found = step_folders(path / FOLDER) or step_folders(path)
    # A step folder that lost some of its parts is still one, and must be called damaged.
    if not found and any((path / part).is_dir() for part in ("files", "weights", "optimizer")):
        found = [path]
    if not found:
        raise UserError(f"{path}: no checkpoint here. {_WHAT_IT_IS}")
    return found


def first_whole(folders: Sequence[Path], load: Callable[[Path], T], *, quiet: bool = False) -> T:
    """``load`` of the first folder that it does not find damaged, with a warning for each it does.

    Raises:
      UserError: all are damaged.
    """
    damaged: list[Damaged] = []
    for folder in folders:
        try:
            found = load(folder)
        except Damaged as error:
            damaged.append(error)
            continue
        if not quiet and is_main():
            for one in damaged:
                warn(f"{one}. {folder} is used instead")
        return found
    if len(damaged) == 1:
        raise damaged[0]
    raise UserError("no checkpoint is left:\n" + "\n".join(f"  {error}" for error in damaged))


def read_run_info(step_folder: Path) -> RunInfo:
    """What the state in this folder means.

    Raises:
      Damaged: a file beside the state is missing or has changed.
      UserError: run.json cannot be used by this version.
    """
    verify_files(step_folder)
    path = step_folder / "files" / RUN_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        config = from_dict(Config, values.pop("config"), f"{path}: config")
        return RunInfo(config=config, **values)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a description of a checkpoint: {error}") from error


def state_parts(state: TrainState) -> dict[str, Any]:
    """A state as Orbax stores it: what scoring reads apart from what only training needs."""
    return {
        "weights": {"trainable": state.trainable, "frozen": state.frozen},
        "optimizer": {"step": state.step, "opt_state": state.opt_state},
    }


def load_state(step_folder: Path, abstract_state: TrainState) -> TrainState:
    """The state of a step on the shardings of ``abstract_state``, in its dtypes.

    Raises:
      Damaged: something is missing or is not what was saved.
      UserError: the checkpoint holds other arrays than ``abstract_state``, or may not be read.
    """
    wanted = state_parts(abstract_state)
    loaded = _load_arrays(step_folder, wanted)
    loaded = jax.tree.map(lambda x, target: x.astype(target.dtype), loaded, wanted)
    return TrainState(**loaded["weights"], **loaded["optimizer"])


def _load_arrays(step_folder: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """Arrays in the dtypes they were saved in, on the shardings of ``wanted``, checked."""
    # Takes a while to import, and Hugging Face folders are read without it.
    from orbax.checkpoint import v1 as ocp

    quiet_orbax()
    leaves = verify_files(step_folder)
    _check_same_arrays(step_folder, leaves, wanted)
    target = jax.tree_util.tree_map_with_path(
        lambda path, x: jax.ShapeDtypeStruct(
            x.shape, leaves[leaf_name(path)].dtype, sharding=x.sharding
        ),
        wanted,
    )
    try:
        loaded = ocp.load_checkpointables(step_folder.absolute(), target)
    except Exception as error:
        # Readers fail on bad bytes in too many ways to list. That this model's arrays are what the
        # folder must hold is known by now, so what remains is damage, or the machine's own trouble.
        if isinstance(_root(error), (MemoryError, jax.errors.JaxRuntimeError)):
            raise
        number = system_error(error)
        if number is not None and number not in DAMAGE_ERRNOS:
            raise UserError(f"{step_folder}: cannot be read: {reason(error)}") from error
        raise Damaged(step_folder, f"its arrays cannot be read: {reason(error)}") from error
    wrong = changed(leaves, describe(loaded)[0])
    if wrong:
        raise Damaged(step_folder, f"the numbers in {listed(wrong)} are not what was saved")
    return dict(loaded)


def _check_same_arrays(step_folder: Path, leaves: dict[str, Leaf], wanted: dict[str, Any]) -> None:
    """The folder's description and the model's must agree, before anything is called damaged.

    Raises:
      UserError: names arrays in which they differ.
    """
    expected = {name: tuple(x.shape) for name, x in named_leaves(wanted).items()}
    stored = {n: leaf.shape for n, leaf in leaves.items() if n.partition("/")[0] in wanted}
    different = [n for n in {**expected, **stored} if expected.get(n) != stored.get(n)]
    if different:
        raise UserError(
            f"{step_folder}: holds other arrays than the model or the optimiser has:"
            f" {listed(f'{n} {stored.get(n)} for {expected.get(n)}' for n in different)}"
        )


@functools.cache
def quiet_orbax() -> None:
    """From now on a read or a write that fails is one error, without pages about its threads.

    The error itself reaches the caller in any case; threads that nobody waits for any more report
    it again, some of them later.
    """

    def is_news(record: logging.LogRecord) -> bool:
        return "run() raised an exception" not in record.getMessage()

    def is_ours(record: logging.LogRecord) -> bool:
        return "was never retrieved" not in record.getMessage() or not _through_orbax(record)

    logging.getLogger("absl").addFilter(is_news)
    # Where two parts of a save fail at once, the second error is one that nobody asks for.
    logging.getLogger("asyncio").addFilter(is_ours)
    # What a failed write had still to do is dropped unfinished, and Python would warn of that.
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    before = sys.unraisablehook

    def hook(unraisable: sys.UnraisableHookArgs) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    sys.unraisablehook = hook


def _through_orbax(record: logging.LogRecord) -> bool:
    trace = record.exc_info[2] if record.exc_info else None
    return any(
        "orbax" in Path(frame.f_code.co_filename).parts for frame, _ in traceback.walk_tb(trace)
    )


def reason(error: BaseException) -> str:
    """The first line of what an error began with, without TensorStore's additions."""
    root = _root(error)
    return (str(root).split(" [tensorstore_spec")[0].strip() or type(root).__name__).splitlines()[0]


def _root(error: BaseException) -> BaseException:
    while error.__cause__:
        error = error.__cause__
    return error


def system_error(error: BaseException) -> int | None:
    """The system's number of what an error began with; None where it has none."""
    root = _root(error)
    if isinstance(root, OSError):
        return root.errno
    # TensorStore's errors are ValueErrors that hold the number in their text.
    match = re.search(r"os_error_code='(\d+)'", str(root))
    return int(match.group(1)) if match else None


@dataclasses.dataclass
class LoadedModel:
    """A model ready to score or to train on, whatever folder it came from."""

    model: Decoder
    tokenizer: Tokenizer
    fingerprint: str  # of the folder's content, see fingerprint()
    hf_info: dict[str, Any] | None
    config: Config | None  # of the run that made it; None for a Hugging Face folder
    judge: dict[str, Any] | None = None  # as in RunInfo


def load_model(
    path: str | Path,
    compute: ComputeConfig,
    mesh: Mesh | None = None,
    dtype: str | None = None,
    *,
    merge: bool = True,
) -> LoadedModel:
    """Loads a CHECKPOINT: a workdir, a step folder, or a Hugging Face folder.

    Of a workdir, the newest checkpoint that is not damaged; nothing is changed on disk.

    Args:
      path: the CHECKPOINT.
      compute: how the model computes.
      mesh: where the weights go; None = the first device.
      dtype: what the weights are cast to; None = as stored (a Hugging Face folder's: float32).
      merge: whether LoRA's matrices go into the weights that they were trained beside.

    Raises:
      UserError: there is no checkpoint, or it cannot be used (Damaged: as it is damaged).
    """
    if not Path(path).is_dir():
        raise UserError(f"{path}: there is no such folder. {_WHAT_IT_IS}")
    if hf.is_hf_folder(path):
        model, info = hf.load(path, compute, mesh)
        loaded = LoadedModel(
            model, Tokenizer.load(path), fingerprint(path), dataclasses.asdict(info), None
        )
    else:
        loaded = first_whole(candidates(path), lambda folder: _load_step(folder, compute, mesh))
        if merge:
            loaded.model = merged(loaded.model)
    if dtype is not None:
        loaded.model = jax.tree.map(lambda x: x.astype(dtype), loaded.model)
    return loaded


def _load_step(folder: Path, compute: ComputeConfig, mesh: Mesh | None) -> LoadedModel:
    run = read_run_info(folder)
    target = abstract_decoder(run.config.model, compute, mesh)
    target = attach(target, adapters_of(run.config), run.config.seed)
    graph, *wanted = split_model(target, run.config.train)
    weights = dict(zip(("trainable", "frozen"), wanted, strict=True))
    stored = _load_arrays(folder, {"weights": weights})["weights"]
    model = merge_model(graph, stored["trainable"], stored["frozen"]).joined_stacks()
    tokenizer = Tokenizer.load(folder / "files")
    return LoadedModel(model, tokenizer, fingerprint(folder), run.hf_info, run.config, run.judge)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a CHECKPOINT.

    Raises:
      UserError: there is no checkpoint, or it has none that can be used.
    """
    if hf.is_hf_folder(path):
        return Tokenizer.load(path)
    return first_whole(candidates(path), step_tokenizer, quiet=True)


def step_tokenizer(step_folder: Path) -> Tokenizer:
    """The tokenizer stored in a step folder.

    Raises:
      Damaged: a file of the folder is missing or has changed.
    """
    verify_files(step_folder)
    return Tokenizer.load(step_folder / "files")


def fingerprint(folder: str | Path) -> str:
    """SHA-256 over the names, sizes and samples (head, middle, end) of all files in a folder.

    Samples, so that a large model costs milliseconds: weights that differ, differ there too.
    """
    digest = hashlib.sha256()
    root = Path(folder)
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(root).as_posix()} {size}\n".encode())
        with path.open("rb") as file:
            for start in sorted({0, max(size // 2 - _SAMPLE // 2, 0), max(size - _SAMPLE, 0)}):
                file.seek(start)
                digest.update(file.read(_SAMPLE))
    return digest.hexdigest()
