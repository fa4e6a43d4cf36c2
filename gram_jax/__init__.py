"""gram_jax: generative foundation reward models in JAX.

Pretrain a decoder on unlabelled data, fine-tune it on preference pairs with a label-smoothed
ranking loss, and read rewards from its likelihoods.
"""

__version__ = "0.1.0"
