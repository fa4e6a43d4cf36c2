"""A source gives the same records whatever it is stored as, however it is cut into blocks."""

import gzip
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from record_files import (
    jsonl,
    write_array_record,
    write_arrow,
    write_hf,
    write_hf_dict,
    write_jsonl,
    write_parquet,
    write_tfds,
    zstd,
)

from gram_jax.data import builtin, records
from gram_jax.data.formats import line_blocks
from gram_jax.data.records import open_source
from gram_jax.data.shapes import detect_format, parse_row
from gram_jax.data.sources import read_jsonl
from gram_jax.errors import DataError


def chat(number):
    turns = [{"role": "user", "content": f"Größe\u2028{number}?"}] * (number % 3 + 1)
    return {
        "prompt": turns,
        "chosen": f"yes {number} " + "word " * (number % 7),
        "rejected": "no",
        "score": number / 4,
        "vector": [number, -1],
        "tags": ["a", "b"][: number % 3],
        "meta": {"label": number % 2, "ok": True},
        "turns": [{"speaker": "x"}] * (number % 2),
    }


ROWS = [chat(number) for number in range(60)]


def read(spec, size=2000):
    """(file name, number, record) of all records, and that no file is opened by a worker."""
    return [
        (Path(block.file).name, number, record)
        for block in map(pickle.loads, map(pickle.dumps, open_source(str(spec)).blocks(size)))
        for number, record in block.records()
    ]


def rows(spec, size=2000):
    return [record for _, _, record in read(spec, size)]


def fault(spec, size=2000):
    with pytest.raises(DataError) as caught:
        read(spec, size)
    return caught.value


def write_list(path, rows, indent):
    data = json.dumps(rows, indent=indent, ensure_ascii=False).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else b"\xef\xbb\xbf\n " + data)
    return path


def write_all(folder):
    """The rows in every format; for each a spec."""
    raw = jsonl(ROWS).splitlines()
    grouped = folder / "h.array_record-00000-of-00001"
    splits = {"train": ROWS, "test": ROWS[:3]}
    return {
        "jsonl": write_jsonl(folder / "a.jsonl", ROWS),
        "gz": write_jsonl(folder / "b.jsonl.gz", ROWS),
        "zst": write_jsonl(folder / "c.jsonl.zst", ROWS),
        "json list": write_list(folder / "i.json", ROWS, 1),
        "json list gz": write_list(folder / "j.json.gz", ROWS, None),
        "json lines": write_jsonl(folder / "k.json", ROWS),
        "parquet": write_parquet(folder / "d.parquet", ROWS, row_group_size=25),
        "arrow": write_arrow(folder / "e.arrow", ROWS, batch=25),
        "arrow file": write_arrow(folder / "f.arrow", ROWS, new=pa.ipc.new_file, batch=25),
        "array_record": write_array_record(folder / "g.array_record", raw),
        "array_record 16": write_array_record(grouped, raw, 16),
        "hugging face": write_hf(folder / "hf", ROWS),
        "hugging face split": f"{write_hf_dict(folder / 'hf_dict', **splits)}:train",
        "tfds": f"{write_tfds(folder / 'tfds', **splits)}:train",
    }


@pytest.fixture(scope="module")
def specs(tmp_path_factory):
    return write_all(tmp_path_factory.mktemp("formats"))


KINDS = (
    "jsonl", "gz", "zst", "json list", "json list gz", "json lines", "parquet", "arrow",
    "arrow file", "array_record", "array_record 16", "hugging face", "hugging face split", "tfds",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_gives_the_same_rows(specs, kind):
    found = rows(specs[kind])
    if kind == "tfds":  # keeps rows in an order of its own
        found.sort(key=lambda row: row["score"])
    assert found == ROWS
    typed = [
        parse_row(row, detect_format(row, file="a", line=1), file="a", line=1) for row in found
    ]
    assert [row.prompt for row in typed] == [row["prompt"] for row in ROWS]


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_of_any_size_hold_the_same_records(specs, kind):
    whole = read(specs[kind], 1 << 30)
    numbers = [number for _, number, _ in whole]
    assert numbers == ([*range(1, 31)] * 2 if kind == "hugging face" else [*range(1, 61)])
    for size in (1, 100, 999, 5000):
        assert read(specs[kind], size) == whole
        blocks = list(open_source(str(specs[kind])).blocks(size))
        assert blocks == list(open_source(str(specs[kind])).blocks(size))
        assert len(blocks) > 60 * 60 / (size + 2000)
    assert len(list(open_source(str(specs[kind])).blocks(1))) == 60


@pytest.mark.parametrize("kind", KINDS)
def test_files_are_the_ones_whose_content_matters(specs, kind):
    source = open_source(str(specs[kind]))
    assert source.identity() == ""
    names = [path.name for path in source.files()]
    assert all(path.is_file() for path in source.files())
    if kind == "tfds":
        shard = "chat_dataset-train.array_record-00000-of-00001"
        assert names == ["dataset_info.json", "features.json", shard]
    elif kind == "hugging face split":
        assert names == ["dataset_dict.json", "state.json", "data-00000-of-00001.arrow"]
    elif kind == "hugging face":
        assert names == ["state.json", "data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    else:
        assert names == [Path(specs[kind]).name]


def test_hugging_face_files_are_read_in_the_order_that_state_json_gives(tmp_path):
    folder = write_hf(tmp_path / "hf", ROWS, shards=3)
    state = json.loads((folder / "state.json").read_text())
    state["_data_files"].reverse()
    (folder / "state.json").write_text(json.dumps(state))
    assert rows(folder) == [*ROWS[40:], *ROWS[20:40], *ROWS[:20]]


def test_a_folder_or_pattern_gives_its_files_in_order_of_name(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write_parquet(folder / "2.parquet", ROWS[10:20])
    write_jsonl(folder / "1.jsonl.gz", ROWS[:10])
    write_array_record(folder / "3.array_record", jsonl(ROWS[20:30]).splitlines())
    (folder / "_SUCCESS").touch()
    (folder / ".DS_Store").touch()
    assert rows(folder) == ROWS[:30]
    assert rows(f"{folder}/*") == ROWS[:30]
    assert rows(f"{folder}/[23].*") == ROWS[10:30]
    assert rows(f"{tmp_path}/**/*.parquet") == ROWS[10:20]
    assert [path.name for path in open_source(f"{folder}/?.*").files()] == [
        "1.jsonl.gz",
        "2.parquet",
        "3.array_record",
    ]


def test_names_that_look_like_patterns_or_splits_are_taken_as_they_are_if_they_exist(tmp_path):
    odd = write_jsonl(tmp_path / "a[1]:b.jsonl", ROWS)
    assert rows(odd) == ROWS
    folder = tmp_path / "hf:v1"
    write_hf(folder, ROWS)
    assert rows(folder) == ROWS


def test_lines_end_with_a_newline_byte_only_and_a_byte_order_mark_is_dropped(tmp_path):
    path = tmp_path / "a.jsonl"
    texts = [{"text": "a\u2028b\x85"}, {"text": "c"}]
    data = jsonl(texts)
    for content in (data, data.rstrip(), data.replace(b"\n", b"\r\n"), b"\xef\xbb\xbf" + data):
        path.write_bytes(content)
        assert rows(path) == texts
        assert [row for _, row in read_jsonl(path)] == texts
    path.write_bytes(data.splitlines()[1])
    assert rows(path) == texts[1:]


@pytest.mark.parametrize("size", [1, 15, 16, 17, 40, 1000])
def test_blank_lines_are_bad_records_except_at_the_end(tmp_path, size):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\n{"text": "a"}\n \n\n{"text": "b"}\n\r\n\n')
    found = read(path, size)
    assert [number for _, number, _ in found] == [1, 2, 3, 4, 5]
    bad = [record for _, _, record in found if isinstance(record, DataError)]
    assert [(error.line, error.reason) for error in bad] == [
        (line, "a blank line; remove it") for line in (1, 3, 4)
    ]


def test_a_bad_record_does_not_hide_the_others(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [
        b'{"text": "one"}',
        b'{"text": ',
        b'{"text": "\xff"}',
        b"[1]",
        b'{"text": %s}' % (b"[" * 150 + b"]" * 150),
        b'{"text": %s}' % (b"[" * 99999),
        b'{"n": %s}' % (b"9" * 5000),
        b'{"n": NaN, "n": Infinity, "text": "last"}',
    ]
    path.write_bytes(b"\n".join(lines))
    found = rows(path)
    reasons = [record.reason for record in found if isinstance(record, DataError)]
    assert [found[0], found[-1]["text"]] == [{"text": "one"}, "last"]
    parts = ("not JSON", "not UTF-8 (byte 11", "not a list", "nested", "nested", "digits")
    assert len(reasons) == 6
    assert all(part in reason for part, reason in zip(parts, reasons, strict=True))


def test_nesting_that_is_allowed_is_deep_enough_for_any_chat(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": %s}' % (b"[" * 99 + b"]" * 99))
    assert isinstance(rows(path)[0], dict)
    path.write_bytes(b'{"text": %s}' % (b"[" * 100 + b"]" * 100))
    assert isinstance(rows(path)[0], DataError)
    path.write_bytes(b'{"text": [%s]}' % b",".join([b"[]", b"{}"] * 500))
    assert isinstance(rows(path)[0], dict)


@pytest.mark.parametrize("pack", [gzip.compress, zstd])
def test_lines_before_the_damage_of_a_compressed_file_are_given(tmp_path, pack):
    path = tmp_path / ("a.jsonl.gz" if pack is gzip.compress else "a.jsonl.zst")
    data = b"".join(b'{"text": "%s"}\n' % os.urandom(40).hex().encode() for _ in range(5000))
    whole = pack(data)
    path.write_bytes(whole[: len(whole) // 2])
    found = []
    with pytest.raises(DataError) as caught:
        for block in open_source(str(path)).blocks(10_000):
            found += block.records()
    assert 1000 < len(found) < 4000
    assert caught.value.line == len(found) + 1
    assert "cut off or damaged" in str(caught.value)
    assert "copy the file again" in str(caught.value)


def test_text_that_is_not_utf_8_is_a_bad_record_in_tables_too(tmp_path):
    good = pa.array(["a", "b", "c"])
    text = pa.Array.from_buffers(pa.string(), 3, [None, good.buffers()[1], pa.py_buffer(b"a\xffc")])
    nested = pa.StructArray.from_arrays([text], names=["content"])
    for column, field in ((text, "text"), (nested, "text")):
        table = pa.table({"text": column, "n": [1, 2, 3]})
        pa.parquet.write_table(table, tmp_path / "a.parquet")
        with pa.ipc.new_stream(tmp_path / "a.arrow", table.schema) as writer:
            writer.write_table(table)
        for name in ("a.parquet", "a.arrow"):
            first, second, third = rows(tmp_path / name)
            assert (first["n"], third["n"]) == (1, 3)
            assert (second.line, second.field) == (2, field)
            assert "not UTF-8" in second.reason


def test_a_value_that_python_has_not_is_a_bad_record(tmp_path):
    days = pa.array([0, 2**31 - 1], pa.int32()).cast(pa.date32())
    path = tmp_path / "a.parquet"
    pa.parquet.write_table(pa.table({"text": ["a", "b"], "day": days}), path)
    good, bad = rows(path)
    assert good["text"] == "a"
    assert (bad.line, bad.field) == (2, "day")


def test_tables_whose_offsets_lead_out_of_bounds_are_refused(tmp_path):
    offsets = pa.py_buffer(b"".join(n.to_bytes(4, "little") for n in (0, 1_000_000, 2, 3)))
    text = pa.Array.from_buffers(pa.string(), 3, [None, offsets, pa.py_buffer(b"abc")])
    batch = pa.record_batch({"text": text})
    with pa.ipc.new_stream(tmp_path / "a.arrow", batch.schema) as writer:
        writer.write_batch(batch)
    assert "damaged" in str(fault(tmp_path / "a.arrow"))


def test_a_batch_of_endless_empty_rows_is_refused(tmp_path):
    endless = pa.Array.from_buffers(pa.null(), 2**31 - 1, [None])
    batch = pa.record_batch({"text": endless})
    with pa.ipc.new_stream(tmp_path / "a.arrow", batch.schema) as writer:
        writer.write_batch(batch)
    assert "rows in 0 bytes" in str(fault(tmp_path / "a.arrow"))


def test_a_parquet_page_that_does_not_match_its_checksum_is_refused(tmp_path):
    path = tmp_path / "a.parquet"
    write_parquet(path, ROWS, write_page_checksum=True, compression="none", use_dictionary=False)
    data = path.read_bytes()
    place = data.index(b"yes 8 word")
    path.write_bytes(data[:place] + b"Y" + data[place + 1 :])
    assert "damaged" in str(fault(path))


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("none.jsonl", "no such file or folder"),
        ("none.array_record", "no such file or folder"),
        ("none/*.jsonl", "no file matches"),
        ("empty", "folder is empty"),
        ("text.txt", "unknown kind of file"),
        ("odd", "unknown kind of file"),
        ("zero.jsonl", "file is empty"),
        ("zero.jsonl.gz", "file is empty"),
        ("zero.jsonl.zst", "file is empty"),
        ("zero.parquet", "damaged"),
        ("zero.arrow", "damaged"),
        ("zero.array_record", "damaged"),
        ("norows.parquet", "holds no rows"),
        ("norows.arrow", "holds no rows"),
        ("norows.array_record", "holds no records"),
        ("nested", "holds the folder inner"),
        ("hf:train", "has no splits"),
        ("hf_dict", "name a split, as in"),
        ("hf_dict:validation", "has no split 'validation' (there are: train, test)"),
        ("tfds", "there are: "),
        ("tfds:none", "has no split 'none'"),
        ("tfrecord", "file_format='array_record'"),
        ("a.jsonl/b.jsonl", "no such file"),
        ("pipe.jsonl", "not a regular file"),
        ("builtin:none", "there is docstrings"),
        ("gs://bucket/a.jsonl", "is read by another package: Please install gcsfs"),
        ("", "name of a source is empty"),
        ("x" * 5000, "cannot be read"),
    ],
)
def test_what_cannot_be_a_source_is_one_clear_error(folder_of_faults, name, part):
    absolute = ":" in name.split("/")[0] and not name.startswith(("hf", "tfds"))
    spec = name if absolute or not name else f"{folder_of_faults}/{name}"
    assert part in str(fault(spec))


@pytest.fixture(scope="module")
def folder_of_faults(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    (folder / "empty").mkdir()
    (folder / "nested" / "inner").mkdir(parents=True)
    (folder / "odd").mkdir()
    (folder / "odd" / "a.csv").write_text("a,b")
    (folder / "text.txt").write_text("text")
    for extension in ("jsonl", "jsonl.gz", "jsonl.zst", "parquet", "arrow", "array_record"):
        (folder / f"zero.{extension}").touch()
    schema = pa.schema({"text": pa.string()})
    pa.parquet.write_table(schema.empty_table(), folder / "norows.parquet")
    pa.ipc.new_stream(folder / "norows.arrow", schema).close()
    write_array_record(folder / "norows.array_record", [])
    write_hf(folder / "hf", ROWS)
    write_hf_dict(folder / "hf_dict", train=ROWS, test=ROWS[:3])
    write_tfds(folder / "made", train=ROWS, test=ROWS[:3]).rename(folder / "tfds")
    write_tfds(folder / "made", train=ROWS[:3]).rename(folder / "tfrecord")
    info = folder / "tfrecord" / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    write_jsonl(folder / "a.jsonl", ROWS)
    os.mkfifo(folder / "pipe.jsonl")
    return folder


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_files_and_folders_without_permission_are_named(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    path.chmod(0)
    assert "Permission denied" in str(fault(path))
    folder = write_hf(tmp_path / "hf", ROWS)
    folder.chmod(0)
    assert "Permission denied" in str(fault(folder))
    folder.chmod(0o700)


def test_incomplete_hugging_face_folders_are_named(tmp_path):
    folder = write_hf_dict(tmp_path / "d", train=ROWS, test=ROWS)
    state = folder / "train" / "state.json"
    content = json.loads(state.read_text())
    state.write_text(json.dumps(content | {"_indices_data_files": [{"filename": "indices.arrow"}]}))
    assert "flatten_indices()" in str(fault(f"{folder}:train"))
    for name in ("../test/data-00000-of-00001.arrow", "", None, ["a"]):
        state.write_text(json.dumps(content | {"_data_files": [{"filename": name}]}))
        assert "_data_files" in str(fault(f"{folder}:train"))
    state.write_text(json.dumps(content | {"_data_files": []}))
    assert "dataset is empty" in str(fault(f"{folder}:train"))
    state.write_text("{")
    assert "state.json: is damaged" in str(fault(f"{folder}:train"))
    state.unlink()
    assert "state.json: is missing" in str(fault(f"{folder}:train"))
    assert "neither state.json" in str(fault(folder / "train"))
    (folder / "test" / "data-00000-of-00001.arrow").unlink()
    assert "state.json lists it" in str(fault(f"{folder}:test"))


def test_incomplete_tfds_folders_are_named(tmp_path):
    folder = write_tfds(tmp_path, train=ROWS, test=ROWS[:3])
    info = folder / "dataset_info.json"
    content = info.read_text()
    info.write_text(content.replace('"60"', '"61"'))
    assert "has 60 records, but dataset_info.json says 61" in str(fault(f"{folder}:train"))
    info.write_text(content.replace('"version": "1.0.0"', '"version": 3'))
    assert "TFDS cannot open the folder" in str(fault(f"{folder}:train"))
    info.write_text(content)
    (folder / "chat_dataset-test.array_record-00000-of-00001").unlink()
    assert "dataset_info.json lists it" in str(fault(f"{folder}:test"))
    info.unlink()
    assert "dataset_info.json: is missing" in str(fault(f"{folder}:train"))


def test_the_features_of_a_dataset_cannot_import_code(tmp_path):
    folder = write_tfds(tmp_path, train=ROWS)
    path = folder / "features.json"
    content = path.read_text()
    foreign = content.replace("tensorflow_datasets.core.features.text_feature", "antigravity")
    path.write_text(foreign)
    assert "antigravity.Text is not of TFDS" in str(fault(f"{folder}:train"))
    wrapped = {"type": "antigravity.X", "content": {}}
    for hidden in (wrapped, {"jsonFeature": {"json": json.dumps(wrapped)}}):
        path.write_text(json.dumps({"featuresDict": {"features": {"a": hidden}}}))
        assert "antigravity.X is not of TFDS" in str(fault(f"{folder}:train"))
    assert "antigravity" not in sys.modules


def test_the_docstrings_of_this_python_are_a_source_without_files(monkeypatch):
    # A part of the standard library is enough here: reading all takes tens of seconds.
    monkeypatch.setattr(builtin, "IN_DISTRIBUTION", ())
    monkeypatch.setattr(builtin, "_BYTES_PER_PACKAGE", 1_000_000)
    records._docstring_lines.cache_clear()
    source = open_source("builtin:docstrings")
    whole = list(source.blocks(1 << 30))
    parts = list(source.blocks(100_000))
    assert len(whole) == 1 < len(parts)
    found = [record for block in parts for _, record in block.records()]
    assert found == [record for _, record in whole[0].records()]
    assert {"stdlib", "python"} == {record["source"] for record in found}
    assert parse_row(found[0], "text", file="builtin:docstrings", line=1).source == "stdlib"
    assert source.files() == ()
    assert len(source.identity()) == 64
    records._docstring_lines.cache_clear()


def test_a_line_that_never_ends_is_refused_before_memory_runs_out(tmp_path, monkeypatch):
    monkeypatch.setattr("gram_jax.data.formats._LONGEST_LINE", 1 << 20)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n' + b"x" * (4 << 20))
    found = []
    with pytest.raises(DataError) as caught:
        for block in open_source(str(path)).blocks(100):
            found += block.records()
    assert found == [(1, {"text": "one"})]
    assert caught.value.line == 2
    assert "a line of more than 1 MiB" in str(caught.value)


class OneByteAtATime:
    """A stream that gives as little as it may."""

    def __init__(self, data):
        self.data = data

    def read1(self, _):
        first, self.data = self.data[:1], self.data[1:]
        return first


@pytest.mark.parametrize("size", [1, 2, 3, 50, 1000])
def test_cuts_do_not_depend_on_how_much_the_system_gives_at_a_time(tmp_path, size):
    data = b"\xef\xbb\xbf" + jsonl(ROWS[:9]) + b"\n\n" + jsonl(ROWS[:3]) + b"\n"
    path = tmp_path / "a.jsonl"
    path.write_bytes(data)
    assert list(line_blocks(str(path), OneByteAtATime(data), size)) == list(
        open_source(str(path)).blocks(size)
    )


def test_importing_sources_and_records_is_cheap():
    heavy = ("pyarrow", "tensorflow", "tensorflow_datasets", "array_record", "jax", "numpy")
    code = (
        "import sys, gram_jax.data.sources, gram_jax.data.records\n"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
