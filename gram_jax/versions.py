"""Versions of what decides a run's numbers."""

from __future__ import annotations

import platform
from importlib.metadata import version

from gram_jax import __version__

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tokenizers", "numpy")


def versions() -> dict[str, str]:
    """Name and version of each, ours and Python's among them."""
    return {
        "gram_jax": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in _PACKAGES},
    }
