"""Stage 2 for accelerators: Qwen3-1.7B (1,720,574,976 parameters) on preference pairs.

  python -m gram_jax.finetune --config=configs/qwen3_1p7b_gram_finetune.py:HF_FOLDER \\
      --workdir=DIR --config.data.train=train.jsonl --config.data.validation=validation.jsonl

HF_FOLDER holds config.json, the safetensors and tokenizer.json of Qwen3-1.7B (or of any other
supported model: the shape is the folder's), or is a workdir of pretrain. The data has rows
{"prompt", "chosen", "rejected"}, text or chat messages.

From the released GRAM recipe for stage 2: peak rate 2e-5, 2 epochs, length 2048, cosine schedule
with a warm-up of 0.1, AdamW, clipping at 1.0, bfloat16, full fine-tuning, and label smoothing: its
0.1 is PyTorch's, which is e = 0.05 here. Its global batch is 128 pairs; here a step is 64 rows,
and how many pairs these hold depends on the data: compare `pairs` in the log. That recipe trains a
judge that answers A or B; the loss here is the same function of the difference of the responses'
log-probs per token. Ours, and not tuned: beta = 2, the mean per token, beta2 = 0.95, decay 0.

Hardware: weights, gradients and both moments take 16 bytes a parameter, 28 GB, split over all
devices (fsdp); a part of a step is 8 rows, so 1, 2, 4 or 8 devices.
Time and result: not run here.
"""

from gram_jax.config import (
    CheckpointConfig,
    ComputeConfig,
    Config,
    DataConfig,
    MeshConfig,
    ObjectiveConfig,
    OptimizerConfig,
    TrainConfig,
)


def get_config(init_from: str = "Qwen3-1.7B") -> Config:
    """The config for the model in this folder."""
    return Config(
        init_from=init_from,
        compute=ComputeConfig(remat="full"),
        mesh=MeshConfig(data=1, fsdp=-1),
        data=DataConfig(format="preferences", row_length=2048),
        objective=ObjectiveConfig(
            name="smoothed_pairwise", label_smoothing=0.05, beta=2.0, average="mean"
        ),
        optimizer=OptimizerConfig(learning_rate=2e-5, warmup=0.1, final=0.0, weight_decay=0.0),
        train=TrainConfig(
            length=2, length_unit="epochs", batch_rows=64, accumulate=8, validate_every=200
        ),
        checkpoint=CheckpointConfig(every=200),
    )
