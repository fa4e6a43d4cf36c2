"""A reward model behind HTTP: `python -m gram_jax.serve`."""
