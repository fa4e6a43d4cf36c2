"""Text that every installation has: the docstrings of Python packages, and Python's own reference.

Docstrings are read from source files with `ast`; no package is imported. What is there differs with
the installed versions, but on one machine the result is always the same, in the same order.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias

IN_DISTRIBUTION = ("numpy", "scipy", "jax")
"""Packages that, with the standard library, the quickstart trains on."""

OUT_OF_DISTRIBUTION = (
    "flax", "optax", "orbax", "grain", "ml_collections", "matplotlib", "absl", "etils",
    "tensorboardX", "treescope", "jinja2", "tqdm", "PIL", "fontTools",
)  # fmt: skip
"""Packages that training never sees; those that are not installed are passed over."""

_SKIPPED_FOLDERS = frozenset(
    {
        "__pycache__", "_bundled", "_vendor", "_vendored", "conftest", "extern", "idle_test",
        "idlelib", "lib2to3", "site-packages", "test", "testing", "tests", "turtledemo", "vendor",
    }
)  # fmt: skip
_BYTES_PER_PACKAGE = 16_000_000
_SHORTEST_TEXT = 60
_LONGEST_SIGNATURE = 160
_BOILERPLATE = re.compile(
    r"copyright|licen[sc]ed? under|all rights reserved|without warrant|@generated|lorem ipsum",
    re.IGNORECASE,
)
_NO_LETTER = re.compile(r"[^A-Za-z\s]")

_Function: TypeAlias = ast.FunctionDef | ast.AsyncFunctionDef


class Docstring(NamedTuple):
    """One documented object.

    Attributes:
      package: top-level package, such as `scipy`; `stdlib` for the standard library.
      qualified_name: dotted name, such as `scipy.stats.norm.fit`.
      signature: its parameters, such as `(data, loc=0)`; without self and cls.
      text: the docstring with its indentation removed.
    """

    package: str
    qualified_name: str
    signature: str
    text: str


class Docstrings(NamedTuple):
    """What was read, and the number of files that could not be."""

    docstrings: list[Docstring]
    unreadable_files: int


def standard_library_docstrings() -> Docstrings:
    """Reads the docstrings of the standard library's Python modules."""
    return _read_folder(Path(sysconfig.get_path("stdlib")), "stdlib", "")


def package_docstrings(names: Iterable[str]) -> Docstrings:
    """Reads the docstrings of installed packages; a name that is not installed gives none.

    Args:
      names: top-level import names, such as `scipy`.
    """
    docstrings: list[Docstring] = []
    unreadable = 0
    for name in names:
        spec = importlib.util.find_spec(name)
        for folder in sorted(spec.submodule_search_locations or ()) if spec else ():
            read = _read_folder(Path(folder), name, name)
            docstrings += read.docstrings
            unreadable += read.unreadable_files
    return Docstrings(distinct(docstrings), unreadable)


def reference_topics() -> list[Docstring]:
    """Returns the topics of Python's language reference, as `help("assert")` would show them."""
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions of Python leave the documentation out
        return []
    return [
        Docstring("python", f"python.{name}", "", inspect.cleandoc(text))
        for name, text in sorted(topics.items())
    ]


def distinct(docstrings: Iterable[Docstring], seen: Iterable[Docstring] = ()) -> list[Docstring]:
    """Drops docstrings whose text, or whose beginning, is that of an earlier one or one in `seen`.

    Compared are the first letters and digits alone, in lower case: inherited docstrings and those
    that differ in a closing example count as the same. Of several objects with one qualified name
    (a property and its setter, the branches of an `if`) the first stays.
    """
    texts = {_normalised(docstring.text) for docstring in seen}
    names: set[str] = set()
    kept = []
    for docstring in docstrings:
        key = _normalised(docstring.text)
        if key not in texts and docstring.qualified_name not in names:
            texts.add(key)
            names.add(docstring.qualified_name)
            kept.append(docstring)
    return kept


def sizes(docstrings: Iterable[Docstring]) -> dict[str, tuple[int, int]]:
    """Returns {package: (docstrings, characters)}, by name."""
    count: Counter[str] = Counter()
    characters: Counter[str] = Counter()
    for docstring in docstrings:
        count[docstring.package] += 1
        characters[docstring.package] += len(docstring.text)
    return {package: (count[package], characters[package]) for package in sorted(count)}


def _read_folder(root: Path, package: str, dotted: str) -> Docstrings:
    found: list[Docstring] = []
    unreadable = 0
    budget = _BYTES_PER_PACKAGE
    for path in _source_files(root):
        try:
            source = path.read_bytes()
            budget -= len(source)
            if budget < 0:
                break
            if b'"""' not in source and b"'''" not in source:
                continue
            tree = ast.parse(source)
        except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
            unreadable += 1
            continue
        parts = [*dotted.split("."), *path.relative_to(root).with_suffix("").parts]
        # Private modules define most public objects of numpy and jax: the path leaves them out.
        name = ".".join(part for part in parts if part and not part.startswith("_"))
        found += _documented(tree.body, name, package)
    return Docstrings(distinct(found), unreadable)


def _source_files(root: Path) -> Iterator[Path]:
    try:
        entries = sorted(root.iterdir())
    except OSError:
        return
    for entry in entries:
        if entry.suffix == ".py" and not re.match(r"test_|conftest|.*_test\.py$", entry.name):
            yield entry
    for entry in entries:
        if entry.is_dir() and entry.name.isidentifier() and entry.name not in _SKIPPED_FOLDERS:
            yield from _source_files(entry)


def _documented(body: Sequence[ast.stmt], prefix: str, package: str) -> Iterator[Docstring]:
    """Walks public functions, classes and methods; a name defined in a branch counts too."""
    for node in body:
        if isinstance(node, ast.If | ast.Try):
            yield from _documented(node.body, prefix, package)
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        if node.name.startswith("_"):
            continue
        name = f"{prefix}.{node.name}" if prefix else node.name
        text = ast.get_docstring(node)
        if text is not None and _is_good_text(text):
            yield Docstring(package, name, _signature(node), _tidy(text))
        if isinstance(node, ast.ClassDef):
            yield from _documented(node.body, name, package)


def _is_good_text(text: str) -> bool:
    if len(text) < _SHORTEST_TEXT or _BOILERPLATE.search(text):
        return False
    head = text[:1000]
    ascii_share = len(head.encode("ascii", "ignore")) / len(head)
    letter_share = 1 - len(_NO_LETTER.findall(head)) / len(head)
    return ascii_share > 0.97 and letter_share > 0.7 and len(head.split()) >= 8


def _tidy(text: str) -> str:
    """Removes what carries nothing: trailing blanks, tabs, runs of empty lines."""
    lines = "\n".join(line.rstrip() for line in text.expandtabs().split("\n"))
    return re.sub(r"\n{3,}", "\n\n", lines).strip()


def _normalised(text: str) -> str:
    return re.sub(r"[\W_]+", "", text[:400].lower())[:120]


def _signature(node: _Function | ast.ClassDef) -> str:
    """The parameters as source: with annotations if short, else without, else names alone."""
    function = _constructor(node) if isinstance(node, ast.ClassDef) else node
    if function is None:
        return "()"
    arguments = _without_self(function.args)
    full = f"({ast.unparse(arguments)})"
    if len(full) <= _LONGEST_SIGNATURE // 2:
        return full
    for argument in _all_arguments(arguments):
        argument.annotation = None
    plain = f"({ast.unparse(arguments)})"
    if len(plain) <= _LONGEST_SIGNATURE:
        return plain
    names = [argument.arg for argument in _all_arguments(arguments)]
    if len(", ".join(names)) > _LONGEST_SIGNATURE - 2:
        while names and len(", ".join([*names, "..."])) > _LONGEST_SIGNATURE - 2:
            names.pop()
        names.append("...")
    return f"({', '.join(names)})"


def _constructor(node: ast.ClassDef) -> _Function | None:
    for statement in node.body:
        if isinstance(statement, ast.FunctionDef) and statement.name == "__init__":
            return statement
    return None


def _without_self(arguments: ast.arguments) -> ast.arguments:
    """Drops a leading `self` or `cls`, changing the (already read) tree in place."""
    positional = arguments.posonlyargs or arguments.args
    if positional and positional[0].arg in ("self", "cls"):
        if len(arguments.defaults) == len(arguments.posonlyargs) + len(arguments.args):
            arguments.defaults.pop(0)
        positional.pop(0)
    return arguments


def _all_arguments(arguments: ast.arguments) -> list[ast.arg]:
    named = [*arguments.posonlyargs, *arguments.args]
    if arguments.vararg:
        named.append(arguments.vararg)
    named += arguments.kwonlyargs
    if arguments.kwarg:
        named.append(arguments.kwarg)
    return named
