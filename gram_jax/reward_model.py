"""A CHECKPOINT as a reward model: what it says of its reward, what flags change, and the scorer.

Commands that read rewards define their flags here, so that they mean the same everywhere.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from absl import flags
from jax.sharding import Mesh

from gram_jax import hf
from gram_jax.checkpoints import candidates, first_whole, load_model, read_run_info
from gram_jax.config import READINGS, STALL_SECONDS, ComputeConfig, ObjectiveConfig
from gram_jax.data.judge import JudgeTemplate
from gram_jax.errors import UserError
from gram_jax.mesh import make_mesh, parse_mesh
from gram_jax.scorer import READINGS as REWARDS
from gram_jax.scorer import RewardSettings, Scorer

_FLAGS = flags.FLAGS


def stored_settings(checkpoint: str | Path) -> RewardSettings:
    """How the reward of a CHECKPOINT is read, as it was trained or exported.

    A pretrained model, and a folder made by others that does not say it, have the reward
    ``likelihood``, or ``head`` if it is a sequence classifier. Of a classifier whose padding is its
    end token the end token is no part of a response, as transformers takes it for padding.

    Raises:
      UserError: there is no checkpoint, or what it says cannot be used.
    """
    if not hf.is_hf_folder(checkpoint):
        # The model itself is loaded elsewhere, where a damaged checkpoint is reported.
        run = first_whole(candidates(checkpoint), read_run_info, quiet=True)
        return _settings(run.config.objective, run.config.data.add_eos, run.judge)
    described = Path(checkpoint) / "gram_config.json"
    by_default = "head" if hf.is_classifier(checkpoint) else "likelihood"
    if not described.is_file():
        add_eos = by_default == "likelihood" or not hf.pads_with_end(checkpoint)
        return RewardSettings(reading=by_default, add_eos=add_eos)
    try:
        values = json.loads(described.read_text("utf-8"))
        judge = values.get("judge")
        return RewardSettings(
            reading=values.get("reward", by_default),
            average=values.get("average", "sum"),
            beta=float(values.get("beta", 1.0)),
            add_eos=bool(values.get("add_eos", True)),
            template=JudgeTemplate.from_dict(judge["template"], str(described)) if judge else None,
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{described}: does not describe a reward ({error})") from None


def _settings(
    objective: ObjectiveConfig, add_eos: bool, judge: dict[str, Any] | None
) -> RewardSettings:
    reading = READINGS[objective.name]
    if reading == "text":
        return RewardSettings(add_eos=add_eos)
    return RewardSettings(
        reading=reading,
        average=objective.average if reading == "likelihood" else "sum",
        beta=objective.beta,
        add_eos=add_eos,
        template=JudgeTemplate.from_dict(judge["template"]) if judge else None,
    )


def define_flags(*, checkpoint_required: bool = True) -> None:
    """The flags of a command that reads rewards, with --checkpoint."""
    flags.DEFINE_string("checkpoint", None, "Folder of the model.", required=checkpoint_required)
    flags.DEFINE_enum(
        "reward",
        None,
        REWARDS,
        "What a reward is: the log-prob of the response; the probability of a judge's label, given"
        " two responses; the number of a scalar head. By default as the model was trained, else"
        " likelihood.",
    )
    flags.DEFINE_enum(
        "average",
        None,
        ["sum", "mean"],
        "A likelihood is the log-prob, or the log-prob per token. By default as the model was"
        " fine-tuned, else sum.",
    )
    flags.DEFINE_float(
        "beta",
        None,
        "Log-odds per unit of reward, of a likelihood or a head. By default as the model was"
        " fine-tuned, else 1.",
    )
    flags.DEFINE_string(
        "template",
        None,
        "TOML file of the judge's template (docs/judge.md). By default the one that the model was"
        " trained with, else one of our own words.",
    )
    flags.DEFINE_integer(
        "row_length",
        0,
        "Tokens of a row, in which short sequences lie side by side. 0 = 8192 on CPU, else 2048; or"
        " max_length if it is more.",
    )
    flags.DEFINE_integer(
        "max_length",
        0,
        "Most tokens of a prompt and one response, or of a judge prompt. 0 = row_length, or the"
        " model's positions.",
    )
    flags.DEFINE_enum(
        "too_long",
        "error",
        ["error", "truncate"],
        "A longer one: stop and name it; or cut it and say so. The prompt is cut from the left (BOS"
        " and its last token stay), then the response from the right; in a judge prompt both"
        " responses alike, and never the template.",
    )
    flags.DEFINE_integer(
        "batch_rows", 0, "Rows computed at once. 0 = 8192 tokens on CPU, else 16384 per device."
    )
    flags.DEFINE_bool(
        "add_eos",
        None,
        "The end token is part of a response. By default as the model was trained, else yes; no for"
        " a classifier of others whose padding is its end token.",
    )
    flags.DEFINE_enum(
        "dtype",
        "auto",
        ["auto", "float32", "bfloat16"],
        "Of matrix products: auto = float32 on CPU, bfloat16 elsewhere. Weights stay float32, 4"
        " bytes each, and every device holds all of them unless --mesh splits them.",
    )
    flags.DEFINE_float(
        "stall_seconds",
        STALL_SECONDS,
        "A process that has finished no batch for so many seconds prints what its threads are"
        " doing and ends with status 76. 0 = never.",
    )
    flags.DEFINE_string(
        "mesh",
        "",
        "How devices share the work, as in fsdp=2,tensor=4: data (copies of the model), fsdp and"
        " tensor (parts of it), context (parts of each row). data takes what is left.",
    )


def flag_settings() -> RewardSettings:
    """The settings that the flags ask for; what they leave open is as the checkpoint says."""
    stored = stored_settings(_FLAGS.checkpoint)

    def given(name: str, otherwise: Any) -> Any:
        value = _FLAGS[name].value
        return otherwise if value is None else value

    template = stored.template
    if _FLAGS.template is not None:
        template = JudgeTemplate.load(_FLAGS.template)
    reading = given("reward", stored.reading)
    check_reading(_FLAGS.checkpoint, stored.reading, reading)
    return RewardSettings(
        reading=reading,
        average=given("average", stored.average),
        beta=given("beta", stored.beta),
        row_length=_FLAGS.row_length,
        max_length=_FLAGS.max_length,
        too_long=_FLAGS.too_long,
        batch_rows=_FLAGS.batch_rows,
        add_eos=given("add_eos", stored.add_eos),
        template=template if reading == "judge" else None,
    )


def check_reading(checkpoint: str | Path, stored: str, asked: str) -> None:
    """A classifier has one number, which means what it was made to mean.

    Raises:
      UserError: the CHECKPOINT is a classifier, and ``asked`` is not the reward it has ``stored``.
    """
    if asked == stored:
        return
    if hf.is_hf_folder(checkpoint):
        is_classifier = hf.is_classifier(checkpoint)
    else:
        run = first_whole(candidates(checkpoint), read_run_info, quiet=True)
        is_classifier = not run.config.model.has_unembedding
    if is_classifier:
        raise UserError(
            f"--reward={asked}: {checkpoint} is a sequence classifier, whose one number is the"
            f" reward of a {stored}; leave --reward out"
        )


def flag_mesh() -> Mesh | None:
    """The mesh that the flags ask for; one device needs none."""
    text = _FLAGS.mesh
    return make_mesh(parse_mesh(text)) if len(jax.devices()) > 1 or text else None


def flag_model(mesh: Mesh | None) -> Callable[[], Any]:
    """Loads the checkpoint that the flags name, when it is called."""
    return lambda: load_model(_FLAGS.checkpoint, ComputeConfig(dtype=_FLAGS.dtype), mesh)


def flag_scorer(mesh: Mesh | None) -> Scorer:
    """The reward model that the flags describe, on a mesh."""
    settings = flag_settings()
    return Scorer(flag_model(mesh)(), settings, mesh)
