"""What the commands share: flags, the folder of a model and its text, and the end."""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from absl import flags

from benchmarks import peak
from benchmarks.corpus import corpus_folder, corpus_tokenizer
from benchmarks.harness import check_peer, result, say
from benchmarks.models import SHAPES, write_model
from benchmarks.results import Case
from benchmarks.table import text
from gram_jax.config import ModelConfig
from gram_jax.data.tokenizer import Tokenizer

_DATA = flags.DEFINE_string(
    "data",
    "",
    "Folder with text/train.jsonl.gz and preferences/train.jsonl.gz. By default docstrings of the"
    " installed packages.",
)
_REPETITIONS = flags.DEFINE_integer("repetitions", 5, "Runs of each side, warm-up left out.")
_SMALL = flags.DEFINE_bool(
    "small", False, "A tiny model, little work, one repetition: only whether it runs and agrees."
)
_OUTPUT = flags.DEFINE_string("output", "", "File to write; by default runs/benchmarks/NAME.json.")


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is measured on.

    Attributes:
      data: folder of the text.
      tokenizer: of the model.
      model: its folder.
      config: its shape.
      scratch: a folder for the benchmark's own files.
      repetitions: of each side.
      peak_size: of the matrices whose product is the yardstick.
    """

    data: Path
    tokenizer: Tokenizer
    model: Path
    config: ModelConfig
    scratch: Path
    repetitions: int
    peak_size: int


def is_small() -> bool:
    """Whether to do only little."""
    return bool(_SMALL.value)


def repetitions() -> int:
    """How often each side runs, warm-up left out."""
    return 1 if is_small() else int(_REPETITIONS.value)


@contextlib.contextmanager
def setting(shape: str) -> Iterator[Setting]:
    """A model of this shape and its text; the model is gone afterwards.

    Raises:
      UserError: the peer or the data is missing.
    """
    check_peer()
    data = corpus_folder(_DATA.value)
    config = SHAPES["tiny" if is_small() else shape]
    tokenizer = corpus_tokenizer(data, config.vocab_size)
    with tempfile.TemporaryDirectory(prefix="gram_jax_bench_") as folder:
        model = Path(folder) / "model"
        write_model(model, config, tokenizer)
        yield Setting(
            data=data,
            tokenizer=tokenizer,
            model=model,
            config=config,
            scratch=Path(folder),
            repetitions=repetitions(),
            peak_size=128 if is_small() else peak.SIZE,
        )


def finish(benchmark: str, flops: dict[str, float], cases: list[Case]) -> Path:
    """Writes the result, prints its table, and returns the file."""
    command = shlex.join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]])
    path = Path(_OUTPUT.value or f"runs/benchmarks/{benchmark}.json")
    found = result(benchmark, command, flops, cases)
    found.write(path)
    print(text(found))
    say(f"written to {path}")
    return path
