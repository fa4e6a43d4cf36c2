"""Checkpoints: Orbax V1, written in the background, each step folder self-contained.

WORKDIR/checkpoints/STEP holds the training state, and beside it what is needed to use it without
the run it came from: config, tokenizer, position in the data, versions. So a step folder, or the
workdir (its latest step), is what every command takes as CHECKPOINT.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import platform
import shutil
import tempfile
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

from jax.sharding import Mesh
from orbax.checkpoint import v1 as ocp

from gram_jax import __version__, hf
from gram_jax.config import CheckpointConfig, ComputeConfig, Config, from_dict, to_dict
from gram_jax.data.tokenizer import Tokenizer
from gram_jax.errors import UserError
from gram_jax.models.decoder import Decoder, abstract_decoder
from gram_jax.training import TrainState, merge_model, split_model

FOLDER = "checkpoints"
RUN_FILE = "run.json"
_SAMPLE = 2**20  # bytes
_WHAT_IT_IS = (
    "A checkpoint is a workdir of pretrain or finetune, one of its"
    f" {FOLDER}/STEP folders, or a Hugging Face folder (config.json and safetensors)"
)


@dataclasses.dataclass
class RunInfo:
    """What a state means: stored in each checkpoint as run.json."""

    config: Config
    position: int  # rows consumed
    metrics: dict[str, float]
    hf_info: dict[str, Any] | None  # what an export must give back, see gram_jax.hf.HfInfo
    versions: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "config": to_dict(self.config)}


def versions() -> dict[str, str]:
    """Of what decides a run's numbers."""
    from importlib.metadata import version

    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    return {
        "gram_jax": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in names},
    }


class _Files:
    """A folder of small files stored inside a checkpoint (Orbax's StatefulCheckpointable)."""

    def __init__(self, source: Path):
        self.source = source

    async def save(self, directory: Any) -> Awaitable[None]:
        # The copy is taken now: the background save must not see later changes.
        files = {p.name: p.read_bytes() for p in sorted(self.source.iterdir()) if p.is_file()}

        async def write() -> None:
            target = Path(str(await directory.await_creation()))

            def copy() -> None:
                for name, content in files.items():
                    (target / name).write_bytes(content)

            await asyncio.to_thread(copy)

        return write()

    async def load(self, directory: Any) -> Awaitable[None]:
        async def read() -> None:
            shutil.copytree(str(directory), self.source, dirs_exist_ok=True)

        return read()


class CheckpointStore:
    """The checkpoints of one run. Use as a context manager: leaving it waits for the last save."""

    def __init__(self, workdir: str | Path, config: CheckpointConfig):
        policies = ocp.training.preservation_policies
        kept: list[Any] = [policies.LatestN(config.keep_last)]
        if config.keep_every:
            kept.append(policies.EveryNSteps(config.keep_every))
        if config.keep_best:
            best = policies.BestN(
                get_metric_fn=lambda metrics: metrics["loss"],
                reverse=True,
                n=1,
                keep_checkpoints_without_metrics=False,
            )
            kept.append(best)
        self.folder = Path(workdir).absolute() / FOLDER
        self._checkpointer = ocp.training.Checkpointer(
            self.folder,
            preservation_policy=policies.AnyPreservationPolicy(kept),
            cleanup_tmp_directories=True,
        )

    def latest(self) -> int | None:
        found = self._checkpointer.latest
        return None if found is None else int(found.step)

    def save(
        self, step: int, state: TrainState, info: RunInfo, tokenizer: Tokenizer, validated: bool
    ) -> None:
        """Starts a save of a state that is known to be finite; waits for one still running.

        ``validated`` says that ``info.metrics["loss"]`` is a validation loss to rank by.
        """
        # Orbax drops a save that falls while another runs, so that one is waited for first.
        self._checkpointer.wait()
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save(folder)
            text = json.dumps(info.to_json(), indent=2)
            (Path(folder) / RUN_FILE).write_text(text, encoding="utf-8")
            response = self._checkpointer.save_checkpointables_async(
                step,
                {**_parts(state), "files": _Files(Path(folder))},
                metrics={"loss": info.metrics["loss"]} if validated else None,
            )
        if response is None:
            raise RuntimeError(f"{self.folder}: the checkpoint of step {step} was not accepted")

    def info(self, step: int) -> RunInfo:
        return read_run_info(self.folder / str(step))

    def tokenizer(self, step: int) -> Tokenizer:
        return Tokenizer.load(self.folder / str(step) / "files")

    def restore(self, step: int, abstract_state: TrainState) -> TrainState:
        """The state of a step, on the shardings of ``abstract_state``."""
        loaded = ocp.load_checkpointables(self.folder / str(step), _parts(abstract_state))
        return TrainState(**loaded["weights"], **loaded["optimizer"])

    def close(self) -> None:
        self._checkpointer.close()

    def __enter__(self) -> CheckpointStore:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def find_step_folder(path: str | Path) -> Path:
    """The step folder that a CHECKPOINT of ours means: itself, or the latest of a workdir.

    Raises:
      UserError: there is none.
    """
    path = Path(path)
    if (path / "files" / RUN_FILE).is_file():
        return path
    for folder in (path / FOLDER, path):
        if folder.is_dir():
            steps = [p for p in folder.iterdir() if p.name.isdigit() and (p / "files").is_dir()]
            if steps:
                return max(steps, key=lambda p: int(p.name))
    raise UserError(f"{path}: no checkpoint here. {_WHAT_IT_IS}")


def read_run_info(step_folder: Path) -> RunInfo:
    """What the state in this folder means.

    Raises:
      UserError: run.json is missing or cannot be used.
    """
    path = step_folder / "files" / RUN_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        config = from_dict(Config, values.pop("config"), f"{path}: config")
        return RunInfo(config=config, **values)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a description of a checkpoint: {error}") from error


@dataclasses.dataclass
class LoadedModel:
    """A model ready to score or to train on, whatever folder it came from."""

    model: Decoder
    tokenizer: Tokenizer
    fingerprint: str  # of the folder's content, see fingerprint()
    hf_info: dict[str, Any] | None
    config: Config | None  # of the run that made it; None for a Hugging Face folder


def load_model(path: str | Path, compute: ComputeConfig, mesh: Mesh | None = None) -> LoadedModel:
    """Loads a CHECKPOINT: a workdir, a step folder, or a Hugging Face folder.

    Raises:
      UserError: there is no checkpoint, or it cannot be used.
    """
    if not Path(path).is_dir():
        raise UserError(f"{path}: there is no such folder. {_WHAT_IT_IS}")
    if hf.is_hf_folder(path):
        model, info = hf.load(path, compute, mesh)
        tokenizer = Tokenizer.load(path)
        return LoadedModel(model, tokenizer, fingerprint(path), dataclasses.asdict(info), None)
    folder = find_step_folder(path)
    run = read_run_info(folder)
    target = abstract_decoder(run.config.model, compute, mesh)
    graph, *wanted = split_model(target, run.config.train.last_blocks)
    stored = ocp.load_checkpointables(
        folder.absolute(), {"weights": dict(zip(("trainable", "frozen"), wanted, strict=True))}
    )["weights"]
    model = merge_model(graph, stored["trainable"], stored["frozen"]).joined_stacks()
    tokenizer = Tokenizer.load(folder / "files")
    return LoadedModel(model, tokenizer, fingerprint(folder), run.hf_info, run.config)


def reward_average(path: str | Path) -> str:
    """Whether the model's reward is a sum of log-probs or their mean: as it was fine-tuned.

    ``sum`` where nothing says so (a pretrained model, a folder made by others).
    """
    if hf.is_hf_folder(path):
        described = Path(path) / "gram_config.json"
        values = json.loads(described.read_text("utf-8")) if described.is_file() else {}
        return str(values.get("average", "sum"))
    objective = read_run_info(find_step_folder(path)).config.objective
    return "sum" if objective.name == "next_token" else objective.average


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


def _parts(state: TrainState) -> dict[str, Any]:
    """A state as Orbax stores it: what scoring reads apart from what only training needs."""
    return {
        "weights": {"trainable": state.trainable, "frozen": state.frozen},
        "optimizer": {"step": state.step, "opt_state": state.opt_state},
    }
