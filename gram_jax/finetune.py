"""Stage 2: fine-tunes a pretrained decoder on preference pairs.

  python -m gram_jax.finetune --config=configs/tiny_finetune.py:DATA_FOLDER --workdir=DIR \\
      --config.init_from=CHECKPOINT

CHECKPOINT is a workdir of gram_jax.pretrain, one of its checkpoints/STEP folders, or a Hugging Face
folder. The objective is smoothed_pairwise (a ranking loss) or smoothed_ce on the likelihoods of the
two responses, judge or judge_full_vocab on the label that a judge prompt asks for, or bradley_terry
on a scalar head; equations in gram_jax/objectives.py. The same command run again goes on from the
newest checkpoint in DIR/checkpoints.
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
    if config.objective.name == "next_token":
        raise UserError(
            "config.objective.name='next_token': that is pretraining; use python -m"
            " gram_jax.pretrain, or set smoothed_pairwise, judge or bradley_terry"
        )
    result = run_stage(config, _WORKDIR.value)
    entry.print_result(result, _WORKDIR.value)


if __name__ == "__main__":
    entry.run(main)
