"""LoRA's matrices, and the reward head, as a folder that peft loads onto the base model.

adapter_config.json says what peft must build, adapter_model.safetensors holds the weights, float32,
in peft's layout: A as [rank, inputs], B as [outputs, rank]. The base model itself is not written.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from gram_jax import __version__, hf
from gram_jax.checkpoints import candidates, first_whole, load_model, read_run_info
from gram_jax.config import ComputeConfig, Config, MeshConfig
from gram_jax.distributed import barrier, is_main, main_first, process_count
from gram_jax.errors import UserError
from gram_jax.hf_export import check_unused, whole_folder, write_object
from gram_jax.mesh import make_mesh, whole
from gram_jax.model_card import gram_config
from gram_jax.models.adapters import adapters_of
from gram_jax.models.decoder import Decoder
from gram_jax.models.families import tensor_name
from gram_jax.reward_model import stored_settings

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# What peft saves beside LoRA's matrices of a sequence classifier; ours has the second.
_CLASSIFIER_MODULES = ["classifier", "score"]
_PREFIX = "base_model.model."  # how peft names the model that it wraps


def export_adapter(checkpoint: str | Path, output: str | Path, base: str = "") -> Path:
    """Writes the folder, whole or not at all, and returns its path.

    Args:
      checkpoint: a workdir of a run with LoRA, or one of its step folders.
      output: must not exist, or be empty.
      base: the Hugging Face folder, or the name, of the model that the run started from; "" = the
        run's init_from.

    Raises:
      UserError: the checkpoint cannot be used or is not one of LoRA, the base is not known to be a
        Hugging Face folder, or the output folder is in use.
    """
    folder = Path(output).absolute()
    main_first(lambda: check_unused(folder))
    base = _check(checkpoint, base)
    # Several processes hold a model together, each a part.
    mesh = make_mesh(MeshConfig(data=1, fsdp=-1)) if process_count() > 1 else None
    loaded = load_model(checkpoint, ComputeConfig(), mesh, merge=False)
    assert loaded.config is not None
    with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
        tensors = adapter_tensors(loaded.model)
    described = gram_config(loaded, stored_settings(checkpoint))
    if is_main():
        with whole_folder(folder) as partial:
            write_object(partial / CONFIG, adapter_config(loaded.config, base))
            write_object(partial / "gram_config.json", described)
            card = _card(loaded.config, base, classifier=hasattr(loaded.model, "head"))
            (partial / "README.md").write_text(card, encoding="utf-8")
            loaded.tokenizer.save(partial)
            save_file(tensors, partial / WEIGHTS, metadata={"format": "pt"})
    barrier("adapter exported")
    return Path(output)


def _check(checkpoint: str | Path, base: str) -> str:
    """The base model's folder or name, for a checkpoint that has an adapter; else UserError."""
    what = f"{checkpoint}: has no LoRA adapter; leave out --adapter to export the whole model"
    if hf.is_hf_folder(checkpoint):
        raise UserError(what)
    run = first_whole(candidates(checkpoint), read_run_info, quiet=True).config
    if not run.train.lora_rank:
        raise UserError(what)
    if not base and not (run.init_from and hf.is_hf_folder(run.init_from)):
        began = f"began from {run.init_from}" if run.init_from else "began from random weights"
        raise UserError(
            f"{checkpoint}: {began}, which is not a Hugging Face folder that peft could load;"
            " export what it began from, and name that folder with --base"
        )
    return base or run.init_from


def adapter_config(run: Config, base: str) -> dict[str, Any]:
    """The content of adapter_config.json for a run with LoRA."""
    adapters = adapters_of(run)
    assert adapters.lora is not None
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if adapters.head else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": adapters.lora.rank,
        "lora_alpha": adapters.lora.alpha,
        "target_modules": [_module(name) for name in adapters.lora.targets],
        "modules_to_save": _CLASSIFIER_MODULES if adapters.head else None,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def adapter_tensors(model: Decoder) -> dict[str, np.ndarray]:
    """The content of adapter_model.safetensors: the adapter of a model that is not merged."""
    (stack,) = model.stacks
    tensors: dict[str, np.ndarray] = {}
    for name in [name for name in vars(stack) if name.endswith("_lora_a")]:
        target = name.removesuffix("_lora_a")
        a_lir, b_lro = (
            np.asarray(whole(getattr(stack, f"{target}_lora_{which}")[...]), np.float32)
            for which in "ab"
        )
        layers, rank = b_lro.shape[:2]
        a_lir, b_lro = a_lir.reshape(layers, -1, rank), b_lro.reshape(layers, rank, -1)
        for layer in range(layers):
            module = _PREFIX + tensor_name(target, layer).removesuffix(".weight")
            tensors[f"{module}.lora_A.weight"] = np.ascontiguousarray(a_lir[layer].T)
            tensors[f"{module}.lora_B.weight"] = np.ascontiguousarray(b_lro[layer].T)
    if hasattr(model, "head"):
        tensors[f"{_PREFIX}score.weight"] = np.asarray(whole(model.head[...]), np.float32)[None]
    return tensors


def _module(name: str) -> str:
    """transformers' name of a projection, such as q_proj."""
    return tensor_name(name).removesuffix(".weight").rpartition(".")[2]


def _card(run: Config, base: str, *, classifier: bool) -> str:
    """The text of README.md."""
    auto, options = "AutoModelForCausalLM", ""
    if classifier:
        auto, options = "AutoModelForSequenceClassification", ", num_labels=1"
    return f"""---
base_model: {base}
library_name: peft
tags: [reward-model, gram_jax, lora]
---

# A reward model as a LoRA adapter

Matrices of rank {run.train.lora_rank} beside {", ".join(run.train.lora_targets)} of every block,
made with gram_jax {__version__}, objective `{run.objective.name}`.
`gram_config.json` says what the reward is.

## Use

```python
from peft import PeftModel
from transformers import {auto}

base = {auto}.from_pretrained({base!r}{options})
model = PeftModel.from_pretrained(base, "THIS_FOLDER")
```
"""
