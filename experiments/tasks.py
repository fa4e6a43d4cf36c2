"""The two data sets, as files in a work folder: text, unlabelled and labelled pairs, held-out sets.

  docstrings    a docstring against a damaged one: labels are true by construction. In
                distribution: objects held out of the packages trained on; out: packages never seen
  preferences   people's and models' preferences, from a folder DATA. In distribution: validation
                prompts; out: LLMBar, HHH, and hh-rlhf's harmless set

At the scale ``pretrained`` models start from a published language model instead of random weights,
and the prompts of preferences are chat messages, as such a model expects.

The files of a task are the same for every seed of a run, so that accuracies can be compared pair by
pair; a seed decides weights, the order of rows, and which labelled pairs are drawn.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from gram_jax.data.docstring_task import write_docstring_task
from gram_jax.data.sources import read_jsonl
from gram_jax.data.tokenizer import Tokenizer
from gram_jax.errors import UserError

TASKS = ("docstrings", "preferences")
WEIGHTS = "model.safetensors"
JUDGE_TEMPLATE = Path(__file__).parent / "judge.toml"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scale:
    """How large everything is.

    Attributes:
      vocabulary, hidden_size, layers: of the base's model; heads are 32 or 64 wide.
      tokens: of the base's stage 1.
      text_row, pair_row: tokens of a row of text, and of a row with two responses.
      text_rows: rows of a step on text; steps on pairs have as many tokens as fit.
      pairs: labelled ones there are, at most.
      epochs: over all labelled pairs.
      step_pairs: labelled pairs of a step, about.
      evaluated: pairs of a held-out set, at most (docstrings: of a kind of damage).
      longest: characters of a prompt with two responses, at most; 0 is no bound. Only preferences,
        where short pairs are what few core-minutes can read.
      pretrained: whether models start from a folder of a language model, whose shape and tokenizer
        count then.
      rate: of learning, as a multiple of the usual ones: a model that knows a language must not
        forget it.
    """

    vocabulary: int
    hidden_size: int
    layers: int
    tokens: int
    text_row: int
    pair_row: int
    text_rows: int
    pairs: int
    step_pairs: int
    evaluated: int
    epochs: int = 1
    longest: int = 0
    pretrained: bool = False
    rate: float = 1.0


_DOCSTRINGS = Scale(
    vocabulary=2048, hidden_size=128, layers=4, tokens=500_000, text_row=256, pair_row=512,
    text_rows=2, pairs=2000, step_pairs=20, evaluated=100,
)  # fmt: skip

SCALES = {
    "docstrings": {
        "cpu": _DOCSTRINGS,
        "labels": dataclasses.replace(_DOCSTRINGS, pairs=1_000_000),
        "pretrained": Scale(
            vocabulary=0, hidden_size=0, layers=0, tokens=100_000, text_row=512, pair_row=512,
            text_rows=4, pairs=320, step_pairs=10, evaluated=30, pretrained=True, rate=0.1,
        ),
        "gpu": Scale(
            vocabulary=16384, hidden_size=768, layers=14, tokens=3_000_000, text_row=1024,
            pair_row=1024, text_rows=8, pairs=1_000_000, step_pairs=64, evaluated=400, epochs=3,
        ),
    },
    "preferences": {
        "cpu": Scale(
            vocabulary=4096, hidden_size=128, layers=4, tokens=400_000, text_row=512,
            pair_row=640, text_rows=1, pairs=1500, step_pairs=20, evaluated=250, longest=1400,
        ),
        "pretrained": Scale(
            vocabulary=0, hidden_size=0, layers=0, tokens=100_000, text_row=640, pair_row=640,
            text_rows=4, pairs=400, step_pairs=10, evaluated=150, longest=1400, pretrained=True,
            rate=0.1,
        ),
        "gpu": Scale(
            vocabulary=40960, hidden_size=768, layers=12, tokens=60_000_000, text_row=1024,
            pair_row=2048, text_rows=32, pairs=1_000_000, step_pairs=64,
            evaluated=1_000_000, epochs=3,
        ),
    },
}  # fmt: skip
"""By task and name. ``labels``: all labelled pairs that there are, else as ``cpu``; ``pretrained``:
from a language model, whose shape counts; ``gpu``: 120 million parameters, all of the text, several
epochs."""

SMOKE = Scale(
    vocabulary=512, hidden_size=32, layers=1, tokens=4000, text_row=128, pair_row=512,
    text_rows=4, pairs=1000, step_pairs=20, evaluated=4,
)  # fmt: skip
"""To see every command run within a minute; its numbers mean nothing."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A data set at a scale, written to files.

    Attributes:
      text, responses, pairs: what is trained on: {"text"}, {"prompt", "responses"} without labels,
        {"prompt", "chosen", "rejected"}.
      sets: held-out pairs, {"prompt", "chosen", "rejected", "subset"}, by name; the first is in
        distribution.
      tokenizer: its folder.
      digests: SHA-256 by the name of each file above, and of the weights of ``pretrained``.
      left_out: rows that were longer than the scale's ``longest``, by the name of a file.
      pretrained: the folder of a language model to start from; None is random weights.
    """

    name: str
    scale: Scale
    text: Path
    responses: Path
    pairs: Path
    sets: Mapping[str, Path]
    tokenizer: Path
    digests: Mapping[str, str]
    left_out: Mapping[str, int] = dataclasses.field(default_factory=dict)
    pretrained: Path | None = None


def make_task(name: str, scale: Scale, folder: Path, data: str, pretrained: str = "") -> Task:
    """Writes the files of a task, or reads those that are there.

    Args:
      data: folder of the preferences.
      pretrained: Hugging Face folder of the model to start from, where the scale has one.

    Raises:
      UserError: ``data`` or ``pretrained`` is needed and not there, or the folder has the files of
        other sizes.
    """
    if name == "preferences" and not Path(data, "preferences").is_dir():
        raise UserError(
            f"--data={data!r} has no folder preferences; name the folder with text/, responses/,"
            " preferences/ and eval/ (docs/single_runs.md says what is in them)"
        )
    if scale.pretrained and not Path(pretrained, WEIGHTS).is_file():
        raise UserError(
            f"--pretrained={pretrained!r} is no folder with {WEIGHTS}; name the language model to"
            " start from (python -m experiments.smollm2 makes one)"
        )
    folder.mkdir(parents=True, exist_ok=True)
    made = folder / "task.json"
    asked = {"name": name, "scale": dataclasses.asdict(scale)}
    if made.is_file() and _asked(made) != (name, scale):
        raise UserError(f"{folder} has files of another scale; choose another --work")
    names = ("text", "responses", "pairs")
    text, responses, pairs = (folder / f"{part}.jsonl" for part in names)
    held_out = ("in", "out") if name == "docstrings" else tuple(_EVALUATED)
    sets = {part: folder / f"set_{part}.jsonl" for part in held_out}
    if not made.is_file():
        write = _write_docstrings if name == "docstrings" else _write_preferences
        left_out = write(scale, folder, Path(data), sets)
        files = {path.stem: path for path in (text, responses, pairs, *sets.values())}
        if scale.pretrained:
            files["pretrained"] = Path(pretrained, WEIGHTS)
        else:
            texts = (row["text"] for _, row in read_jsonl(text))
            Tokenizer.train(islice(texts, 20_000), scale.vocabulary).save(folder / "tokenizer")
        digests = {stem: _digest(path) for stem, path in files.items()}
        facts = {"asked": asked, "digests": digests, "left_out": left_out}
        made.write_text(json.dumps(facts, indent=2) + "\n")
    facts = json.loads(made.read_text())
    return Task(
        name=name, scale=scale, text=text, responses=responses, pairs=pairs, sets=sets,
        tokenizer=Path(pretrained) if scale.pretrained else folder / "tokenizer",
        digests=facts["digests"], left_out=facts["left_out"],
        pretrained=Path(pretrained) if scale.pretrained else None,
    )  # fmt: skip


def _asked(made: Path) -> tuple[str, Scale]:
    """The task and the scale that a folder's files are of."""
    asked = json.loads(made.read_text())["asked"]
    return asked["name"], Scale(**asked["scale"])


def _write_docstrings(
    scale: Scale, folder: Path, data: Path, sets: Mapping[str, Path]
) -> dict[str, int]:
    """Half of the prompts are for stage 1, without labels; the other half for stage 2."""
    files = write_docstring_task(folder / "all", seed=0, pairs_per_kind=scale.evaluated)
    rows = [row for _, row in read_jsonl(files.pairs)]
    unlabelled = [row for row in rows if _half(row["prompt"])]
    labelled = [row for row in rows if not _half(row["prompt"])]
    _write(folder / "text.jsonl", (row for _, row in read_jsonl(files.text)))
    _write(folder / "responses.jsonl", _without_labels(unlabelled))
    _write(folder / "pairs.jsonl", labelled[: scale.pairs])
    for name, source in (("in", files.pairs_in), ("out", files.pairs_out)):
        _write(sets[name], (row for _, row in read_jsonl(source)))
    return {}


_EVALUATED = {
    "validation": "preferences/validation.jsonl.gz",
    "llmbar": "eval/llmbar.jsonl.gz",
    "hhh": "eval/hhh.jsonl.gz",
    "hh_harmless": "eval/hh_harmless.jsonl.gz",
}


def _write_preferences(
    scale: Scale, folder: Path, data: Path, sets: Mapping[str, Path]
) -> dict[str, int]:
    """The files are in a shuffled order, so that their beginnings are samples."""
    _write(folder / "text.jsonl", _rows(data / "text" / "train.jsonl.gz"))
    sources = {
        "responses": data / "responses" / "train.jsonl.gz",
        "pairs": data / "preferences" / "train.jsonl.gz",
        **{name: data / file for name, file in _EVALUATED.items()},
    }
    most = {"pairs": scale.pairs} | dict.fromkeys(_EVALUATED, scale.evaluated)
    left_out = {}
    for name, source in sources.items():
        rows = list(_rows(source))
        short = [row for row in rows if not scale.longest or _characters(row) <= scale.longest]
        left_out[name] = len(rows) - len(short)
        if scale.pretrained:
            short = [row | {"prompt": messages(row["prompt"])} for row in short]
        path = sets[name] if name in sets else folder / f"{name}.jsonl"
        _write(path, short[: most.get(name)])
    return left_out


def messages(prompt: str) -> list[dict[str, str]]:
    """A prompt as chat messages; several turns are written as in hh-rlhf.

    Such a prompt begins with a blank line and ``Human:``, and ends with one and ``Assistant:``.
    """
    if not prompt.startswith("\n\nHuman:"):
        return [{"role": "user", "content": prompt}]
    parts = re.split(r"\n\n(Human|Assistant):", prompt)[1:]
    turns = [
        {"role": "user" if who == "Human" else "assistant", "content": said.strip()}
        for who, said in zip(parts[::2], parts[1::2], strict=True)
    ]
    return turns[:-1] if turns[-1] == {"role": "assistant", "content": ""} else turns


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    return (row for _, row in read_jsonl(path))


def _characters(row: Mapping[str, Any]) -> int:
    """Of a prompt with two responses."""
    both = row["responses"] if "responses" in row else (row["chosen"], row["rejected"])
    return len(row["prompt"]) + sum(map(len, both))


def _half(prompt: str) -> bool:
    return hashlib.sha256(prompt.encode()).digest()[0] < 128


def _without_labels(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    rng = random.Random(0)
    for row in rows:
        both = [row["chosen"], row["rejected"]]
        rng.shuffle(both)
        yield {"prompt": row["prompt"], "responses": both}


def _write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
