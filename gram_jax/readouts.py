"""Readouts: from a row's hidden states to one score per sequence.

So far the likelihood: a sequence's score is the sum, or the per-token mean, of the log-probs of its
response's tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from gram_jax.logprobs import target_logprobs_and_logz
from gram_jax.models.decoder import Decoder
from gram_jax.rows import Batch


class TokenLogprobs(NamedTuple):
    """Per target slot, float32 [B, M]; unused slots hold finite numbers that mean nothing."""

    logprob: jax.Array
    logz: jax.Array


class SequenceScores(NamedTuple):
    """Per sequence number s (place s - 1), [B, S]; absent sequences hold 0 and count 0."""

    logprob: jax.Array  # float32: sum over the response's tokens
    num_tokens: jax.Array  # int32


def token_logprobs(model: Decoder, batch: Batch) -> TokenLogprobs:
    """log p(target given all before it) at each target slot."""
    hidden_btd = model(batch)
    hidden_bmd = jnp.take_along_axis(hidden_btd, batch.target_index[..., None], axis=1)
    logprob, logz = target_logprobs_and_logz(
        hidden_bmd, model.unembedding_vd(), batch.targets, chunk=model.compute.logprob_chunk
    )
    return TokenLogprobs(logprob, logz)


def likelihood(logprob_bm: jax.Array, sequence_ids_bm: jax.Array, sequences: int) -> SequenceScores:
    """s = sum_t log p(y_t given x, y_<t) of each sequence, and its number of tokens."""

    def per_row(logprob: jax.Array, ids: jax.Array) -> SequenceScores:
        used = ids != 0
        total = jax.ops.segment_sum(jnp.where(used, logprob, 0.0), ids, num_segments=sequences + 1)
        count = jax.ops.segment_sum(used.astype(jnp.int32), ids, num_segments=sequences + 1)
        return SequenceScores(total[1:], count[1:])

    return SequenceScores(*jax.vmap(per_row)(logprob_bm, sequence_ids_bm))
