"""How many operations a computation needs: the yardstick beside the time that it took.

Matrix products only, a multiply-add being two: projections, attention over the keys that a token
may see, the unembedding at the positions whose logits are taken. Padding needs none, so the share
of the peak falls with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from gram_jax.config import ModelConfig

Logits = Literal["all", "responses", "none"]
"""The positions whose logits are taken; a judge's two columns count as none."""

BACKWARD = 3
"""A training step needs so many times what its forward pass does."""


def once_a_prompt(
    config: ModelConfig, groups: Iterable[tuple[int, Sequence[int]]], logits: Logits
) -> float:
    """FLOPs forward of prompts that are computed once for all of their responses.

    Args:
      groups: tokens of a prompt, and of each response to it.
    """
    return sum(_group(config, prompt, responses, logits) for prompt, responses in groups)


def once_a_response(
    config: ModelConfig, groups: Iterable[tuple[int, Sequence[int]]], logits: Logits
) -> float:
    """The same where each response is computed with its prompt."""
    each = ((prompt, [response]) for prompt, responses in groups for response in responses)
    return once_a_prompt(config, each, logits)


def _group(config: ModelConfig, prompt: int, responses: Sequence[int], logits: Logits) -> float:
    tokens = prompt + sum(responses)
    # A token sees half of its own part on average, and a response all of the prompt.
    keys = prompt**2 / 2 + sum(prompt * response + response**2 / 2 for response in responses)
    targets = {"all": tokens, "responses": sum(responses), "none": 0}[logits]
    attention = 4 * config.num_layers * config.num_heads * config.head_dim * keys
    weights = config.flops_per_token(0, targets_per_token=0.0) * tokens
    return weights + attention + 2 * config.hidden_size * config.vocab_size * targets
