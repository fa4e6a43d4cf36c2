"""Docstrings are read from source, cleaned, and each but once."""

import sys
import sysconfig
from pathlib import Path

import pytest

from gram_jax.data import builtin
from gram_jax.data.builtin import Docstring, distinct, package_docstrings, reference_topics

SOURCE = '''
def shown(self_made, /, first: int = 3, *args, key="k", **rest) -> None:
    """Does one thing to its arguments and says here what the thing is.

    Kept:
        as it is indented.
    """

def _hidden():
    """A private function with a docstring that would be long enough to be read."""

def short():
    """Too short."""

def legal():
    """Copyright 2020 by somebody who wrote a long text here about nothing at all."""

def twin():
    """Does one thing to its arguments, and says here what the THING is!

    kept *as it is* indented"""

class Shape:
    """A shape in the plane, of which one may ask for the area and the name."""

    def __init__(self, sides=4):
        pass

    def area(self, unit: str):
        """Returns the area in a unit of which the name is given as a string."""

    @property
    def name(self):
        """The name of the shape, which is one of the words that Euclid used."""

    @name.setter
    def name(self, value):
        """Sets the name of the shape to any word that is not yet another's name."""
'''


@pytest.fixture
def package(tmp_path, monkeypatch):
    folder = tmp_path / "sample_package"
    (folder / "_inner").mkdir(parents=True)
    (folder / "tests").mkdir()
    (folder / "__init__.py").write_text("raise RuntimeError('a package must not be imported')\n")
    (folder / "_inner" / "module.py").write_text(SOURCE)
    (folder / "tests" / "test_x.py").write_text(SOURCE.replace("thing", "test thing"))
    (folder / "broken.py").write_text('"""Not Python."""\ndef (')
    monkeypatch.syspath_prepend(tmp_path)
    return "sample_package"


def test_public_functions_classes_and_methods_are_read_without_importing(package):
    read = package_docstrings([package])
    found = {item.qualified_name: item.signature for item in read.docstrings}
    assert found == {
        "sample_package.module.shown": ("(self_made, /, first: int=3, *args, key='k', **rest)"),
        "sample_package.module.Shape": "(sides=4)",
        "sample_package.module.Shape.area": "(unit: str)",
        "sample_package.module.Shape.name": "()",
    }
    assert read.docstrings[0].text.endswith("the thing is.\n\nKept:\n    as it is indented.")
    assert read.unreadable_files == 1
    assert package not in sys.modules


def test_a_package_that_is_not_installed_gives_nothing():
    assert package_docstrings(["no_such_package_anywhere"]) == ([], 0)


def test_a_long_signature_loses_annotations_then_defaults_then_its_end(package, tmp_path):
    names = [f"parameter_{i}" for i in range(30)]
    text = '"""One of many functions with a docstring that is long enough {}."""'
    functions = {
        "annotated": ", ".join(f"{name}: int = 12345" for name in names[:5]),
        "many": ", ".join(f"{name}: int = 1" for name in names),
    }
    lines = [f"def {name}({names}):\n    {text.format(name)}" for name, names in functions.items()]
    (tmp_path / package / "_inner" / "module.py").write_text("\n".join(reversed(lines)))
    many, annotated = package_docstrings([package]).docstrings
    assert annotated.signature == f"({', '.join(f'{name}=12345' for name in names[:5])})"
    assert many.signature.startswith("(parameter_0, parameter_1,")
    assert many.signature.endswith(", ...)")
    assert len(many.signature) <= 160


def test_distinct_drops_what_was_seen_and_repeated_names():
    one = Docstring("p", "p.one", "()", "Returns the sum of its arguments.")
    again = Docstring("p", "p.two", "()", "returns the sum, of its ARGUMENTS")
    other = Docstring("p", "p.one", "()", "Another text.")
    assert distinct([one, again, other]) == [one]
    assert distinct([again, other], seen=[one]) == [other]


def test_the_standard_library_gives_the_same_documents_each_time():
    root = Path(sysconfig.get_path("stdlib"))
    first, second = (builtin._read_folder(root / "email", "stdlib", "email") for _ in range(2))
    assert first == second
    assert len(first.docstrings) > 50
    assert all("  \n" not in item.text and "\t" not in item.text for item in first.docstrings)


def test_topics_of_the_language_reference_are_there():
    topics = {topic.qualified_name: topic.text for topic in reference_topics()}
    assert topics["python.assert"].startswith('The "assert" statement')
    assert builtin.sizes(reference_topics())["python"][0] == len(topics)
