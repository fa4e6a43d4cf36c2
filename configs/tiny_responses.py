"""Stage 1 for a laptop's CPU, second part: the model of tiny_pretrain.py on responses to prompts.

  python -m gram_jax.pretrain --config=configs/tiny_responses.py:DATA --workdir=runs/tiny_responses

DATA is a folder with responses/train.jsonl.gz (rows {"prompt": ..., "responses": [..., ...]}) and
text/validation.jsonl.gz. The loss is on the responses' tokens, a prompt is computed once for all of
its responses; one row in ten is of text (DATA/text/train.jsonl.gz), so that it is not forgotten.

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
        init_from="runs/tiny_pretrain",
        data=DataConfig(
            train=(f"{data}/responses/train.jsonl.gz", f"{data}/text/train.jsonl.gz"),
            weights=(9.0, 1.0),
            validation=(f"{data}/text/validation.jsonl.gz",),
            row_length=1024,
        ),
        objective=ObjectiveConfig(name="next_token"),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        train=TrainConfig(length=120, batch_rows=4, validate_every=60),
        checkpoint=CheckpointConfig(every=60),
    )
