"""Stage 2 for a slice of TPUs: Qwen3-14B, 14,768,307,200 parameters, as a judge.

  python -m gram_jax.finetune --config=configs/qwen3_14b_judge_finetune.py:CHECKPOINT \\
      --workdir=DIR --config.data.train=train.jsonl --config.data.validation=validation.jsonl

  # Whether it fits, and what bounds it, without a TPU (docs/scaling.md)
  python -m gram_jax.plan --config=configs/qwen3_14b_judge_finetune.py --topology=v6e:8x8

CHECKPOINT is a workdir of gram_pretrain.py or the Hugging Face folder of the model, whose shape is
written here as well, so that it can be planned without the weights. The data has rows {"prompt",
"chosen", "rejected"}, text or chat messages, or other columns of docs/data_formats.md.

From the released GRAM recipe: peak rate 2e-5, 2 epochs, cosine schedule with a warm-up of 0.1,
AdamW, clipping at 1.0, bfloat16, full fine-tuning, and label smoothing: its 0.1 is PyTorch's, which
is e = 0.05 here. Ours: rows of 4,096 tokens, 128 of them a step, each pair in both orders.

Hardware: a slice of 64 chips of 32 GB, such as v6e:8x8; a step is 128 rows, which the number of
devices must divide.
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
    TrainConfig,
)


def get_config(init_from: str = "Qwen3-14B") -> Config:
    """The config for the model in this folder."""
    return Config(
        init_from=init_from,
        model=ModelConfig(
            family="qwen3",
            vocab_size=151936,
            hidden_size=5120,
            num_layers=40,
            num_heads=40,
            num_kv_heads=8,
            head_dim=128,
            intermediate_size=17408,
            max_position=40960,
            norm_eps=1e-6,
            rope_theta=1e6,
            qk_norm=True,
        ),
        compute=ComputeConfig(remat="full"),
        mesh=MeshConfig(data=1, fsdp=-1),
        data=DataConfig(row_length=4096),
        objective=ObjectiveConfig(name="judge", label_smoothing=0.05),
        optimizer=OptimizerConfig(learning_rate=2e-5, warmup=0.1, final=0.0, weight_decay=0.0),
        train=TrainConfig(
            length=2, length_unit="epochs", batch_rows=128, accumulate=1, validate_every=200
        ),
        checkpoint=CheckpointConfig(every=200),
    )
