"""No array of logits over all targets and the whole vocabulary, as the compiled steps say it."""

import dataclasses
import functools
import itertools

import jax
import numpy as np
import tiny

from benchmarks.step_memory import (
    abstract_batch,
    scoring_bytes,
    share_of_logits,
    temporary_bytes,
    training_bytes,
)
from gram_jax.logprobs import reference_logprobs
from gram_jax.models.decoder import abstract_decoder
from gram_jax.scoring import scoring_shape

# Large enough for logits to outweigh all else, were they there: 64 MiB of a step's few.
SIZES = list(itertools.product((1024, 8192), (128, 256)))
ROWS = 8
MODEL = tiny.config(num_layers=1, max_position=512)


@functools.cache
def compiled_bytes(vocab_size, tokens):
    """[B, M, V] in float32, the scoring step and the training step."""
    config, shape = dataclasses.replace(MODEL, vocab_size=vocab_size), scoring_shape(tokens)
    logits = 4 * ROWS * shape.targets * vocab_size
    return logits, scoring_bytes(config, shape, ROWS), training_bytes(config, tokens, ROWS)


def test_no_step_holds_the_logits_of_all_targets():
    logits, *steps = compiled_bytes(8192, 256)
    assert max(steps) < logits
    little, targets, words, both = (np.array(compiled_bytes(*size)) for size in SIZES)
    for share in share_of_logits(little, words, targets, both):
        assert abs(share) < 0.02


def test_scoring_needs_no_more_for_a_larger_vocabulary_than_a_chunk_of_logits():
    (_, few, _), (_, many, _) = compiled_bytes(1024, 256), compiled_bytes(8192, 256)
    assert many - few <= 4 * 256 * (8192 - 1024)


def test_training_needs_no_more_for_a_larger_vocabulary_than_a_few_copies_of_its_weights():
    (_, _, few), (_, _, many) = compiled_bytes(1024, 256), compiled_bytes(8192, 256)
    grown = 4 * MODEL.hidden_size * (8192 - 1024)
    chunk = 4 * 256 * (8192 - 1024)
    # A chunk's logits and their gradient; those of both matrices, and what the optimizer makes.
    assert many - few <= 2 * chunk + 4 * grown


def test_an_array_of_all_logits_would_be_seen():
    @jax.jit
    def step(model, batch):
        return reference_logprobs(model(batch), model.unembedding_vd(), batch.targets)

    def measured(vocab_size, tokens):
        config = dataclasses.replace(MODEL, vocab_size=vocab_size)
        model = abstract_decoder(config, tiny.COMPUTE)
        shape = scoring_shape(tokens)
        compiled = step.lower(model, abstract_batch(shape, (ROWS,))).compile()
        return np.array([4 * ROWS * tokens * vocab_size, temporary_bytes(compiled)])

    little, targets, words, both = (measured(*size) for size in SIZES)
    (share,) = share_of_logits(little, words, targets, both)
    assert share > 0.9
