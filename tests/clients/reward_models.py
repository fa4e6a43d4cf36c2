"""Small random reward models for clients to call, and the texts they are asked about."""

import peer_models
import peer_tokenizers

from gram_jax.data.builtin import reference_topics

TEXTS = [" ".join(topic.text.split()) for topic in reference_topics()][:60]
PROMPTS = [text[:80] for text in TEXTS[:6]]
RESPONSES = [[text[i : i + 30 + 7 * i] for i in (80, 101, 130)] for text in TEXTS[:6]]
REFERENCES = [text[80:140] for text in TEXTS[10:16]]


def make(folder, kind="CausalLM", family="llama3", seed=5, **changes):
    """A Hugging Face folder with a random model, a byte-level tokenizer and a chat template."""
    tokenizer = peer_tokenizers.make(family, TEXTS)
    sizes = {
        "vocab_size": tokenizer.vocab_size,
        "max_position_embeddings": 2048,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.eos_id,
    }
    if kind == "SequenceClassification":
        # Padding that ends no response, as an export of ours has it.
        sizes |= {"num_labels": 1, "pad_token_id": tokenizer.bos_id}
    model = peer_models.build("Llama", sizes | changes, seed=seed, kind=kind)
    # Sharp enough to have an opinion, and not so sharp that each opinion is certain.
    for name, weight in model.named_parameters():
        if not name.endswith("norm.weight"):
            weight.data *= 0.6
    model.save_pretrained(folder)
    tokenizer.save(folder)
    return folder


def messages(text):
    return [{"role": "user", "content": text}]


def answer(text):
    return [{"role": "assistant", "content": text}]
