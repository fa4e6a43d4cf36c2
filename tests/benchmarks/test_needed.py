"""The yardstick of the benchmarks' tables, counted by hand."""

import pytest

from benchmarks import needed
from gram_jax.config import ModelConfig

CONFIG = ModelConfig(
    vocab_size=50,
    hidden_size=8,
    num_layers=3,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    intermediate_size=16,
)
# q and o of [8, 8], k and v of [8, 4], three of [8, 16], in three layers.
WEIGHTS = 3 * (2 * 64 + 2 * 32 + 3 * 128)


def attention(keys):
    """Scores and sums over keys: 2 products, 2 operations, 2 heads of 4, 3 layers."""
    return 2 * 2 * 2 * 4 * 3 * keys


def test_a_text_needs_its_weights_its_attention_and_its_logits():
    found = needed.once_a_prompt(CONFIG, [(0, [10])], "all")
    assert found == 2 * WEIGHTS * 10 + attention(50) + 2 * 8 * 50 * 10


def test_a_training_step_of_text_is_what_the_model_says_of_its_tokens():
    found = needed.BACKWARD * needed.once_a_prompt(CONFIG, [(0, [10])] * 4, "all")
    assert found == pytest.approx(3 * CONFIG.flops_per_token(10) * 40)


def test_a_prompt_for_several_responses_is_counted_once_and_seen_by_all():
    once = needed.once_a_prompt(CONFIG, [(20, [4, 6])], "responses")
    keys = 200 + (20 * 4 + 8) + (20 * 6 + 18)
    assert once == 2 * WEIGHTS * 30 + attention(keys) + 2 * 8 * 50 * 10
    twice = needed.once_a_response(CONFIG, [(20, [4, 6])], "responses")
    assert twice == once + 2 * WEIGHTS * 20 + attention(200)


def test_logits_are_counted_where_they_are_taken():
    groups = [(20, [4, 6]), (5, [3])]
    none, own, of_all = (
        needed.once_a_prompt(CONFIG, groups, x) for x in ("none", "responses", "all")
    )
    assert own - none == 2 * 8 * 50 * 13
    assert of_all - none == 2 * 8 * 50 * 38
