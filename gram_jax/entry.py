"""What every entry point does around its main function."""

from __future__ import annotations

import logging
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from gram_jax.config import check_overrides
from gram_jax.errors import UserError
from gram_jax.loop import StageResult
from gram_jax.reporting import duration


def run(main: Callable[[list[str]], None]) -> None:
    """Parses the flags, runs ``main(argv)`` and exits.

    Status 0: done. 2: a `UserError`, whose message is printed without a traceback. 130: interrupted
    with Ctrl-C. Anything else that escapes is a defect, and keeps its traceback (1).
    """
    if "--help" in sys.argv[1:]:
        app.define_help_flags()
        app.usage(shorthelp=True, writeto_stdout=True, exitcode=0)
    try:
        _check_config_file(sys.argv[1:])
        check_overrides(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    app.run(lambda argv: _guarded(main, argv))


def _check_config_file(arguments: list[str]) -> None:
    """Where there is a flag --config, it must be given and name a file.

    Raises:
      UserError: says which is not so; config_flags would answer with a traceback.
    """
    if "config" not in flags.FLAGS or any(a.startswith(("--help", "-help")) for a in arguments):
        return
    following = [*arguments[1:], ""]
    for argument, next_argument in zip(arguments, following, strict=True):
        if argument.lstrip("-").partition("=")[0] == "config" and argument.startswith("-"):
            value = argument.partition("=")[2] if "=" in argument else next_argument
            path = value.partition(":")[0]
            if not Path(path).is_file():
                raise UserError(
                    f"--config={value}: there is no file {path!r}; name a Python file, as in"
                    " --config=configs/NAME.py:ARGUMENT"
                )
            return
    raise UserError("--config is missing; name a file, as in --config=configs/NAME.py:ARGUMENT")


def _guarded(main: Callable[[list[str]], None], argv: list[str]) -> None:
    try:
        # Orbax and others write dozens of INFO lines a checkpoint through absl.
        absl_logging.set_verbosity(absl_logging.WARNING)
        if len(argv) > 1:
            raise UserError(f"{argv[1]!r} is not a flag; flags are --name=value")
        # At level INFO it names each kind of device that is not here, which reads like a fault.
        logging.getLogger("jax._src.xla_bridge").setLevel(logging.WARNING)
        enable_compilation_cache()
        main(argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def enable_compilation_cache() -> None:
    """Keeps compiled functions in the user's cache folder, unless JAX was told another place.

    One folder per machine, as home folders are shared and compiled code for CPUs is not portable.
    """
    if jax.config.jax_compilation_cache_dir is not None:  # type: ignore[attr-defined]
        return
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(home) / "gram_jax" / "jax" / (platform.node() or "local")
    jax.config.update("jax_compilation_cache_dir", str(folder))


def define_config() -> Any:
    """The flag --config: a Python file whose get_config(arg) returns a Config."""
    return config_flags.DEFINE_config_file(
        "config", None, "Config file, as in configs/NAME.py or configs/NAME.py:ARGUMENT."
    )


def print_result(result: StageResult, workdir: str) -> None:
    """The last line of a stage."""
    final = result.validation or result.metrics
    if not final:  # resumed after its last step
        print(f"complete already: {result.steps} steps; checkpoint {workdir}")
        return
    print(
        f"done: {result.steps} steps, {'validation ' if result.validation else ''}loss"
        f" {final['loss']:.4f}, {duration(result.seconds)}; checkpoint {workdir}"
    )
