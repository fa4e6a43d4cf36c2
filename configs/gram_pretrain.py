"""Stage 1 of the released GRAM recipe, for accelerators: pairs of responses, without labels.

  python -m gram_jax.pretrain --config=configs/gram_pretrain.py:HF_FOLDER --workdir=DIR \\
      --config.data.train=responses.jsonl [--config.data.validation=held_out.jsonl] \\
      [--config.data.judge_template=judge.toml]

HF_FOLDER holds config.json, the safetensors and tokenizer.json of one of the models that the recipe
was released for, or of any other supported one: the shape is the folder's. The data has rows
{"prompt": ..., "responses": [..., ...]}; two responses are one sequence, the second after the
first, as the judge's template (docs/judge.md) lays them out, and the loss is on that sequence.

  model                    parameters      weights, gradients, moments (16 bytes each)
  Llama-3.1-8B-Instruct     8,030,261,248   128 GB
  Llama-3.2-3B-Instruct     3,212,749,824    51 GB
  Qwen3-1.7B                1,720,574,976    28 GB
  Qwen3-4B                  4,022,468,096    64 GB
  Qwen3-8B                  8,190,735,360   131 GB
  Qwen3-14B                14,768,307,200   236 GB

From the recipe: peak rate 1e-5, one epoch, length 2048, cosine schedule with a warm-up of 0.1,
AdamW, clipping at 1.0, bfloat16, full fine-tuning. Its 566k pairs go in global batches of 256
pairs; here a step is 128 rows of 2048 tokens, and how many pairs these hold depends on the data.
Ours, and not tuned: the template's words, beta2 = 0.95, decay 0. For the likelihood reading, set
--config.data.format=responses: each response is then predicted from the prompt alone.

Hardware: the numbers above are split over all devices (fsdp), activations come on top; a part of a
step is 16 rows, so 1, 2, 4, 8 or 16 devices; --config.train.accumulate=N makes it 128 / N rows.
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
        data=DataConfig(format="pairs", row_length=2048),
        objective=ObjectiveConfig(name="next_token"),
        optimizer=OptimizerConfig(learning_rate=1e-5, warmup=0.1, final=0.0, weight_decay=0.0),
        train=TrainConfig(
            length=1, length_unit="epochs", batch_rows=128, accumulate=8, validate_every=500
        ),
        checkpoint=CheckpointConfig(every=500),
    )
