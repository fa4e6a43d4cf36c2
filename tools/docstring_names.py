"""For the site's API pages: `a, b: meaning` in a docstring is an entry for a and one for b.

Docstrings here name together what has one meaning; mkdocstrings looks up each name's type, and
warns of names that no parameter has. A griffe extension (mkdocs.yml).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import griffe

_SECTION = re.compile(r"(Args|Attributes):$")
_NAMES = re.compile(r"(\w+(?:, \w+)+): ")


class SeparateNames(griffe.Extension):
    """Splits the entries as objects are read."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = separate_names(obj.docstring.value)


def separate_names(docstring: str) -> str:
    """The docstring with one name an entry."""
    return "\n".join(line for entry in _entries(docstring.split("\n")) for line in entry)


def _entries(lines: list[str]) -> Iterator[list[str]]:
    """Entries, repeated for each of their names; any other line by itself."""
    in_section, place = False, 0
    of_names = 0  # the indentation at which names stand in this section
    while place < len(lines):
        line, end = lines[place], place + 1
        indent = len(line) - len(line.lstrip())
        if line.strip() and indent == 0:
            in_section, of_names = bool(_SECTION.match(line)), 0
        elif in_section and not of_names:
            of_names = indent
        found = _NAMES.match(line.lstrip()) if in_section and indent == of_names > 0 else None
        if found is None:
            yield [line]
            place = end
            continue
        while end < len(lines) and lines[end].startswith(" " * (indent + 1)):
            end += 1
        for name in found[1].split(", "):
            first = f"{' ' * indent}{name}: {line.lstrip()[found.end() :]}"
            yield [first, *lines[place + 1 : end]]
        place = end
