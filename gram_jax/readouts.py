"""Readouts: from a row's hidden states to one score per sequence.

  likelihood  the sum of the log-probs of the response's tokens (the mean is taken later)
  judge       z_A - z_B at the judge prompt's last token: the log-odds of the two labels
  head        a linear head on the hidden state of the response's last token

The judge computes two columns of the unembedding at one position, the head one dot product; neither
meets the vocabulary. A judge that was exported as a classifier has a head for its two columns.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gram_jax.logprobs import next_token_loss, read_targets
from gram_jax.mesh import context_size, out_spec, split, whole
from gram_jax.models.decoder import Decoder
from gram_jax.rows import Batch
from gram_jax.stripes import at_places


@dataclasses.dataclass(frozen=True, slots=True)
class Readout:
    """How sequences are scored; a static argument of jitted functions.

    Attributes:
      reading: "likelihood", "judge" or "head".
      sequences: S, the most sequences that a row holds.
      labels: ids of the judge's labels, that of "the first is better" first.
    """

    reading: str
    sequences: int
    labels: tuple[int, int] | None = None


class TokenLogprobs(NamedTuple):
    """Per target slot, float32 [B, M]; unused slots hold finite numbers that mean nothing."""

    logprob: jax.Array
    logz: jax.Array
    likeliest: jax.Array | None = None  # bool: the model gives no token a higher probability


class SequenceScores(NamedTuple):
    """Per sequence number s (place s - 1), [B, S]; absent sequences hold 0 and count 0."""

    score: jax.Array  # float32: log-prob of the response; z_A - z_B; the head's number
    num_tokens: jax.Array  # int32: tokens that the score was added up over; 1 for judge and head


class Read(NamedTuple):
    """What an objective works on; what a readout does not give is None."""

    scores: SequenceScores
    tokens: TokenLogprobs | None  # where the rows have target slots
    label_mass: jax.Array | None  # judge: log(p_A + p_B) over the whole vocabulary, [B, S]


def token_logprobs(model: Decoder, batch: Batch, hidden_btd: jax.Array) -> TokenLogprobs:
    """log p(target given all before it) at each target slot, from the decoder's hidden states."""
    return _logprobs_at(model, hidden_btd, batch.target_index, batch.targets)


def token_loss(
    model: Decoder, batch: Batch, hidden_btd: jax.Array, z_loss: float
) -> tuple[jax.Array, jax.Array]:
    """The weighted sums of `next_token_loss` over a batch's targets."""
    hidden_bmd, targets_bm, weights_bm = _at_targets(
        hidden_btd, batch.target_index, batch.targets, batch.weights
    )
    return next_token_loss(
        hidden_bmd,
        model.unembedding_vd(),
        targets_bm,
        weights_bm,
        z_loss=z_loss,
        chunk=model.compute.logprob_chunk,
    )


def _logprobs_at(
    model: Decoder, hidden_btd: jax.Array, places_bm: jax.Array, targets_bm: jax.Array
) -> TokenLogprobs:
    """log p(target) from the hidden states at these places of the row."""
    slots = targets_bm.shape[1]
    hidden_bmd, targets_bm = _at_targets(hidden_btd, places_bm, targets_bm)
    found = read_targets(
        hidden_bmd, model.unembedding_vd(), targets_bm, chunk=model.compute.logprob_chunk
    )
    return TokenLogprobs(*(split(x, "B")[:, :slots] for x in found))


def _at_targets(
    hidden_btd: jax.Array, places_bm: jax.Array, *per_target: jax.Array
) -> tuple[jax.Array, ...]:
    """The hidden states at places of the row, [B, M, D], and what belongs to them, [B, M] each.

    Each device of ``context`` takes as many slots; those that are added for that hold zeros.
    """
    pad = ((0, 0), (0, -places_bm.shape[1] % context_size()))
    hidden_bmd = at_places(hidden_btd, jnp.pad(places_bm, pad), "BMD")
    return hidden_bmd, *(split(jnp.pad(x, pad), "BM") for x in per_target)


def read(model: Decoder, batch: Batch, readout: Readout, *, label_mass: bool = False) -> Read:
    """Scores of the sequences of B rows, and the log-probs of their targets if they have slots.

    ``label_mass``: also the judge's log(p_A + p_B), which takes the whole vocabulary at the places
    that are read.
    """
    hidden_btd = model(batch)
    tokens = None if batch.targets is None else token_logprobs(model, batch, hidden_btd)
    if readout.reading == "likelihood":
        if tokens is None:
            raise ValueError("these rows have no targets, so responses have no log-probs")
        scores = likelihood(tokens.logprob, batch.sequence_ids, readout.sequences)
        return Read(scores, tokens, None)
    hidden_bsd = at_places(hidden_btd, batch.readout_index, "BSD")
    if readout.reading == "head" or not model.config.has_unembedding:
        # The head of a judge that became a classifier is the difference of its labels' columns.
        score_bs = head_scores(hidden_bsd, model.head[...])
        return Read(_present(score_bs, batch), tokens, None)
    assert readout.labels is not None
    logits_bsl = label_logits(hidden_bsd, model.unembedding_vd(), readout.labels)
    mass_bs = None
    if label_mass:
        first = jnp.full_like(batch.readout_index, readout.labels[0])
        logz_bs = _logprobs_at(model, hidden_btd, batch.readout_index, first).logz
        mass_bs = jax.nn.logsumexp(logits_bsl, axis=-1) - logz_bs
    return Read(_present(logits_bsl[..., 0] - logits_bsl[..., 1], batch), tokens, mass_bs)


def likelihood(logprob_bm: jax.Array, sequence_ids_bm: jax.Array, sequences: int) -> SequenceScores:
    """s = sum_t log p(y_t given x, y_<t) of each sequence, and its number of tokens."""

    def per_row(logprob: jax.Array, ids: jax.Array) -> SequenceScores:
        used = ids != 0
        total = jax.ops.segment_sum(jnp.where(used, logprob, 0.0), ids, num_segments=sequences + 1)
        count = jax.ops.segment_sum(used.astype(jnp.int32), ids, num_segments=sequences + 1)
        return SequenceScores(total[1:], count[1:])

    return SequenceScores(*jax.vmap(per_row)(logprob_bm, sequence_ids_bm))


def label_logits(
    hidden_bsd: jax.Array, unembedding_vd: jax.Array, labels: tuple[int, int]
) -> jax.Array:
    """Logits of the two labels, float32 [B, S, 2]: two columns of the unembedding, not V.

    The labels' logits, not the orders', are what a softmax compares (method: judge).
    """
    ids = jnp.array(labels, jnp.int32)
    rows_ld = unembedding_vd.at[ids].get(out_sharding=out_spec("LD"))
    rows_ld = whole(rows_ld).astype(hidden_bsd.dtype)
    return jnp.einsum("bsd,ld->bsl", hidden_bsd, rows_ld, preferred_element_type=jnp.float32)


def head_scores(hidden_bsd: jax.Array, head_d: jax.Array) -> jax.Array:
    """s = <h, w> of each read place, float32 [B, S]."""
    return jnp.einsum(
        "bsd,d->bs", hidden_bsd, head_d.astype(hidden_bsd.dtype), preferred_element_type=jnp.float32
    )


def _present(score_bs: jax.Array, batch: Batch) -> SequenceScores:
    """Scores of the sequences that are there; place 0 is never the last token of one."""
    there = batch.readout_index != 0
    return SequenceScores(jnp.where(there, score_bs, 0.0), there.astype(jnp.int32))
