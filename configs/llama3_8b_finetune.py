"""Stage 2 for a slice of TPUs: Llama-3.1-8B, 8,030,261,248 parameters, by the likelihood reading.

  python -m gram_jax.finetune --config=configs/llama3_8b_finetune.py:CHECKPOINT --workdir=DIR \\
      --config.data.train=train.jsonl --config.data.validation=validation.jsonl

  # Whether training and scoring fit, and what bounds them, without a TPU (docs/scaling.md)
  python -m gram_jax.plan --config=configs/llama3_8b_finetune.py --topology=v5p:4x4x4
  python -m gram_jax.plan --config=configs/llama3_8b_finetune.py --topology=v5e:4x4 --step=score

CHECKPOINT is a workdir of llama3_8b_pretrain.py or the Hugging Face folder of the model, whose
shape is written here as well, so that it can be planned without the weights. The data has rows
{"prompt", "chosen", "rejected"}, text or chat messages, or other columns of docs/data_formats.md.

The rate, 2 epochs, the schedule, clipping at 1.0 and e = 0.05 are those of the released GRAM recipe
for stage 2. Ours: rows of 4,096 tokens, 128 of them a step, the mean log-prob and beta = 2.

Hardware: a slice of 64 or 128 chips; a step is 128 rows, which the number of devices must divide.
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


def get_config(init_from: str = "Llama-3.1-8B-Instruct") -> Config:
    """The config for the model in this folder."""
    return Config(
        init_from=init_from,
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
        data=DataConfig(row_length=4096),
        objective=ObjectiveConfig(
            name="smoothed_pairwise", label_smoothing=0.05, average="mean", beta=2.0
        ),
        optimizer=OptimizerConfig(learning_rate=2e-5, warmup=0.1, final=0.0, weight_decay=0.0),
        train=TrainConfig(
            length=2, length_unit="epochs", batch_rows=128, accumulate=1, validate_every=200
        ),
        checkpoint=CheckpointConfig(every=200),
    )
