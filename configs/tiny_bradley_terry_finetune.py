"""The discriminative baseline for a laptop's CPU: a reward head on the model of tiny_responses.py.

  python -m gram_jax.finetune --config=configs/tiny_bradley_terry_finetune.py:DATA \\
      --workdir=runs/tiny_bradley_terry

DATA is a folder with preferences/train.jsonl.gz and preferences/validation.jsonl.gz (rows
{"prompt", "chosen", "rejected"}). The model's shape and tokenizer are those of init_from, which
--config.init_from=CHECKPOINT changes. A linear head on the last token's hidden state gives the
reward; --config.train.head_only=True trains it alone, on a frozen trunk, and
--config.objective.chosen_ce=0.01 adds the text-generation regulariser.

Hardware: CPU.
Time and result: docs/single_runs.md.
"""

from gram_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    ObjectiveConfig,
    OptimizerConfig,
    TrainConfig,
)


def get_config(data: str = "data") -> Config:
    """The config for the data in this folder."""
    return Config(
        init_from="runs/tiny_responses",
        data=DataConfig(
            train=(f"{data}/preferences/train.jsonl.gz",),
            validation=(f"{data}/preferences/validation.jsonl.gz",),
            row_length=1024,
        ),
        objective=ObjectiveConfig(name="bradley_terry", label_smoothing=0.05, centring=0.01),
        optimizer=OptimizerConfig(learning_rate=5e-4),
        train=TrainConfig(length=100, batch_rows=8, validate_every=50),
        checkpoint=CheckpointConfig(every=50),
    )
