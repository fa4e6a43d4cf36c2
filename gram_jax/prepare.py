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

  # The same rows by an Apache Beam runner: on one machine, or on many (docs/preparing.md)
  python -m gram_jax.prepare --config=configs/tiny_pretrain.py:DATA_FOLDER --output=DIR \\
      --runner=DirectRunner
  python -m gram_jax.prepare --config=configs/NAME.py:gs://BUCKET/data --output=gs://BUCKET/rows \\
      --runner=DataflowRunner --beam_options="--project=P --region=R --temp_location=gs://BUCKET/t"
"""

from __future__ import annotations

import shlex

from absl import flags

from gram_jax import entry
from gram_jax.config import Config
from gram_jax.config_rules import validate
from gram_jax.data.prepare import Beam
from gram_jax.data.stage import prepare_stage, rows_text, stage_layout
from gram_jax.errors import UserError
from gram_jax.loop import stage_tokenizer
from gram_jax.reporting import duration
from gram_jax.storage import located

_CONFIG = entry.define_config()
_OUTPUT = flags.DEFINE_string("output", None, "Folder for the rows.", required=True)
_RUNNER = flags.DEFINE_string(
    "runner",
    None,
    "Apache Beam runner that makes the rows; by default this machine's processes do.",
)
_BEAM_OPTIONS = flags.DEFINE_string(
    "beam_options", "", "Further options of the Beam pipeline, as on a command line."
)


def main(_: list[str]) -> None:
    config: Config = _CONFIG.value
    validate(config)
    if _BEAM_OPTIONS.value and not _RUNNER.value:
        raise UserError("--beam_options goes with --runner, as in --runner=DirectRunner")
    beam = Beam(_RUNNER.value, tuple(shlex.split(_BEAM_OPTIONS.value))) if _RUNNER.value else None
    made = prepare_stage(config, stage_tokenizer(config), located(_OUTPUT.value), beam)
    for name, manifest in made.items():
        print(rows_text(name.partition("/")[0], manifest, stage_layout(config)))
    train = [manifest for name, manifest in made.items() if name.startswith("train/")]
    rows, seconds = sum(m.rows for m in train), sum(m.seconds for m in train)
    print(f"{rows:,} rows to train on, made in {duration(seconds)}: {_OUTPUT.value}")


if __name__ == "__main__":
    entry.run(main, one_process=True)
