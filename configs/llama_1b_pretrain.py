"""Stage 1 for accelerators: the shape of Llama-3.2-1B, 1,235,814,400 parameters, on text.

  python -m gram_jax.pretrain --config=configs/llama_1b_pretrain.py:DATA --workdir=DIR \\
      --config.tokenizer=TOKENIZER

  # The same from published weights: shape and tokenizer are the folder's; the rate is lower
  python -m gram_jax.pretrain --config=configs/llama_1b_pretrain.py:DATA --workdir=DIR \\
      --config.init_from=HF_FOLDER --config.optimizer.learning_rate=1e-5

DATA is a folder with text/train.jsonl.gz and text/validation.jsonl.gz (rows {"text": ...});
TOKENIZER one with a tokenizer.json of at most 128,256 entries.

From the released GRAM recipe for stage 1: length 2048, global batch 256, one epoch, cosine schedule
with a warm-up of 0.1, AdamW, clipping at 1.0, bfloat16, and, from published weights, the rate of
1e-5. That recipe trains on pairs of responses; this one is plain next-token training on text, and a
row holds several documents. Ours: the rate of 3e-4 for random weights, beta2 = 0.95, decay 0.1.

Hardware: weights, gradients and both moments take 16 bytes a parameter, 20 GB, split over all
devices (fsdp); a part of a step is 64 rows, which the number of devices must divide. A slice
v5e:4x4 fits: python -m gram_jax.plan --config=configs/llama_1b_pretrain.py --topology=v5e:4x4
Time and result: not run here.
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
            hidden_size=2048,
            num_layers=16,
            num_heads=32,
            num_kv_heads=8,
            head_dim=64,
            intermediate_size=8192,
            max_position=131072,
            rope_theta=500000.0,
            rope_scaling=RopeScaling(
                kind="llama3",
                factor=32.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position=8192,
            ),
            tie_embeddings=True,
        ),
        compute=ComputeConfig(remat="full"),
        mesh=MeshConfig(data=1, fsdp=-1),
        data=DataConfig(
            train=(f"{data}/text/train.jsonl.gz",),
            validation=(f"{data}/text/validation.jsonl.gz",),
            row_length=2048,
        ),
        objective=ObjectiveConfig(name="next_token"),
        optimizer=OptimizerConfig(learning_rate=3e-4, warmup=0.1, final=0.0),
        train=TrainConfig(
            length=1, length_unit="epochs", batch_rows=256, accumulate=4, validate_every=200
        ),
        checkpoint=CheckpointConfig(every=200),
    )
