"""Small tokenizers that split and render as those of released families do, for ours and peers."""

import json

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from gram_jax.data.tokenizer import Tokenizer

# How Llama 3 and Qwen cut text into words before any merge.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Turns are stripped, as in Llama 3.
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{ message['content'] | trim + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# An empty think block before a given response; before a generation only where thinking is off.
# What stands before </think> in a response counts as reasoning.
QWEN3 = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\n' }}"
    "{%- if message.role == 'assistant' %}"
    "{%- set content = message.content.split('</think>')[-1].lstrip('\n') %}"
    "{%- if loop.last %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}{{- content }}"
    "{%- else %}{{- message.content }}{%- endif %}{{- '<|im_end|>\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}"
)
SPECIALS = {
    "llama3": [
        "<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>",
    ],
    "qwen3": ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"],
    "plain": ["<|begin_of_text|>", "<|eot_id|>"],
    "sentencepiece": ["<s>", "</s>"],
}  # fmt: skip
CHAT_TEMPLATES = {"llama3": LLAMA3, "qwen3": QWEN3, "plain": None, "sentencepiece": None}


def make(name, texts, size=700):
    """A tokenizer of the family `name`, trained on texts."""
    backend = (_sentencepiece if name == "sentencepiece" else _byte_level)(texts, size)
    specials = SPECIALS[name]
    # As in Qwen3, the think tags are tokens of their own, but not special.
    tags = [token for token in specials if "think" in token]
    backend.add_special_tokens([token for token in specials if token not in tags])
    backend.add_tokens(tags)
    bos, eos = specials[:2]
    config = {"eos_token": "<|im_end|>" if name == "qwen3" else eos}
    if name != "qwen3":
        config["bos_token"] = bos
        begin = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
        )
        # Llama 3 has this too, which leaves blanks out of the spans of tokens.
        trim = processors.ByteLevel(trim_offsets=True)
        backend.post_processor = processors.Sequence([trim, begin]) if name == "llama3" else begin
    return Tokenizer(backend.to_str(), config, CHAT_TEMPLATES[name], name)


def _byte_level(texts, size):
    """As Llama 3 and Qwen: bytes, words by a pattern, NFC."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    return backend


def _sentencepiece(texts, size):
    """As Llama 2: no words, so tokens merge across any border; unknown characters as bytes."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.BpeTrainer(vocab_size=size, max_token_length=8, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    content = json.loads(backend.to_str())
    vocabulary = content["model"]["vocab"]
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    content["model"]["byte_fallback"] = True
    content["normalizer"] = {
        "type": "Sequence",
        "normalizers": [{"type": "Prepend", "prepend": "▁"}, content["normalizer"]],
    }
    made = tokenizers.Tokenizer.from_str(json.dumps(content))
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return made
