"""Random tiny models of every family, made and saved by transformers: what ours must agree with."""

import json
from pathlib import Path

import numpy as np
import tokenizers
import torch
import transformers
from tokenizers import models, pre_tokenizers

from gram_jax.data.tokenizer import Tokenizer

VOCAB, LENGTH = 96, 48
BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# Wide heads and a short original context, so that the scaling of frequencies shows in the logits.
LONG = {"head_dim": 16, "num_hidden_layers": 1}
STRETCH = {"factor": 4.0, "original_max_position_embeddings": 16}
CASES = {
    "llama": ("Llama", {"rms_norm_eps": 1e-5}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True, "rope_theta": 500.0}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-llama3": (
        "Llama",
        LONG
        | {
            "rope_theta": 500.0,
            "rope_scaling": STRETCH
            | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        },
    ),
    "llama-linear": ("Llama", LONG | {"rope_scaling": {"rope_type": "linear", "factor": 3.0}}),
    "llama-yarn": (
        "Llama",
        LONG | {"rope_theta": 100.0, "rope_scaling": STRETCH | {"rope_type": "yarn"}},
    ),
    "mistral-window": ("Mistral", {"sliding_window": 7, "head_dim": 16}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-windows": (
        "Qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 1,
            "num_hidden_layers": 3,
        },
    ),
    "qwen3-tied": ("Qwen3", {"tie_word_embeddings": True, "head_dim": 16}),
    "qwen3-windows": (
        "Qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 6,
            "head_dim": 8,
            "attention_bias": True,
            "num_hidden_layers": 3,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        },
    ),
}


def make(name, folder):
    """The model of this name (in eval mode, float32) and the folder that it is saved in."""
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    model = build(*CASES[name], seed=sorted(CASES).index(name))
    model.save_pretrained(folder)
    tokenizer().save(folder)
    return model, Path(folder)


def build(family, changes, seed=0):
    """A random model; norms and biases too, and weights large enough for attention to be sharp."""
    config = getattr(transformers, f"{family}Config")(**BASE | changes)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(seed)
    for key, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        weight.data = 1 + 0.2 * noise if key.endswith("norm.weight") else 0.25 * noise
    model.tie_weights()
    return model


def logits(model, tokens):
    """float32 [B, T, V] of token ids [B, T]."""
    with torch.inference_mode():
        return model(torch.tensor(np.asarray(tokens))).logits.float().numpy()


def load(folder):
    """The folder's model as transformers reads it, in float32."""
    auto = transformers.AutoModelForCausalLM
    return auto.from_pretrained(folder, dtype=torch.float32).eval()


def tokenizer(size=VOCAB):
    """One word per id: <pad> <s> </s> w3 w4 ..."""
    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, size))]
    backend = tokenizers.Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(words[:3])
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return Tokenizer(backend.to_str(), names, "{{ messages[0].content }}", "the test's tokenizer")


def edit_json(path, **changes):
    """Changes fields of a JSON file; None removes."""
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
