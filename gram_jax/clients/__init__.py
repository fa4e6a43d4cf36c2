"""What other libraries call: a reward function for trainers, a model for lm-evaluation-harness.

`docs/clients.md` shows each with its library.
"""

from gram_jax.clients.reward_function import RewardFunction, reward_function

__all__ = ["RewardFunction", "reward_function"]
