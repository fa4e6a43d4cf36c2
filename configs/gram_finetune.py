"""Stage 2 of the released GRAM recipe, for accelerators: a judge of preference pairs.

  python -m gram_jax.finetune --config=configs/gram_finetune.py:CHECKPOINT --workdir=DIR \\
      --config.data.train=train.jsonl --config.data.validation=validation.jsonl \\
      [--config.data.judge_template=judge.toml]

CHECKPOINT is a workdir of gram_pretrain.py, or a Hugging Face folder of one of the models listed
there (then without stage 1), or of any other supported one. The data has rows {"prompt", "chosen",
"rejected"}, text or chat messages, or other columns of docs/data_formats.md.

From the recipe: peak rate 2e-5, 2 epochs, length 2048, cosine schedule with a warm-up of 0.1,
AdamW, clipping at 1.0, bfloat16, full fine-tuning, and label smoothing: its 0.1 is PyTorch's, which
is e = 0.05 here. Its 65k pairs go in global batches of 128 pairs; here a step is 64 rows, and how
many pairs these hold depends on the data: compare `pairs` in the log. Ours, and not tuned:
the template's words, each pair in both orders (--config.data.judge_orders=random: in one of them),
beta2 = 0.95, decay 0. For the likelihood reading, set --config.objective.name=smoothed_pairwise
--config.objective.average=mean --config.objective.beta=2.

Hardware: memory for each model in gram_pretrain.py, split over all devices (fsdp); a part of a step
is 16 rows, so 1, 2, 4, 8 or 16 devices; --config.train.accumulate=N makes it 64 / N rows.
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


def get_config(init_from: str = "Llama-3.1-8B-Instruct") -> Config:
    """The config for the model in this folder."""
    return Config(
        init_from=init_from,
        compute=ComputeConfig(remat="full"),
        mesh=MeshConfig(data=1, fsdp=-1),
        data=DataConfig(row_length=2048),
        objective=ObjectiveConfig(name="judge", label_smoothing=0.05),
        optimizer=OptimizerConfig(learning_rate=2e-5, warmup=0.1, final=0.0, weight_decay=0.0),
        train=TrainConfig(
            length=2, length_unit="epochs", batch_rows=64, accumulate=4, validate_every=200
        ),
        checkpoint=CheckpointConfig(every=200),
    )
