"""Writes the pages of docs/ that are made from code: docs/configs.md and docs/commands.md.

  python -m tools.reference            writes both
  python -m tools.reference --check    writes nothing; exit status 1 if one is not up to date

Run it after a change to a setting, a flag or a command's docstring.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib
import sys
import typing
from pathlib import Path
from typing import Any

from absl import flags

from gram_jax.config import FREE, Config
from gram_jax.help_text import command_flags

ROOT = Path(__file__).resolve().parents[1]

CONFIGS = """# Configs

This page is made from `gram_jax/config.py` by `python -m tools.reference`; a test checks that it is
up to date.

A config is a Python file whose `get_config(argument)` returns a `gram_jax.config.Config`, as those
in `configs/` do; the argument is what follows the colon in `--config=configs/NAME.py:ARGUMENT`, a
folder of data or of a model there. Any setting can be given on the command line too:

    python -m gram_jax.pretrain --config=configs/tiny_pretrain.py:DATA --workdir=DIR \\
        --config.optimizer.learning_rate=1e-3 --config.data.train="('a.jsonl','FOLDER:train')"

Names, types, choices and what settings demand of each other are checked before anything starts; a
name that does not exist is answered with the nearest one.

**Resume** says whether a run that goes on from its checkpoint may change the setting. What may
change (*yes*) is shown in the log when it has; a change of anything else (*no*) is refused, as it
would change what the weights mean or which rows come next. `docs/checkpoints.md` has more.
"""

COMMANDS_PAGE = """# Commands

This page is made from the commands by `python -m tools.reference`; a test checks that it is up to
date. It is what `--help` prints: `python -m gram_jax.score --help`.

Flags are `--name=value`. Exit status 0: done. 2: something given is wrong; one line says what,
where, and what to do. 75: stopped by SIGTERM, having saved what is needed to go on; the same
command goes on. 76: no progress for `--stall_seconds` or `train.stall_seconds`. 130: Ctrl-C. 1: a
device out of memory (`RESOURCE_EXHAUSTED`) or a defect, with a traceback; of `plan`, that the run
does not fit; of `serve`, that requests were not finished in time. `docs/hosts.md` has more.
"""


def configs_page() -> str:
    parts = [CONFIGS, "## Recipes\n", *_recipes()]
    parts += ["\n## Settings\n", *_settings(Config, "config")]
    return "\n".join(parts).rstrip() + "\n"


def _recipes() -> list[str]:
    lines = ["| file | what it is |", "| --- | --- |"]
    for path in sorted((ROOT / "configs").glob("*.py")):
        doc = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
        lines.append(f"| `configs/{path.name}` | {_cell(doc.split(chr(10) + chr(10))[0])} |")
    lines.append("\nEach file says its command, the hardware, the time and the result to expect.")
    return lines


def _settings(cls: type[Any], path: str) -> list[str]:
    """A table of the class's own settings, then those of the parts it holds."""
    hints = typing.get_type_hints(cls)
    lines = [f"### {path}\n", (cls.__doc__ or "").strip() + "\n"]
    lines += ["| setting | type | default | meaning | resume |", "| --- | --- | --- | --- | --- |"]
    parts: list[str] = []
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            parts += ["", *_settings(typing.cast(type, hint), f"{path}.{field.name}")]
            continue
        meaning = _cell(field.metadata["doc"])
        if choices := field.metadata["choices"]:
            meaning += " One of " + ", ".join(f"`{choice}`" for choice in choices) + "."
        resume = "yes" if field.metadata["resume"] == FREE else "no"
        type_name = hint.__name__ if isinstance(hint, type) else str(hint)
        if typing.get_origin(hint) is tuple:
            type_name = f"tuple of {typing.get_args(hint)[0].__name__}"
        default = f"`{field.default!r}`"
        lines.append(f"| `{field.name}` | {type_name} | {default} | {meaning} | {resume} |")
    return lines + parts


def commands_page() -> str:
    importlib.import_module("gram_jax.entry")  # defines the flags of several processes, once
    parts = [COMMANDS_PAGE]
    for path in sorted((ROOT / "gram_jax").glob("*.py")):
        name, source = path.stem, path.read_text("utf-8")
        if "\n    entry.run(main" not in source:
            continue
        module, before = f"gram_jax.{name}", set(flags.FLAGS)
        doc = (importlib.import_module(module).__doc__ or "").strip()
        parts += [f"## {name}\n", "```text", doc, "```\n"]
        parts += ["| flag | takes | meaning |", "| --- | --- | --- |"]
        one_process = "one_process=True" in source
        for flag in command_flags(module, one_process=one_process):
            takes = _cell(flag.values.replace("|", ", "))
            parts.append(f"| `{flag.name}` | {takes} | {_cell(flag.meaning)} |")
        parts.append("")
        for new in set(flags.FLAGS) - before:  # other commands have flags of the same names
            delattr(flags.FLAGS, new)
    return "\n".join(parts).rstrip() + "\n"


def _cell(text: str) -> str:
    """Text on one line, with no bar and no tag in it."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


PAGES = {"docs/configs.md": configs_page, "docs/commands.md": commands_page}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing, say what is old")
    check = parser.parse_args().check
    old = []
    for name, page in PAGES.items():
        path, text = ROOT / name, page()
        if not path.is_file() or path.read_text("utf-8") != text:
            old.append(name)
            if not check:
                path.write_text(text, "utf-8")
    if check and old:
        print(f"not up to date: {', '.join(old)}; run python -m tools.reference", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
