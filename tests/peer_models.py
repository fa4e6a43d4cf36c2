"""Random tiny models of every family, made and saved by transformers: what ours must agree with."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import tokenizers
import torch
import transformers
from safetensors import safe_open
from safetensors.numpy import load_file
from tokenizers import models, pre_tokenizers

from gram_jax.data.tokenizer import Tokenizer

PEERS = Path(sys.prefix) / "peers" / "transformers-4.57"
INSTALL_457 = (
    f"{sys.executable} -m pip install --no-deps --target {PEERS} transformers==4.57.6"
    " huggingface-hub==0.36.0 tokenizers==0.22.1 requests==2.32.5 urllib3==2.5.0"
    " charset-normalizer==3.4.4 certifi==2026.10.18"
)
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


def build(family, changes, seed=0, kind="CausalLM"):
    """A random model; norms and biases too, and weights large enough for attention to be sharp."""
    config = getattr(transformers, f"{family}Config")(**BASE | changes)
    model = getattr(transformers, f"{family}For{kind}")(config).eval()
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


def differences_457(saved, parent):
    """The report of peer_457.py: the largest difference of each folder in ``parent``, by name."""
    assert PEERS.is_dir(), f"transformers 4.57 is not installed beside the other:\n{INSTALL_457}"
    script = Path(__file__).parent / "peer_457.py"
    result = subprocess.run(
        [sys.executable, script, saved, parent],
        env=os.environ | {"PYTHONPATH": str(PEERS)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["version"].startswith("4.57.")
    return report["differences"]


def tensors(folder):
    """Every tensor of a folder, over all its files."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="numpy") as file:
            assert file.metadata() == {"format": "pt"}
        found |= load_file(path)
    return found


def assert_same_tensors(one, other):
    ours, theirs = tensors(one), tensors(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert tensor.tobytes() == theirs[name].tobytes(), name


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
