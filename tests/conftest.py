"""What holds for all tests: the CPU as eight devices, compiled functions kept between runs."""

import functools
import os
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gram_jax" / "jax"
jax.config.update("jax_compilation_cache_dir", str(_CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)

# Helper modules of the tests (peer_models.py) lie beside this file.
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def peer_model(tmp_path_factory):
    """``peer_model(name)``: a random transformers model of that name, and its folder; made once."""
    import peer_models

    root = tmp_path_factory.mktemp("peers")
    return functools.cache(lambda name: peer_models.make(name, root / name))
