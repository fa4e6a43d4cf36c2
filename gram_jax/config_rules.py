"""What a config must satisfy: types, choices and rules, each broken one named; and plain values.

`validate` is called once, after the overrides of the command line; nothing is mutated after that.
"""

import dataclasses
import difflib
import re
import typing
from collections.abc import Sequence
from typing import Any

from gram_jax.config import (
    LORA_TARGETS,
    READINGS,
    CheckpointConfig,
    Config,
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    TrainConfig,
)
from gram_jax.data.shapes import UNLABELLED, kind_of
from gram_jax.errors import UserError


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain values, ready for JSON."""
    return dataclasses.asdict(config)


def from_dict(cls: type[Any], values: dict[str, Any], where: str = "config") -> Any:
    """The inverse of `to_dict`. Unknown or ill-typed fields are errors that name them."""
    hints = typing.get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls)]
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        if name not in names:
            raise UserError(unknown_field(f"{where}.{name}", names))
        if dataclasses.is_dataclass(hints[name]):
            if not isinstance(value, dict):
                raise UserError(f"{where}.{name} holds {value!r}; it must be an object")
            value = from_dict(typing.cast(type, hints[name]), value, f"{where}.{name}")
        else:
            value = tuple(value) if isinstance(value, list) else value
            _check_type(f"{where}.{name}", value, hints[name])
        arguments[name] = value
    return cls(**arguments)


def unknown_field(path: str, names: list[str]) -> str:
    """The error text for a field that does not exist, with the nearest one that does."""
    parent, _, name = path.rpartition(".")
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {parent}.{near[0]}?" if near else "it has " + ", ".join(sorted(names))
    return f"{path} is not a setting; {hint}"


def check_overrides(arguments: Sequence[str], flag: str = "config") -> None:
    """Checks that every ``--config.a.b=...`` among command-line arguments names a setting.

    Raises:
      UserError: names the argument and the nearest setting.
    """
    for argument in arguments:
        match = re.match(rf"--?(?:no)?{flag}\.([\w.\[\]]+)", argument)
        holder: Any = Config
        path = flag
        for name in match.group(1).split(".") if match else ():
            names = [f.name for f in dataclasses.fields(holder)]
            if name not in names:
                raise UserError(unknown_field(f"{path}.{name}", names))
            path, hint = f"{path}.{name}", typing.get_type_hints(holder)[name]
            if not dataclasses.is_dataclass(hint):
                break
            holder = hint


def differences(old: Any, new: Any, where: str = "config") -> list[tuple[str, Any, Any, str]]:
    """Fields in which two configs differ: (path, old value, new value, resume policy)."""
    found: list[tuple[str, Any, Any, str]] = []
    for field in dataclasses.fields(old):
        path = f"{where}.{field.name}"
        a, b = getattr(old, field.name), getattr(new, field.name)
        if dataclasses.is_dataclass(a):
            found += differences(a, b, path)
        elif a != b:
            found.append((path, a, b, field.metadata["resume"]))
    return found


def validate(config: Any, where: str = "config") -> None:
    """Checks types and choices of every field, and what fields demand of each other.

    Raises:
      UserError: names the field, what it holds and what it may hold.
    """
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, path = getattr(config, field.name), f"{where}.{field.name}"
        if dataclasses.is_dataclass(value):
            validate(value, path)
            continue
        _check_type(path, value, hints[field.name])
        choices = field.metadata.get("choices", ())
        if choices and value not in choices:
            raise UserError(f"{path}={value!r} must be one of {', '.join(map(repr, choices))}")
    rules = _RULES.get(type(config), ())
    for holds, message in rules:
        if not holds(config):
            raise UserError(f"{where}: {message}")


def _check_type(path: str, value: Any, hint: Any) -> None:
    if typing.get_origin(hint) is tuple:
        inner = typing.get_args(hint)[0]
        if not isinstance(value, tuple):
            raise UserError(f"{path}={value!r} must be a tuple of {inner.__name__}")
        for item in value:
            _check_type(path, item, inner)
        return
    allowed = (int, float) if hint is float else (hint,)
    if not isinstance(value, allowed) or (isinstance(value, bool) and hint is not bool):
        raise UserError(f"{path}={value!r} must be of type {hint.__name__}")


_RULES: dict[type, tuple[tuple[Any, str], ...]] = {
    ModelConfig: (
        (
            lambda c: (
                min(
                    c.vocab_size,
                    c.hidden_size,
                    c.num_layers,
                    c.num_heads,
                    c.num_kv_heads,
                    c.head_dim,
                    c.intermediate_size,
                    c.max_position,
                )
                > 0
            ),
            "every size must be positive",
        ),
        (lambda c: c.num_heads % c.num_kv_heads == 0, "num_kv_heads must divide num_heads"),
        (lambda c: c.head_dim % 2 == 0, "head_dim must be even (rotary embedding)"),
        (
            lambda c: len(c.windows) in (0, c.num_layers),
            "windows needs one entry per layer, or none",
        ),
    ),
    DataConfig: (
        (lambda c: c.row_length > 1, "row_length must be at least 2"),
        (lambda c: 0 <= c.row_targets <= c.row_length, "row_targets must be in [0, row_length]"),
        (
            lambda c: (c.row_sequences == 0 or c.row_sequences >= 2) and c.row_pairs >= 0,
            "a row needs room for one pair",
        ),
        (
            lambda c: not c.weights or (len(c.weights) == len(c.train) and min(c.weights) > 0),
            "weights needs one positive number per source in train, or none",
        ),
        (lambda c: c.workers >= 0, "workers is a number of processes, or 0"),
        (lambda c: 0 <= c.max_prompt < c.row_length, "max_prompt must be below row_length"),
        (lambda c: 0 <= c.holdout < 1, "holdout is a share of the prompts, in [0, 1)"),
        (
            lambda c: not (c.holdout and c.validation),
            "holdout makes the validation data, but validation names some; leave out one of them",
        ),
        (lambda c: c.max_pairs >= 0, "max_pairs is a number of pairs, or 0"),
        (
            lambda c: c.exclude_ngrams == 0 or (c.exclude_ngrams > 0 and c.exclude),
            "exclude_ngrams is a number of words, or 0, and goes with sources in exclude",
        ),
        (
            lambda c: 0 <= c.near_duplicates <= 1,
            "near_duplicates is a share, in (0, 1], or 0",
        ),
    ),
    ObjectiveConfig: (
        (lambda c: 0 <= c.label_smoothing < 0.5, "label_smoothing must be in [0, 0.5)"),
        (lambda c: c.beta > 0, "beta must be positive"),
        (
            lambda c: c.beta == 1 or READINGS[c.name] != "judge",
            "beta is the scale of a likelihood or a head; a judge's log-odds have their own, so"
            " with a judge it must be 1",
        ),
        (
            lambda c: c.centring == 0 or (c.centring > 0 and c.name == "bradley_terry"),
            "centring is a positive number, for bradley_terry only",
        ),
        (
            lambda c: c.chosen_ce == 0 or (c.chosen_ce > 0 and READINGS[c.name] != "judge"),
            "chosen_ce is a positive number, and a judge has no chosen response to predict",
        ),
    ),
    OptimizerConfig: (
        (lambda c: c.learning_rate > 0, "learning_rate must be positive"),
        (
            lambda c: 0 <= c.warmup <= 1 and 0 <= c.decay <= 1 and c.warmup + c.decay <= 1,
            "warmup and decay are shares of the steps and together at most 1",
        ),
    ),
    TrainConfig: (
        (lambda c: c.length > 0, "length must be positive"),
        (
            lambda c: c.batch_rows > 0 and c.accumulate > 0 and c.batch_rows % c.accumulate == 0,
            "accumulate must divide batch_rows",
        ),
        (lambda c: c.last_blocks >= 0 and c.log_every > 0, "last_blocks >= 0 and log_every > 0"),
        (
            lambda c: c.lora_rank >= 0 and c.lora_alpha > 0,
            "lora_rank is a number, or 0, and lora_alpha is positive",
        ),
        (
            lambda c: (
                c.lora_targets
                and set(c.lora_targets) <= set(LORA_TARGETS)
                and len(set(c.lora_targets)) == len(c.lora_targets)
            ),
            f"lora_targets names one or more of {', '.join(LORA_TARGETS)}, each once",
        ),
        (
            lambda c: bool(c.last_blocks) + c.head_only + bool(c.lora_rank) < 2,
            "last_blocks, head_only and lora_rank exclude each other",
        ),
    ),
    CheckpointConfig: (
        (lambda c: c.every > 0 and c.keep_last > 0, "every and keep_last must be positive"),
        (lambda c: c.keep_every >= 0, "keep_every is a number of steps, or 0"),
    ),
    Config: (
        (
            lambda c: c.train.last_blocks <= c.model.num_layers or c.init_from,
            "train.last_blocks is more than model.num_layers",
        ),
        (
            lambda c: (
                c.data.format == "auto"
                or (c.objective.name == "next_token") == (kind_of(c.data.format) in UNLABELLED)
            ),
            "objective.name=next_token goes with data.format=text, responses, pairs or alpaca, the"
            " others with preferences and the formats of labelled data",
        ),
        (
            lambda c: not c.train.head_only or c.objective.name == "bradley_terry",
            "train.head_only goes with objective.name=bradley_terry, which has a head",
        ),
        (
            lambda c: not c.data.reference_field or c.objective.name == "smoothed_pairwise",
            "data.reference_field is read by objective.name=smoothed_pairwise only",
        ),
        (
            lambda c: not c.data.max_pairs or c.objective.name != "next_token",
            "data.max_pairs draws labelled pairs, which objective.name=next_token does not read",
        ),
    ),
}
