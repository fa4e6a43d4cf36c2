"""The real text that is measured on, and a tokenizer for it; both are made once and kept.

``--data=FOLDER`` names a folder with text/train.jsonl.gz (rows with ``text``) and
preferences/train.jsonl.gz (rows with ``prompt``, ``chosen`` and ``rejected``). Without it, the
docstrings of the installed Python packages stand in, which every machine has: a prompt is an
object's name and signature, the chosen response its docstring, a rejected one that of another.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from gram_jax.data import builtin
from gram_jax.data.docstrings import prompt_of
from gram_jax.data.sources import read_jsonl
from gram_jax.data.tokenizer import Tokenizer
from gram_jax.errors import UserError
from gram_jax.versions import versions

TEXT, PREFERENCES = "text/train.jsonl.gz", "preferences/train.jsonl.gz"

_TOKENIZER_CHARACTERS = 20_000_000
"""Text that the tokenizer learns from; more changes its merges little, and takes long."""
_REJECTED = 4
"""Pairs made of a docstring."""
_LONGEST_DOCSTRING = 6000  # characters


def corpus_folder(data: str) -> Path:
    """The folder with the two files; that of the docstrings is made if it is not there.

    Raises:
      UserError: ``data`` lacks one of the files.
    """
    if data:
        for name in (TEXT, PREFERENCES):
            if not (Path(data) / name).is_file():
                raise UserError(f"--data={data}: there is no {name} in this folder")
        return Path(data)
    key = hashlib.sha256(json.dumps(versions(), sort_keys=True).encode()).hexdigest()[:16]
    folder = _cache() / f"docstrings-{key}"
    if not (folder / PREFERENCES).is_file():
        _write_docstrings(folder)
    return folder


def corpus_tokenizer(folder: Path, vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer with at most ``vocab_size`` entries, trained on the folder."""
    files = [folder / TEXT, folder / PREFERENCES]
    facts = [(str(file.resolve()), file.stat().st_size) for file in files]
    key = hashlib.sha256(json.dumps([facts, vocab_size]).encode()).hexdigest()[:16]
    kept = _cache() / f"tokenizer-{key}"
    if (kept / "tokenizer.json").is_file():
        return Tokenizer.load(kept)
    tokenizer = Tokenizer.train(_some_text(files), vocab_size)
    tokenizer.save(kept)
    return tokenizer


def preference_rows(folder: Path) -> Iterator[dict[str, Any]]:
    """Rows of the preference file, as they stand there."""
    return (row for _, row in read_jsonl(folder / PREFERENCES))


def documents(folder: Path) -> Iterator[str]:
    """The texts, as they stand there."""
    return (row["text"] for _, row in read_jsonl(folder / TEXT))


def _some_text(files: Iterable[Path]) -> Iterator[str]:
    for file in files:
        left = _TOKENIZER_CHARACTERS // 2
        for _, row in read_jsonl(file):
            for name in ("text", "prompt", "chosen", "rejected"):
                if name in row:
                    yield row[name]
                    left -= len(row[name])
            if left < 0:
                break


def _cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "gram_jax" / "benchmarks"


def _write_docstrings(folder: Path) -> None:
    standard = builtin.standard_library_docstrings().docstrings
    packages = builtin.package_docstrings(builtin.IN_DISTRIBUTION).docstrings
    found = builtin.distinct([*standard, *packages])
    random.Random(0).shuffle(found)
    texts = [prompt_of(d) + d.text for d in (*found, *builtin.reference_topics())]
    answers = [d.text[:_LONGEST_DOCSTRING] for d in found]
    pairs = [
        {"prompt": prompt_of(d), "chosen": answers[i], "rejected": answers[i - k]}
        for i, d in enumerate(found)
        for k in range(1, _REJECTED + 1)
    ]
    random.Random(1).shuffle(pairs)
    _write(folder / TEXT, [{"text": text} for text in texts])
    _write(folder / PREFERENCES, pairs)


def _write(path: Path, rows: Iterable[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".partial")
    with gzip.open(part, "wt", encoding="utf-8", compresslevel=3) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    part.replace(path)
