"""What --help prints: what a command is for, then every flag that it reads, those needed first.

absl lists the flags that the main module defines, which leaves out those that commands share.
"""

from __future__ import annotations

import dataclasses
import textwrap
from typing import Any

from absl import flags

WIDTH = 100


@dataclasses.dataclass(frozen=True)
class FlagText:
    """One flag as people read it.

    Attributes:
      name: as it is written, `--input` or `--[no]chat`.
      values: what it takes and holds by default, or `required`; "" where there is nothing to say.
      meaning: a few sentences.
    """

    name: str
    values: str
    meaning: str


def command_flags(main: str, *, one_process: bool = False) -> list[FlagText]:
    """The flags of a command: those needed, its own, then those it shares with other commands.

    Args:
      main: the name under which absl knows the command's module: `gram_jax.score`, or the path of
        the file where it is run.
      one_process: the command is never one of several processes, whose flags are then left out.
    """
    by_module = flags.FLAGS.flags_by_module_dict()
    own = by_module.get(main, [])
    shared: list[Any] = []
    processes: list[Any] = []
    for module, found in by_module.items():
        if module == main or not module.startswith("gram_jax."):
            continue
        # The flag of a config is defined by the same module as those of several processes.
        config = [flag for flag in found if flag.name == "config"]
        rest = [flag for flag in found if flag.name != "config"]
        shared += config
        (processes if module == "gram_jax.entry" else shared).extend(rest)
    needed = [flag for flag in (*shared, *own) if _required(flag)]
    others = [flag for flag in (*own, *shared) if not _required(flag)]
    listed = [*needed, *others, *([] if one_process else processes)]
    return [FlagText(_name(flag), _values(flag), _meaning(flag)) for flag in listed]


def help_text(doc: str, main: str, *, one_process: bool = False) -> str:
    """All of --help: the command's docstring and its flags, in lines of at most `WIDTH`."""
    lines = [doc.strip(), "", "flags:"]
    for flag in command_flags(main, one_process=one_process):
        lines += ["", f"  {flag.name}" + (f"  ({flag.values})" if flag.values else "")]
        lines += textwrap.wrap(
            flag.meaning,
            WIDTH,
            initial_indent=" " * 6,
            subsequent_indent=" " * 6,
            break_long_words=False,
            break_on_hyphens=False,
        )
    return "\n".join(lines) + "\n"


def _required(flag: Any) -> bool:
    # A config is asked for by entry.py, as config_flags answers with a traceback.
    missing = (getattr(validator, "message", "") for validator in flag.validators)
    return flag.name == "config" or any("other than None" in message for message in missing)


def _name(flag: Any) -> str:
    return f"--[no]{flag.name}" if flag.boolean else f"--{flag.name}"


def _meaning(flag: Any) -> str:
    text = " ".join(flag.help.split())
    # absl puts an enumeration's values, which stand beside the name here, before its help.
    values = "|".join(flag.parser.enum_values) if isinstance(flag.parser, flags.EnumParser) else ""
    return text.removeprefix(f"<{values}>: ")


def _values(flag: Any) -> str:
    if _required(flag):
        return "required"
    parts = []
    if isinstance(flag.parser, flags.EnumParser):
        parts.append("|".join(flag.parser.enum_values))
    elif isinstance(flag.parser, flags.IntegerParser):
        parts.append("integer")
    elif isinstance(flag.parser, flags.FloatParser):
        parts.append("number")
    elif isinstance(flag.parser, flags.ListParser):
        parts.append("comma separated")
    if flag.boolean:
        parts += [] if flag.default is None else [f"default: {'yes' if flag.default else 'no'}"]
    elif flag.default not in (None, "", []):
        shown = f"{flag.default:g}" if isinstance(flag.default, float) else flag.default
        parts.append(f"default: {shown}")
    return "; ".join(parts)
