"""Stage 2 for a laptop's CPU: the model of tiny_responses.py as a judge of preference pairs.

  python -m gram_jax.finetune --config=configs/tiny_judge_finetune.py:DATA \\
      --workdir=runs/tiny_judge

DATA is a folder with preferences/train.jsonl.gz and preferences/validation.jsonl.gz (rows
{"prompt", "chosen", "rejected"}). The model's shape and tokenizer are those of init_from, which
--config.init_from=CHECKPOINT changes. The judge reads the question and both responses, in both
orders, and answers A or B; the loss is on that one token. What does not fit 1,024 tokens is cut
from both responses alike.

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
        objective=ObjectiveConfig(name="judge", label_smoothing=0.05),
        optimizer=OptimizerConfig(learning_rate=5e-4),
        train=TrainConfig(length=100, batch_rows=8, validate_every=50),
        checkpoint=CheckpointConfig(every=50),
    )
