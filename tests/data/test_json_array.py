"""A file that is one JSON list is read item by item, as lines would be."""

import json

import pytest

from gram_jax.data.json_array import ListLines
from gram_jax.data.records import open_source
from gram_jax.errors import DataError


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 1 << 16])
def test_a_list_is_the_same_lines_however_its_bytes_come(chunk):
    values = [
        {"a": '"[{,}]"\\'},
        {"b": [1, [2, {"c": "\\\\"}], ","]},
        {"d": '\u2028é"', "e": {}},
        {},
    ]
    for text in (json.dumps(values), json.dumps(values, indent=2, ensure_ascii=False)):
        stream = ListLines(Pieces(f"  {text}\n\n".encode(), chunk))
        lines = b"".join(iter(lambda stream=stream: stream.read1(1), b"")).split(b"\n")
        assert [json.loads(line) for line in lines[:-1]] == values
        assert lines[-1] == b""


class Pieces:
    """A stream that gives few bytes at once."""

    def __init__(self, data, size):
        self._pieces = (data[i : i + size] for i in range(0, len(data), size))

    def read1(self, _):
        return next(self._pieces, b"")


@pytest.mark.parametrize(
    ("content", "good", "part"),
    [
        ('[{"a": 1}, {"a": 2}', 1, "the list is not closed"),
        ('[{"a": 1}, {"a": "2}]', 1, "the list is not closed"),
        ('[{"a": 1}, {"a": 2}] x', 2, "something follows"),
        ('[{"a": 1}, 3, {"a": 2}]', 3, "JSON object is expected"),
        ('[{"a": 1}, {"a": 2]]', 2, "not JSON"),
        ('[{"a": 1},, {"a": 2}]', 3, "blank"),
        ("[]", 0, "empty"),
        (" ", 0, "empty"),
    ],
)
def test_what_is_wrong_with_a_list_is_named_after_the_items_before_it(
    tmp_path, content, good, part
):
    path = tmp_path / "a.json"
    path.write_text(content)
    found, fault = [], None
    try:
        for block in open_source(str(path)).blocks(1):
            found += list(block.records())
    except DataError as error:
        fault = error
    assert [number for number, _ in found] == list(range(1, good + 1))
    bad = [record for _, record in found if isinstance(record, DataError)]
    assert part in str(bad[0] if bad else fault)
    assert not (bad and fault)
