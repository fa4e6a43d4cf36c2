"""Stage 1 for a laptop's CPU: a decoder of 5.3 million parameters on text.

  python -m gram_jax.train_tokenizer --input=DATA/text/train.jsonl.gz --output=DATA/tokenizer
  python -m gram_jax.pretrain --config=configs/tiny_pretrain.py:DATA --workdir=runs/tiny_pretrain

DATA is a folder with text/train.jsonl.gz and text/validation.jsonl.gz (rows {"text": ...}), and the
tokenizer of at most 8192 entries that the first command makes.

Hardware: CPU. All rows are tokenised and packed in memory, about 60 bytes a token at the start.
Time: on two CPU cores that other work shared, 830 to 1,570 tokens/s, so 45 to 80 minutes for all
1,000 steps; that far it was not run here.
Result: on a sample of 250 documents the training loss was 8.38 at step 10 and 4.88 at step 100. The
end of the run was not seen here.
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
        tokenizer=f"{data}/tokenizer",
        model=ModelConfig(
            vocab_size=8192,
            hidden_size=256,
            num_layers=4,
            num_heads=4,
            num_kv_heads=4,
            head_dim=64,
            intermediate_size=704,
            max_position=2048,
            tie_embeddings=True,
        ),
        data=DataConfig(
            train=(f"{data}/text/train.jsonl.gz",),
            validation=(f"{data}/text/validation.jsonl.gz",),
            row_length=512,
        ),
        objective=ObjectiveConfig(name="next_token"),
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup=0.05),
        train=TrainConfig(length=1000, batch_rows=8, validate_every=250),
        checkpoint=CheckpointConfig(every=250),
    )
