"""Trains a byte-level BPE tokenizer on JSONL files, for models that start from random weights.

  python -m gram_jax.train_tokenizer --input=F.jsonl[,G.jsonl.gz] --vocab_size=8192 --output=DIR

It learns from the columns text, prompt, response, responses, chosen and rejected of each row, as
many as there are; chat messages count by their content. DIR gets tokenizer.json and
tokenizer_config.json, which pretrain reads (--config.tokenizer=DIR) and transformers loads. The
same rows give the same tokenizer. A run that starts from a Hugging Face folder needs none of this:
it takes the folder's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from gram_jax import entry
from gram_jax.data.sources import read_jsonl
from gram_jax.data.tokenizer import Tokenizer
from gram_jax.errors import DataError, UserError
from gram_jax.storage import local_folder

_INPUT = flags.DEFINE_list("input", None, "JSONL files, separated by commas.", required=True)
_VOCAB_SIZE = flags.DEFINE_integer(
    "vocab_size", 8192, "Entries: 256 bytes and 3 special tokens included."
)
_OUTPUT = flags.DEFINE_string("output", None, "Folder to write.", required=True)

COLUMNS = ("text", "prompt", "response", "responses", "chosen", "rejected")


def texts_of(row: dict[str, Any], file: str | Path, line: int) -> Iterator[str]:
    """All texts in a row's known columns.

    Raises:
      DataError: the row has none of the columns, or something other than text in one.
    """
    found = [name for name in COLUMNS if name in row]
    if not found:
        reason = f"has none of the columns {', '.join(COLUMNS)} (fields here: {', '.join(row)})"
        raise DataError(reason, file=file, line=line)
    for name in found:
        values = row[name] if isinstance(row[name], list) else [row[name]]
        for value in values:
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                yield text
            elif text is not None or not isinstance(value, dict):  # a tool call has no content
                reason = "must be text, a list of texts, or chat messages"
                raise DataError(reason, file=file, line=line, field=name)


def train(paths: Sequence[str | Path], vocab_size: int) -> Tokenizer:
    """The tokenizer of all texts in these files.

    Raises:
      UserError: a file or a row cannot be used, or vocab_size is too small.
    """
    rows = ((path, line, row) for path in paths for line, row in read_jsonl(path))
    texts = (text for path, line, row in rows for text in texts_of(row, path, line))
    return Tokenizer.train(texts, vocab_size)


def main(_: list[str]) -> None:
    output = local_folder(_OUTPUT.value, "--output")
    if (output / "tokenizer.json").exists():
        raise UserError(f"{output}: has a tokenizer.json already; delete it or choose another")
    tokenizer = train(_INPUT.value, _VOCAB_SIZE.value)
    tokenizer.save(output)
    print(f"{tokenizer.vocab_size:,} entries, written to {output}")


if __name__ == "__main__":
    entry.run(main, one_process=True)
