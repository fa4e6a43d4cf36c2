"""Exports a checkpoint as a Hugging Face folder that transformers 4 and 5 load.

  python -m gram_jax.export --checkpoint=CHECKPOINT --output=HF_DIR
  python -m gram_jax.export --checkpoint=CHECKPOINT --output=PEFT_DIR --adapter [--base=MODEL]

CHECKPOINT is a workdir of pretrain or finetune, one of its checkpoints/STEP folders, or a Hugging
Face folder. What is written depends on what a reward is:

  likelihood, judge   a causal language model (LlamaForCausalLM, ...)
  head                a sequence classifier (LlamaForSequenceClassification, ...), one label

With --classifier a judge becomes a sequence classifier too, whose number is the log-odds of the two
labels: for servers of classifiers. What it reads are judge prompts all the same.

A run with LoRA is exported with the matrices in the weights that they were trained beside. With
--adapter, PEFT_DIR gets the matrices alone (and the reward head), for peft to load onto the base
model, which is the run's init_from or --base: a Hugging Face folder, or a model's name there.

The weights are written in the dtype they came in (float32 for models that began here). Beside what
transformers reads stand README.md (the model card) and gram_config.json: what the reward is, and
how to compute it (docs/export.md).
"""

from __future__ import annotations

from absl import flags

from gram_jax import entry
from gram_jax.distributed import is_main
from gram_jax.errors import UserError
from gram_jax.model_card import export_checkpoint
from gram_jax.peft_folder import export_adapter
from gram_jax.storage import local_folder

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "What to export.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "Folder to write; must not exist.", required=True)
_CLASSIFIER = flags.DEFINE_bool("classifier", False, "A judge becomes a sequence classifier.")
_ADAPTER = flags.DEFINE_bool("adapter", False, "Write LoRA's matrices alone, for peft.")
_BASE = flags.DEFINE_string(
    "base", "", "With --adapter: the base model's folder or name; '' = the run's init_from."
)


def main(_: list[str]) -> None:
    if _BASE.value and not _ADAPTER.value:
        raise UserError("--base goes with --adapter")
    if _ADAPTER.value and _CLASSIFIER.value:
        raise UserError("--adapter and --classifier exclude each other")
    output = str(local_folder(_OUTPUT.value, "--output"))
    if _ADAPTER.value:
        folder = export_adapter(_CHECKPOINT.value, output, _BASE.value)
    else:
        folder = export_checkpoint(_CHECKPOINT.value, output, classifier=_CLASSIFIER.value)
    if is_main():
        print(f"written to {folder}")


if __name__ == "__main__":
    entry.run(main)
