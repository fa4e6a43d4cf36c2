"""The two losses, each with its equation. Every objective returns a sum and what to divide it by.

Sums and denominators are added over gradient accumulation and over devices, and divided once, so a
step's loss does not depend on how its rows were cut up.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from gram_jax.config import ObjectiveConfig
from gram_jax.models.decoder import Decoder
from gram_jax.readouts import Read, Readout, likelihood, read, token_loss
from gram_jax.rows import Batch

Metrics = dict[str, jax.Array]


def smoothed(target: jax.Array, label_smoothing: float) -> jax.Array:
    """The target when a label is wrong with probability e: t -> (1 - 2e) t + e.

    1 becomes 1 - e, 0 becomes e, a tie stays 0.5.
    """
    return (1 - 2 * label_smoothing) * target + label_smoothing


def pairwise_loss(difference: jax.Array, target: jax.Array) -> jax.Array:
    """-t log sig(D) - (1 - t) log sig(-D), elementwise.

    With t = 1 - e it is -log sig(D) + e D: the Bradley-Terry ranking loss plus a linear penalty on
    the margin. Its slope is sig(D) - t, its minimum lies at D* = log(t / (1 - t)), and there it
    equals the entropy of (t, 1 - t).
    """
    # softplus(D) = -log sig(-D), and softplus(D) - D = -log sig(D).
    return jax.nn.softplus(difference) - target * difference


def smoothing_floor(label_smoothing: float) -> float:
    """The lowest value that the smoothed pairwise loss can take, in nats per pair."""
    return -sum(p * math.log(p) for p in (label_smoothing, 1 - label_smoothing) if p > 0)


def best_difference(label_smoothing: float) -> float:
    """D* = log((1 - e) / e), where the smoothed pairwise loss is lowest."""
    return math.log((1 - label_smoothing) / label_smoothing) if label_smoothing else math.inf


def objective(
    model: Decoder, batch: Batch, config: ObjectiveConfig, readout: Readout | None
) -> tuple[jax.Array, tuple[jax.Array, Metrics]]:
    """A batch's loss as (sum, (denominator, sums of metrics)).

    Denominators: weighted tokens for next_token, weighted pairs for the others. Every metric is a
    sum, divided like the loss. ``tokens`` and ``pairs`` are counts and are not divided.
    ``readout`` is how sequences are scored; None for next_token, which scores none.
    """
    used = jnp.sum((batch.segment_ids != 0).astype(jnp.float32))
    if readout is None:
        total, nll = token_loss(model, batch, model(batch), config.z_loss)
        return total, (jnp.sum(batch.weights), {"loss": total, "nll": nll, "tokens": used})
    found = read(model, batch, readout, label_mass=config.name == "judge_full_vocab")
    total, denominator, metrics = preference_loss(found, batch, config)
    return total, (denominator, {**metrics, "tokens": used})


def preference_loss(
    found: Read, batch: Batch, config: ObjectiveConfig
) -> tuple[jax.Array, jax.Array, Metrics]:
    """Stage 2 on any readout: (sum over pairs, sum of pair weights, metric sums).

    ``smoothed_ce`` is (1 - e) CE(y_w) + e CE(y_l), the next-token loss with weights 1 - e and e on
    the two responses' tokens; it raises both likelihoods and is not a ranking loss by itself.
    The others are `pairwise_loss` on D = b (s_a - s_b) - m, m being the row's margin, in log-odds;
    ``smoothed_ce`` has none. The metrics ``accuracy`` and ``margin`` are of b (s_a - s_b): a pair
    is told right where the better response is ahead, by however little.
    For ``smoothed_pairwise``, s is the response's log-prob (less the reference model's, where there
    is one), summed or per token; for ``bradley_terry`` the head's number. For ``judge``, s_a is
    z_A - z_B of a judge prompt and s_b is 0, so the loss is the cross-entropy of the label over
    {A, B}; ``judge_full_vocab`` adds -log(p_A + p_B), so it is that over the whole vocabulary.
    ``centring`` = c adds c (s_a + s_b)^2. ``chosen_ce`` = g adds g times the mean cross-entropy of
    the response labelled better (for ``bradley_terry``, the text-generation regulariser).
    """
    scores = found.scores
    count = jnp.maximum(scores.num_tokens, 1)
    own = scores.score / count if config.average == "mean" else scores.score
    relative = own
    if batch.reference is not None:
        reference = batch.reference / count if config.average == "mean" else batch.reference
        relative = own - reference
    weight = batch.pair_weight
    # Unused slots are emptied before the loss as well as after: 0 times the slope at a NaN is NaN.
    used = weight != 0
    target = smoothed(jnp.where(used, batch.pair_target, 0.5), config.label_smoothing)

    def side(values_bs: jax.Array, numbers_bp: jax.Array) -> jax.Array:
        """The values of the sequences with these numbers; number 0, nothing, has value 0."""
        picked = jnp.take_along_axis(values_bs, jnp.maximum(numbers_bp - 1, 0), axis=1)
        return jnp.where(numbers_bp > 0, picked, 0.0)

    ahead = config.beta * (side(relative, batch.pair_a) - side(relative, batch.pair_b))
    ahead = jnp.where(used, ahead, 0.0)
    ranking = pairwise_loss(ahead - jnp.where(used, batch.pair_margin, 0.0), target)
    per_pair = ranking
    if config.name == "smoothed_ce":
        per_pair = -target * side(own, batch.pair_a) - (1 - target) * side(own, batch.pair_b)
    elif config.name == "judge_full_vocab":
        assert found.label_mass is not None
        per_pair = ranking - side(found.label_mass, batch.pair_a)
    if config.centring:
        both = side(own, batch.pair_a) + side(own, batch.pair_b)
        per_pair = per_pair + config.centring * jnp.square(jnp.where(used, both, 0.0))
    if config.chosen_ce:
        assert found.tokens is not None
        summed = likelihood(found.tokens.logprob, batch.sequence_ids, own.shape[1])
        per_token = summed.score / jnp.maximum(summed.num_tokens, 1)
        better = jnp.where(
            batch.pair_target >= 0.5, side(per_token, batch.pair_a), side(per_token, batch.pair_b)
        )
        per_pair = per_pair - config.chosen_ce * better
    # +1 where a is labelled better, -1 where b is, 0 for a tie: ties have no right answer.
    sign = jnp.sign(batch.pair_target - 0.5)
    right = jnp.where(ahead == 0, 0.5, (sign * ahead > 0).astype(jnp.float32))
    right = jnp.where(sign == 0, 0.5, right)

    def total(values: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(used, weight * values, 0.0))

    metrics = {
        "loss": total(per_pair),
        "ranking_loss": total(ranking),
        "accuracy": total(right),
        "margin": total(sign * ahead),
        "pairs": jnp.sum(used.astype(jnp.float32)),
    }
    return metrics["loss"], jnp.sum(weight), metrics
