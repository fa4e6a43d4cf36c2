"""The models that are measured: Llama shapes with random weights, as Hugging Face folders.

Both sides load the same folder. Weights are large enough for attention and predictions to differ
from token to token: with the usual small ones every token would have a log-prob of about -log V,
and equal numbers would show nothing.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from gram_jax.config import ModelConfig
from gram_jax.data.tokenizer import Tokenizer
from gram_jax.models.families import config_values, tensor_name, tensor_shapes

SHAPES = {
    "56M": ModelConfig(
        vocab_size=32000,
        hidden_size=512,
        num_layers=8,
        num_heads=8,
        num_kv_heads=4,
        head_dim=64,
        intermediate_size=1408,
    ),
    "301M": ModelConfig(
        vocab_size=32000,
        hidden_size=1024,
        num_layers=20,
        num_heads=16,
        num_kv_heads=8,
        head_dim=64,
        intermediate_size=2816,
    ),
    # For trying out whether a benchmark runs.
    "tiny": ModelConfig(
        vocab_size=512,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        intermediate_size=64,
    ),
}
"""By number of parameters."""

_LOGITS, _INSIDE = 1.8, 1.0
"""Standard deviation of a logit, and of a projection of a normalised hidden state. With larger ones
inside, a random model amplifies float32 rounding as no trained one does."""


def write_model(folder: Path, config: ModelConfig, tokenizer: Tokenizer, seed: int = 0) -> None:
    """Writes a model with random weights and its tokenizer; the same seed gives the same bytes."""
    tokenizer.save(folder)
    ends = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    values = {**config_values(config), **ends, "pad_token_id": tokenizer.pad_id}
    (folder / "config.json").write_text(json.dumps(values, indent=2), encoding="utf-8")
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in tensor_shapes(config).items():
        weight = rng.standard_normal(shape, np.float32)
        if len(shape) == 1:  # a norm's
            tensors[name] = 1 + np.float32(0.1) * weight
        elif name == tensor_name("embedding"):
            tensors[name] = weight
        else:
            spread = _LOGITS if name == tensor_name("unembedding") else _INSIDE
            tensors[name] = np.float32(spread / np.sqrt(shape[-1])) * weight
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
