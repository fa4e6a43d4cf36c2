"""Rows on disk are the rows that were packed; what is missing or damaged is named."""

import json

import numpy as np
import pytest
import tiny

from gram_jax.data.rowset import MANIFEST, Rows, RowSet, row_dtype
from gram_jax.errors import DataError
from gram_jax.packing import pack
from gram_jax.rows import RowShape

TEXT, PAIRS = RowShape(40, 40), RowShape(48, 32, 6, 4)


def packed_rows(kind):
    if kind == "text":
        return list(pack(tiny.text_examples(1, 50), TEXT)), TEXT
    found = tiny.preferences(0, 50, reference=kind == "reference")
    return list(pack(found, PAIRS)), PAIRS


@pytest.mark.parametrize("kind", ["text", "preferences", "reference"])
@pytest.mark.parametrize("shards", [1, 4])
def test_what_is_read_is_what_was_written(tmp_path, kind, shards):
    packed, shape = packed_rows(kind)
    rows = tiny.row_set(tmp_path, packed, shape, shards)
    assert len(rows) == len(packed)
    order = np.random.default_rng(0).permutation(len(packed))
    read = rows.read(order)
    for place, number in enumerate(order):
        for name in rows.dtype.names:
            field = getattr(packed[number].batch, name)
            np.testing.assert_array_equal(read[name][place], field, err_msg=name)
            assert read[name].dtype == field.dtype
    assert (kind == "reference") == ("reference" in rows.dtype.names)
    assert len(rows.read([])) == 0


def test_text_rows_have_no_fields_of_sequences_and_pairs():
    assert not any(
        "pair" in name or "sequence" in name for name in row_dtype(TEXT, reference=False).names
    )


def test_rows_of_text_alone_have_no_branches(tmp_path):
    packed, shape = packed_rows("text")
    text, other = (
        tiny.row_set(tmp_path / kind, packed, shape, key={"format": kind})
        for kind in ("text", "responses")
    )
    numbers = np.arange(2)
    assert Rows([text, text]).read(numbers).branch_ids is None
    mixed = Rows([text, other]).read(numbers)
    np.testing.assert_array_equal(mixed.branch_ids[0], packed[0].batch.branch_ids)


def test_a_folder_without_rows_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no prepared rows"):
        RowSet(tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    tiny.row_set(tmp_path, *packed_rows("text"))
    (tmp_path / "rows-00001-of-00002.array_record").unlink()
    with pytest.raises(DataError, match=r"rows-00001-of-00002.array_record: is missing"):
        RowSet(tmp_path)


def test_a_truncated_shard_is_named(tmp_path):
    tiny.row_set(tmp_path, *packed_rows("text"))
    path = tmp_path / "rows-00000-of-00002.array_record"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(DataError, match=r"rows-00000-of-00002.array_record: has \d+ bytes"):
        RowSet(tmp_path)


def test_flipped_bits_are_noticed_wherever_they_are(tmp_path):
    packed, shape = packed_rows("text")
    whole = tiny.row_set(tmp_path, packed, shape, 1).read(range(len(packed)))
    path = tmp_path / "rows-00000-of-00001.array_record"
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    noticed = 0
    for bit in rng.choice(8 * len(content), 150, replace=False):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(damaged)
        try:
            read = RowSet(tmp_path).read(range(len(packed)))
        except DataError as error:
            assert str(tmp_path) in str(error)
            noticed += 1
        else:  # a bit that carries nothing, such as padding between blocks
            np.testing.assert_array_equal(read, whole)
    assert noticed > 0


@pytest.mark.parametrize("content", ["", "{", "[]", '{"id": "x"}', "\x00\xff"])
def test_a_damaged_manifest_is_named(tmp_path, content):
    tiny.row_set(tmp_path, *packed_rows("text"))
    (tmp_path / MANIFEST).write_text(content, encoding="latin-1")
    with pytest.raises(DataError, match="not a manifest of prepared rows"):
        RowSet(tmp_path)


def test_a_manifest_of_other_rows_is_noticed(tmp_path):
    tiny.row_set(tmp_path, *packed_rows("text"))
    values = json.loads((tmp_path / MANIFEST).read_text())
    values["shards"][0]["rows"] += 1
    (tmp_path / MANIFEST).write_text(json.dumps(values))
    with pytest.raises(DataError, match=r"has \d+ rows, the manifest says \d+"):
        RowSet(tmp_path)
