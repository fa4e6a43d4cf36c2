"""Stage 1 for a slice of TPUs: the shape of Llama-3.1-8B, 8,030,261,248 parameters, on text.

  python -m gram_jax.pretrain --config=configs/llama3_8b_pretrain.py:DATA --workdir=DIR \\
      --config.tokenizer=TOKENIZER

  # The same from published weights: shape and tokenizer are the folder's; the rate is lower
  python -m gram_jax.pretrain --config=configs/llama3_8b_pretrain.py:DATA --workdir=DIR \\
      --config.init_from=HF_FOLDER --config.optimizer.learning_rate=1e-5

  # Whether it fits, and what bounds it, without a TPU (docs/scaling.md)
  python -m gram_jax.plan --config=configs/llama3_8b_pretrain.py --topology=v5p:4x4x4
  python -m gram_jax.plan --config=configs/llama3_8b_pretrain.py --topology=v6e:16x16

DATA is a folder with text/train.jsonl.gz and text/validation.jsonl.gz (rows {"text": ...});
TOKENIZER one with a tokenizer.json of at most 128,256 entries.

The shape is that of the published config.json. Rows of 8,192 tokens, 512 of them a step, are ours,
as are the rate, beta2 = 0.95 and decay 0.1.

Hardware: a slice of 64 to 256 chips, such as v5p:4x4x4 or v6e:16x16; a step is 512 rows, in
one part, which the number of devices must divide.
Time and result: not run here; the least time by the chips' published figures is in docs/scaling.md.
"""

from gram_jax.config import (
    CheckpointConfig,
    ComputeConfig,
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    RopeScaling,
    TrainConfig,
)


def get_config(data: str = "data") -> Config:
    """The config for the data in this folder."""
    return Config(
        tokenizer=f"{data}/tokenizer",
        model=ModelConfig(
            family="llama",
            vocab_size=128256,
            hidden_size=4096,
            num_layers=32,
            num_heads=32,
            num_kv_heads=8,
            head_dim=128,
            intermediate_size=14336,
            max_position=131072,
            rope_theta=500000.0,
            rope_scaling=RopeScaling(
                kind="llama3",
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position=8192,
            ),
        ),
        compute=ComputeConfig(remat="full"),
        mesh=MeshConfig(data=1, fsdp=-1),
        data=DataConfig(
            train=(f"{data}/text/train.jsonl.gz",),
            validation=(f"{data}/text/validation.jsonl.gz",),
            row_length=8192,
        ),
        objective=ObjectiveConfig(name="next_token"),
        optimizer=OptimizerConfig(learning_rate=3e-4, warmup=0.02, final=0.1),
        train=TrainConfig(
            length=1, length_unit="epochs", batch_rows=512, accumulate=1, validate_every=200
        ),
        checkpoint=CheckpointConfig(every=200),
    )
