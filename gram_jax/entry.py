"""What every entry point does around its main function."""

from __future__ import annotations

import logging
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from gram_jax import distributed
from gram_jax.config_rules import check_overrides
from gram_jax.errors import UserError
from gram_jax.help_text import help_text
from gram_jax.reporting import duration
from gram_jax.signals import Preempted

if TYPE_CHECKING:  # commands that do not train start quicker without the loop
    from gram_jax.loop import StageResult

# Here for the parser and for --helpfull; read by distributed.start, before there are values.
flags.DEFINE_string("coordinator", None, "HOST:PORT where process 0 of several listens.")
flags.DEFINE_integer("num_processes", None, "How many processes there are.")
flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")
flags.DEFINE_integer(
    "heartbeat_seconds",
    None,
    "Of several processes: one that gives no sign of life for so long is taken for lost, and ends"
    " the others. By default 30.",
)


def run(main: Callable[[list[str]], None], *, one_process: bool = False) -> None:
    """Joins the other processes if there are any, parses the flags, runs ``main(argv)`` and exits.

    Status 0: done. 2: a `UserError`, whose message is printed without a traceback. 75: main said
    so, having saved what it needs to go on. 76: no progress (see `watchdog`). 130: interrupted with
    Ctrl-C. Anything else that escapes is a defect, and keeps its traceback (1).

    Args:
      main: is run by every process.
      one_process: several would do the same work, and write the same files.
    """
    if {"--help", "-help", "-h", "-?"} & set(sys.argv[1:]):
        print(help_text(main.__globals__["__doc__"], sys.argv[0], one_process=one_process), end="")
        sys.exit(0)
    try:
        status = _run(main, one_process)
    except UserError as error:
        distributed.fail(2, f"error: {error}")
    except Preempted as stopped:
        distributed.fail(distributed.SAVED, str(stopped))
    except KeyboardInterrupt:
        distributed.fail(130, "interrupted")
    except Exception:
        if distributed.process_count() == 1:
            raise
        distributed.crash()
    if status not in (None, 0, distributed.SAVED):
        distributed.fail(status if isinstance(status, int) else 1, f"exit status {status}")
    distributed.finish()
    sys.exit(status)


def _run(main: Callable[[list[str]], None], one_process: bool) -> int | str | None:
    """Returns what main or absl gave to sys.exit."""
    distributed.start(sys.argv)
    if one_process and distributed.process_count() > 1:
        raise UserError(
            "this command is one process; start it without launch/local.sh or srun, or with"
            " JAX_NUM_PROCESSES=1"
        )
    _check_config_file(sys.argv[1:])
    check_overrides(sys.argv[1:])
    try:
        app.run(lambda argv: _main(main, argv), flags_parser=_parse_flags)
    except SystemExit as exit:
        return exit.code
    return None


def _parse_flags(arguments: list[str]) -> list[str]:
    try:
        return list(flags.FLAGS(arguments))
    except flags.Error as error:
        raise UserError(f"{error}; --help lists the flags") from None


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


def _main(main: Callable[[list[str]], None], argv: list[str]) -> None:
    # Orbax and others write dozens of INFO lines a checkpoint through absl.
    absl_logging.set_verbosity(absl_logging.WARNING)
    if len(argv) > 1:
        raise UserError(f"{argv[1]!r} is not a flag; flags are --name=value")
    # At level INFO it names each kind of device that is not here, which reads like a fault.
    logging.getLogger("jax._src.xla_bridge").setLevel(logging.WARNING)
    enable_compilation_cache()
    main(argv)


def enable_compilation_cache() -> None:
    """Keeps compiled functions in the user's cache folder, unless JAX was told another place.

    One folder per machine, as home folders are shared and compiled code for CPUs is not portable.
    Kept is what takes a tenth of a second to compile; JAX by itself keeps what takes a second,
    which of small models is hardly anything.
    """
    if jax.config.jax_compilation_cache_dir is not None:  # type: ignore[attr-defined]
        return
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(home) / "gram_jax" / "jax" / (platform.node() or "local")
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def define_config() -> Any:
    """The flag --config: a Python file whose get_config(arg) returns a Config."""
    return config_flags.DEFINE_config_file(
        "config",
        None,
        "Config file, as in configs/NAME.py or configs/NAME.py:ARGUMENT. Any setting in it can be"
        " given here too, as in --config.train.length=2000; docs/configs.md lists them.",
    )


def print_result(result: StageResult, workdir: str) -> None:
    """The last line of a stage."""
    if not distributed.is_main():
        return
    final = result.validation or result.metrics
    if not final:  # resumed after its last step
        print(f"complete already: {result.steps} steps; checkpoint {workdir}")
        return
    print(
        f"done: {result.steps} steps, {'validation ' if result.validation else ''}loss"
        f" {final['loss']:.4f}, {duration(result.seconds)}; checkpoint {workdir}"
    )
