"""Metrics to Weights & Biases as well, where `config.train.wandb_project` names a project.

Everything else about a run there (account, entity, name, offline mode) is set as wandb has it: by
`wandb login`, WANDB_ENTITY, WANDB_NAME, WANDB_MODE. docs/metrics.md says what arrives.
"""

from __future__ import annotations

import importlib.util
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from gram_jax.errors import UserError
from gram_jax.reporting import warn

RUN_ID_FILE = "wandb_run_id"
"""In the workdir: the id of its run at Weights & Biases, which a resumed run goes on with."""


def check_wandb() -> None:
    """Raises UserError if wandb is not installed: before data is prepared, which may take long."""
    if importlib.util.find_spec("wandb") is None:
        raise UserError(
            "config.train.wandb_project is set, but wandb is not installed: pip install -c"
            " constraints.txt -e '.[wandb]', or leave the setting out"
        )


class WandbLog:
    """Numbers by step, sent to a run of Weights & Biases as split/name, beside the field `step`.

    That field is the axis of every chart, and not wandb's own count of what it was sent: a run that
    goes on from a checkpoint repeats steps, which wandb would otherwise refuse.

    Once it has started, what goes wrong with it is a warning, and training goes on without it:
    metrics.jsonl has every line.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        project: str,
        config: Mapping[str, Any],
        *,
        resume_step: int,
    ) -> None:
        """Starts a run, or goes on with that of the workdir.

        Args:
          workdir: wandb's own files go to workdir/wandb.
          project: its name at Weights & Biases.
          config: the settings to show beside the run.
          resume_step: the step of the checkpoint the run goes on from; -1 starts a new run.

        Raises:
          UserError: wandb does not start, as there is no key or no network.
        """
        import wandb

        self._errors, self._failed = (wandb.Error, OSError), False
        folder = Path(workdir)
        folder.mkdir(parents=True, exist_ok=True)
        self.run_id = _run_id(folder / RUN_ID_FILE, new=resume_step < 0)
        try:
            # Offline the id alone says where the run belongs; wandb warns of more.
            resumes = resume_step >= 0 and wandb.setup().settings.mode != "offline"
            self._run = wandb.init(
                project=project,
                id=self.run_id,
                resume="allow" if resumes else None,
                name=os.environ.get("WANDB_NAME") or folder.resolve().name,
                dir=str(folder),
                config=dict(config),
            )
        except self._errors as error:
            raise UserError(
                f"config.train.wandb_project={project}: wandb does not start: {error}. Log in with"
                " `wandb login`, set WANDB_MODE=offline to send the run later, or leave the setting"
                " out"
            ) from error
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step", step_sync=False)

    def write(self, step: int, metrics: Mapping[str, float], *, split: str = "train") -> None:
        """Sends one line of numbers."""
        line = {f"{split}/{name}": float(value) for name, value in metrics.items()}
        self._attempt(lambda: self._run.log({"step": int(step), **line}), f"step {step}")

    def sync(self) -> None:
        """Nothing: wandb sends by itself."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Waits until everything is sent; a run that ended by an error is shown as failed."""
        self._attempt(lambda: self._run.finish(exit_code=0 if kind is None else 1), "its end")

    def _attempt(self, send: Callable[[], object], what: str) -> None:
        if self._failed:
            return
        try:
            send()
        except self._errors as error:
            self._failed = True
            warn(
                f"Weights & Biases was not sent {what}, and gets nothing after it: {error}."
                " metrics.jsonl has it all"
            )


def _run_id(path: Path, *, new: bool) -> str:
    """The id in the file, or a new one, which is then in it."""
    if not new and path.is_file():
        return path.read_text("utf-8").strip()
    run_id = secrets.token_hex(4)
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(run_id + "\n", "utf-8")
    temporary.replace(path)
    return run_id
