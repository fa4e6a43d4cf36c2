"""Ten thousand damaged rows and files: each is a typed row or a `DataError`, and nothing else."""

import gzip
import json
import random
import sys
from collections import Counter
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

from gram_jax.data.records import open_source
from gram_jax.data.shapes import FORMATS, detect_format, parse_row
from gram_jax.data.sources import read_jsonl
from gram_jax.errors import DataError

QUESTION = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "Größe?"}]
ANSWER = {"role": "assistant", "content": "four", "tool_calls": None}
GOOD = (
    {"text": "Some text, with\nlines and \u2028 and {brackets]", "source": "s"},
    {"prompt": "p", "response": "r"},
    {"prompt": QUESTION, "responses": ["a", [ANSWER], ANSWER]},
    {"prompt": "p", "chosen": "c", "rejected": "r", "subset": "s", "logprob": [-1, -2.5]},
    {"prompt": QUESTION, "chosen": [ANSWER], "rejected": "r", "logprob": [0, 0]},
    {"prompt": QUESTION, "chosen": "c", "rejected": "r", "margin": 1, "system": None, "tools": []},
    {"chosen": "Two and two are four.", "rejected": "Two and two are five."},
    {"chosen": [*QUESTION, ANSWER], "rejected": [*QUESTION, ANSWER | {"content": "five"}]},
    {"chosen": "\n\nHuman: 2?\n\nAssistant: 4.", "rejected": "\n\nHuman: 2?\n\nAssistant: 5."},
    {"prompt": "p", "completion": "c", "label": True, "logprob": -3},
    {"prompt": "p", "responses": ["a", "b", "c"], "scores": [1, 2, 2.5], "logprob": [0, 1, 2]},
    {"instruction": "i", "input": "", "output": "o"},
    {"instruction": "i", "input": "x", "output": ["o", "p"], "system": "s"},
    {
        "instruction": "[User Question]\nq\n\n[The Start of Assistant A's Answer]\na\n[The End of"
        " Assistant A's Answer]\n\n[The Start of Assistant B's Answer]\nb\n[The End of Assistant"
        " B's Answer]\n\n#Preferred: ",
        "output": "B",
    },
    {
        "conversations": [{"from": "human", "value": "q"}],
        "chosen": {"from": "gpt", "value": "c"},
        "rejected": {"from": "gpt", "value": "r"},
    },
    {
        "conv_A": [*QUESTION, ANSWER],
        "conv_B": [*QUESTION, ANSWER | {"content": "five"}],
        "conv_A_rating": 1.0,
        "conv_B_rating": 0,
    },
    {"prompt": "p", "chosen": ["a", "b", "c"], "rejected": ["d", "e", "f"], "domain": "chat"},
    {"question": "q", "response_A": "a", "response_B": "b", "label": "A>B"},
    {"input": "i", "output_1": "a", "output_2": "b", "label": 1},
    {"instruction": "i", "input": "", "response1": "a", "response2": "b", "annotator1": 0},
)
CHAT = {
    "prompt": QUESTION,
    "chosen": "c",
    "rejected": "r",
    "score": 0.5,
    "vector": [1, 2],
    "tags": ["a"],
    "meta": {"label": 1, "ok": True},
    "turns": [{"speaker": "x"}],
}
TABLE = [{**GOOD[3], "subset": f"row {number} " + "x" * number} for number in range(30)]
SIZES = (1, 40, 300, 1 << 20)


def odd_values(rng):
    """A value that should not be there, or should."""
    deep = "x"
    for _ in range(rng.randrange(150)):
        deep = rng.choice(([deep], {"a": deep}))
    numbers = (True, 3, 10**400, -1e308, float("nan"), float("inf"))
    texts = ("", " ", "\ud800", "x\udfff", "\x00", "text")
    lists = ([], [[]], [None], [1, 2], [float("nan"), 1], [10**400, 0], deep)
    messages = (ANSWER, {}, {"role": "", "content": ""}, {"role": "assistant", "content": None})
    chats = (QUESTION, [ANSWER, ANSWER], [{}], [{"role": "assistant"}], [{"role": 1}])
    return rng.choice((None, *numbers, *texts, *lists, *messages, *chats))


def damaged_value(value, rng):
    """The value with something in it replaced, removed, doubled or added."""
    if rng.random() < 0.35 or not isinstance(value, dict | list) or not value:
        return odd_values(rng)
    if isinstance(value, list):
        place = rng.randrange(len(value))
        inner = rng.choice(([], [value[place]] * 2, [damaged_value(value[place], rng)]))
        return [*value[:place], *inner, *value[place + 1 :]]
    name = rng.choice(list(value))
    rest = {other: inner for other, inner in value.items() if other != name}
    new = rng.choice((name, "text", "response", "\ud800", "x" * 5000, "line\nbreak\x1b[31m"))
    return rng.choice((rest, {**rest, new: damaged_value(value[name], rng)}))


def damaged_bytes(data, rng):
    """The data with bits flipped, cut, or a piece removed, doubled, moved, zeroed or made up."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        if not data:
            break
        # Headers and footers are where a format says what it holds.
        length = len(data)
        start = rng.choice((rng.randrange(length), rng.randrange(min(length, 64))))
        start = rng.choice((start, length - 1 - rng.randrange(min(length, 400))))
        piece = slice(start, start + rng.choice((1, 2, 4, 8, 100, length)))
        match rng.randrange(8):
            case 0 | 1:
                data[start] ^= 1 << rng.randrange(8)
            case 2:
                data[start] = rng.choice((0, 0x7F, 0x80, 0xFF, rng.randrange(256)))
            case 3:
                del data[start:]
            case 4:
                del data[piece]
            case 5:
                data[piece] = data[piece] * 2
            case 6:
                data[piece] = bytes(len(data[piece]))
            case 7:
                data[piece] = rng.randbytes(rng.randrange(1, 9))
    return bytes(data)


def check(error, *, has_line):
    """The error says where and what, in a message that any terminal can print."""
    assert type(error) is DataError
    assert error.file
    assert error.reason
    assert (error.line is not None) or not has_line
    message = str(error)
    assert message.encode("utf-8")
    assert len(message) < 1500
    assert "\x1b" not in error.reason
    assert "\n" not in error.reason


def typed(number, record):
    """Which row the record makes, or "bad"."""
    if isinstance(record, DataError):
        assert record.line == number
        check(record, has_line=True)
        return "bad"
    kinds = []
    reference = "logprob" if "logprob" in record else ""
    for name in FORMATS:
        try:
            row = parse_row(record, name, file="a", line=number, reference_field=reference)
            assert row.line == number
            kinds.append(name)
        except DataError as error:
            check(error, has_line=True)
    try:
        detect_format(record, file="a", line=number)
    except DataError as error:
        assert not kinds
        check(error, has_line=True)
    return "row" if kinds else "bad"


def consume(spec, rng):
    """What became of the records, and whether the source as a whole was at fault."""
    found = []
    try:
        for block in open_source(str(spec)).blocks(rng.choice(SIZES)):
            found += [typed(number, record) for number, record in block.records()]
    except DataError as error:
        check(error, has_line=False)
        return found, "fault"
    return found, "whole"


def test_damaged_lines_never_hide_their_neighbours(tmp_path):
    rng = random.Random(1)
    path = tmp_path / "a.jsonl"
    outcomes = Counter()
    for _ in range(60):
        lines = []
        while len(lines) < 100:
            row = rng.choice(GOOD)
            if rng.random() < 0.5:
                row = damaged_value(row, rng)
            line = json.dumps(row, ensure_ascii=rng.random() < 0.5)
            line = line.encode("utf-8", "surrogatepass")
            if rng.random() < 0.5:
                line = damaged_bytes(line, rng)
            lines.append(line.replace(b"\n", b"\r"))
        while not lines[-1].strip():
            lines.pop()
        path.write_bytes(b"\n".join(lines) + rng.choice((b"", b"\n", b"\n\n \n")))
        found, state = consume(path, rng)
        assert (len(found), state) == (len(lines), "whole")
        outcomes.update(found)
        (block,) = open_source(str(path)).blocks(1 << 20)
        bad = [number for number, record in block.records() if isinstance(record, DataError)]
        with pytest.raises(DataError) as caught:
            list(read_jsonl(path))
        assert caught.value.line == bad[0]
    assert outcomes.total() > 5900
    assert min(outcomes.values()) > 1000


def small_files(folder):
    """One good file or folder of each kind: (spec, the file to damage, times)."""
    folder.mkdir(exist_ok=True)
    options = {"compression": "none", "use_dictionary": False, "row_group_size": 12}
    plain = write_parquet(folder / "plain.parquet", TABLE, **options)
    checked = write_parquet(folder / "a.parquet", TABLE, write_page_checksum=True)
    chats = write_parquet(folder / "chats.parquet", [CHAT] * 20, compression="zstd")
    stream = write_arrow(folder / "a.arrow", [CHAT] * 20, batch=7)
    table = write_arrow(folder / "table.arrow", TABLE, new=pa.ipc.new_file, batch=7)
    raw = jsonl(TABLE).splitlines()
    single = write_array_record(folder / "a.array_record", raw)
    grouped = write_array_record(folder / "grouped.array_record", raw, 8)
    packed = write_jsonl(folder / "a.jsonl.gz", TABLE)
    framed = write_jsonl(folder / "a.jsonl.zst", TABLE)
    listed = folder / "list.json"
    listed.write_text(json.dumps(TABLE, indent=1))
    hf = write_hf(folder / "hf", TABLE)
    splits = write_hf_dict(folder / "hf_dict", train=TABLE[:9], test=TABLE[:9])
    made = write_tfds(folder / "tfds", train=[CHAT] * 9, test=[CHAT] * 3)
    shard = made / "chat_dataset-train.array_record-00000-of-00001"
    return {
        "gzip": (packed, packed, 500),
        "zstd": (framed, framed, 500),
        "json list": (listed, listed, 300),
        "parquet": (plain, plain, 500),
        "parquet with checksums": (checked, checked, 300),
        "parquet of chats": (chats, chats, 400),
        "arrow stream": (stream, stream, 500),
        "arrow file": (table, table, 500),
        "array_record": (single, single, 250),
        "array_record in groups": (grouped, grouped, 250),
        "state.json": (hf, hf / "state.json", 250),
        "dataset_dict.json": (f"{splits}:train", splits / "dataset_dict.json", 100),
        "features.json": (f"{made}:train", made / "features.json", 100),
        "dataset_info.json": (f"{made}:train", made / "dataset_info.json", 100),
        "tfds shard": (f"{made}:train", shard, 50),
    }


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return small_files(tmp_path_factory.mktemp("small"))


KINDS = (
    "gzip", "zstd", "json list", "parquet", "parquet with checksums", "parquet of chats",
    "arrow stream", "arrow file", "array_record", "array_record in groups", "state.json",
    "dataset_dict.json", "features.json", "dataset_info.json", "tfds shard",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_read_as_far_as_they_go(files, kind):
    spec, path, times = files[kind]
    whole = path.read_bytes()
    rng = random.Random(kind)
    outcomes = Counter()
    try:
        assert set(consume(spec, rng)[0]) == {"row"}
        for _ in range(times):
            path.write_bytes(damaged_bytes(whole, rng))
            outcomes[consume(spec, rng)[1]] += 1
    finally:
        path.write_bytes(whole)
    assert outcomes.total() == times
    assert outcomes["fault"] > times // 10


def test_damaged_examples_are_bad_records(tmp_path):
    folder = write_tfds(tmp_path, train=[CHAT] * 5)
    shard = folder / "chat_dataset-train.array_record-00000-of-00001"
    source = open_source(f"{folder}:train")
    (block,) = source.blocks(1 << 20)
    rng = random.Random(5)
    for _ in range(30):
        write_array_record(shard, [damaged_bytes(raw, rng) for raw in block.raw])
        found, state = consume(f"{folder}:train", rng)
        assert (len(found), state) == (5, "whole")


def test_compressed_lines_that_are_damaged_inside_are_bad_records(tmp_path):
    rng = random.Random(6)
    for pack, name in ((gzip.compress, "a.jsonl.gz"), (zstd, "a.jsonl.zst")):
        path = tmp_path / name
        lines = [damaged_bytes(jsonl([row]), rng).replace(b"\n", b" ") for row in TABLE * 5]
        path.write_bytes(pack(b"\n".join([*lines, b"{}"])))
        assert len(consume(path, rng)[0]) == len(lines) + 1
