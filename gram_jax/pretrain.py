"""Stage 1: pretrains a decoder on unlabelled text with the next-token loss.

  python -m gram_jax.pretrain --config=configs/tiny_pretrain.py:DATA_FOLDER --workdir=DIR

A config file's get_config(arg) returns a gram_jax.config.Config; any of its settings can be
overridden, as in --config.optimizer.learning_rate=1e-4 --config.train.length=2000. The same command
run again goes on from the newest checkpoint in DIR/checkpoints. Losses go to DIR/metrics.jsonl and
DIR/tensorboard.
"""

from __future__ import annotations

from absl import flags

from gram_jax import entry
from gram_jax.config import Config
from gram_jax.errors import UserError
from gram_jax.loop import run_stage

_CONFIG = entry.define_config()
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)


def main(_: list[str]) -> None:
    config: Config = _CONFIG.value
    if config.objective.name != "next_token":
        raise UserError(
            f"config.objective.name={config.objective.name!r}: pretraining is next_token;"
            " use python -m gram_jax.finetune for the others"
        )
    result = run_stage(config, _WORKDIR.value)
    entry.print_result(result, _WORKDIR.value)


if __name__ == "__main__":
    entry.run(main)
