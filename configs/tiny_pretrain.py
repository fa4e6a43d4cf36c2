"""Stage 1 for a laptop's CPU: a decoder of 3.3 million parameters on text.

  python -m gram_jax.train_tokenizer --output=runs/tokenizer \\
      --input=DATA/text/train.jsonl.gz,DATA/responses/train.jsonl.gz
  python -m gram_jax.pretrain --config=configs/tiny_pretrain.py:DATA --workdir=runs/tiny_pretrain

DATA is a folder with text/train.jsonl.gz and text/validation.jsonl.gz (rows {"text": ...}). The
first command makes a tokenizer of 8192 entries. tiny_responses.py goes on from here.

Hardware: CPU.
Time and result: docs/single_runs.md.
"""

from gram_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    TrainConfig,
)


def get_config(data: str = "data") -> Config:
    """The config for the data in this folder."""
    return Config(
        tokenizer="runs/tokenizer",
        model=ModelConfig(
            vocab_size=8192,
            hidden_size=192,
            num_layers=4,
            num_heads=4,
            num_kv_heads=4,
            head_dim=48,
            intermediate_size=512,
            max_position=2048,
            tie_embeddings=True,
        ),
        data=DataConfig(
            train=(f"{data}/text/train.jsonl.gz",),
            validation=(f"{data}/text/validation.jsonl.gz",),
            format="text",
            row_length=512,
        ),
        objective=ObjectiveConfig(name="next_token"),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup=0.05),
        train=TrainConfig(length=400, batch_rows=8, validate_every=200),
        checkpoint=CheckpointConfig(every=200),
    )
