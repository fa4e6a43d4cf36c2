"""Stage 2 for a laptop's CPU: the model of tiny_pretrain.py on preference pairs.

  python -m gram_jax.finetune --config=configs/tiny_finetune.py:DATA --workdir=runs/tiny_finetune \\
      --config.init_from=runs/tiny_pretrain

DATA is a folder with preferences/train.jsonl.gz and preferences/validation.jsonl.gz (rows
{"prompt", "chosen", "rejected"}). The model's shape and tokenizer are those of init_from.

Responses of very different lengths have very different sums of log-probs, so the score here is the
mean per token; beta = 5 brings its differences, some tenths of a nat, to the scale of the loss.

Hardware: CPU.
Time: on two CPU cores that other work shared, about 600 tokens/s, so 14 seconds a step and 45
minutes for all 200 steps; that far it was not run here.
Result: not known. 20 steps of 2 rows on 240 pairs, from a model of 20 steps, took 1:49 and ended at
a loss of 0.57 on 4 validation rows, which says that it runs and nothing more.
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
        init_from="runs/tiny_pretrain",
        data=DataConfig(
            format="preferences",
            train=(f"{data}/preferences/train.jsonl.gz",),
            validation=(f"{data}/preferences/validation.jsonl.gz",),
            row_length=1024,
        ),
        objective=ObjectiveConfig(
            name="smoothed_pairwise", label_smoothing=0.05, beta=5.0, average="mean"
        ),
        optimizer=OptimizerConfig(learning_rate=3e-4),
        train=TrainConfig(length=200, batch_rows=8, validate_every=100),
        checkpoint=CheckpointConfig(every=100),
    )
