"""Tokenises and packs the data of a stage, once, into rows on disk.

  python -m gram_jax.prepare --config=configs/tiny_pretrain.py:DATA_FOLDER --output=DIR

The sources of --config.data.train and --config.data.validation become DIR/train/N and
DIR/validation/N: shards of rows (ArrayRecord) and a manifest.json with what they are made of and
what was cut, split or left out. All cores are used. A preparation that was interrupted goes on
when the same command is given again; rows that are complete are kept, and it is an error if their
source, the tokenizer or a setting has changed since.

A stage uses them with --config.data.prepared=DIR, on any number of devices and processes. Without
that, its first run prepares its rows in WORKDIR/data in the same way, so this command is for
preparing on another machine, or once for many runs.

The tokenizer is that of --config.tokenizer, or of --config.init_from. A bad row stops the command
and is named; with --config.data.on_bad_row=quarantine it is left out, and named in
quarantine.jsonl.
"""

from __future__ import annotations

from pathlib import Path

from absl import flags

from gram_jax import entry
from gram_jax.config import Config
from gram_jax.config_rules import validate
from gram_jax.data.stage import stage_data
from gram_jax.loop import stage_tokenizer
from gram_jax.reporting import duration

_CONFIG = entry.define_config()
_OUTPUT = flags.DEFINE_string("output", None, "Folder for the rows.", required=True)


def main(_: list[str]) -> None:
    config: Config = _CONFIG.value
    validate(config)
    data = stage_data(config, stage_tokenizer(config), Path(_OUTPUT.value), replace=False)
    for line in data.text():
        print(line)
    seconds = sum(rows.manifest.seconds for rows in data.train.sets)
    print(f"{len(data.train):,} rows to train on, made in {duration(seconds)}: {_OUTPUT.value}")


if __name__ == "__main__":
    entry.run(main)
