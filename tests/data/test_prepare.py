"""Preparation: the same rows however it was done, nothing lost, interrupted or not."""

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import peer_models
import pytest

from gram_jax.config import Config, DataConfig, ModelConfig, ObjectiveConfig, TrainConfig
from gram_jax.data import prepare, work
from gram_jax.data.examples import Layout
from gram_jax.data.meter import Meter
from gram_jax.data.prepare import prepared_rows
from gram_jax.data.rowset import MANIFEST, RowSet, read_manifest
from gram_jax.data.stage import num_steps, stage_data
from gram_jax.data.tokenizer import Tokenizer
from gram_jax.errors import DataError, UserError
from gram_jax.rows import check_batch

QUIET = Meter(quiet=True)
TOKENIZER = peer_models.tokenizer()
V = 96


def sentence(rng, low, high):
    return " ".join(f"w{rng.randrange(3, V)}" for _ in range(rng.randint(low, high)))


def texts(count, seed=0):
    rng = random.Random(seed)
    return [{"text": sentence(rng, 1, 120)} for _ in range(count)]


def pairs(count, seed=0):
    rng = random.Random(seed)
    prompts = [sentence(rng, 1, 20) for _ in range(max(count // 6, 1))]
    found = []
    while len(found) < count:
        row = {"prompt": rng.choice(prompts), "chosen": sentence(rng, 1, 30)}
        found.append(row | {"rejected": sentence(rng, 31, 60)})
    return found


def responses(count, seed=0):
    rng = random.Random(seed)
    return [
        {"prompt": sentence(rng, 1, 20), "responses": [sentence(rng, 1, 40) for _ in range(2)]}
        for _ in range(count)
    ]


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return str(path)


def prepared(spec, folder, *, pairs=False, replace=False, tokenizer=TOKENIZER, **options):
    config = DataConfig(**{"row_length": 128, "workers": 1} | options)
    layout = Layout("likelihood" if pairs else "text", True)
    return prepared_rows(
        spec, config, tokenizer, folder, layout=layout, replace=replace, meter=QUIET
    )


def content(folder):
    """The shards of a folder, to the byte."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.array_record"))}


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks and shards so small that a little data makes many."""
    monkeypatch.setattr(prepare, "CHUNK_BYTES", 2000)
    monkeypatch.setattr(prepare, "_ROWS_PER_SHARD", 16)


@pytest.mark.parametrize(
    ("rows", "with_pairs"),
    [(texts(400), False), (responses(400), False), (pairs(400), True)],
    ids=["text", "responses", "preferences"],
)
def test_all_tokens_are_in_the_rows_and_rows_are_valid(tmp_path, small_chunks, rows, with_pairs):
    found = prepared(write(tmp_path / "a.jsonl", rows), tmp_path / "rows", pairs=with_pairs)
    read = found.read(range(len(found)))
    from gram_jax.rows import Batch

    batch = Batch(**{name: read[name] for name in read.dtype.names})
    check_batch(batch, V)
    m = found.manifest
    assert len(m.shards) > 2
    assert m.read["rows"] == len(rows)
    assert m.packed["tokens"] == int((batch.segment_ids != 0).sum())
    assert m.targets == int((batch.weights != 0).sum())
    if with_pairs:
        assert int((batch.pair_weight != 0).sum()) == m.packed["pairs"] == len(rows)
    else:
        wanted = []
        for row in rows:
            for text in row.get("responses") or [row["text"]]:
                ids = TOKENIZER.encode_response(text)
                # Without BOS the first token of a document is what the others follow.
                wanted += ids[1:] if "text" in row else ids
        assert sorted(wanted) == sorted(batch.targets[batch.weights != 0])


def test_rows_do_not_depend_on_the_number_of_processes(tmp_path, monkeypatch, small_chunks):
    path = write(tmp_path / "a.jsonl", texts(300))
    prepared(path, tmp_path / "one")
    monkeypatch.setattr(prepare, "_BYTES_PER_WORKER", 1)
    prepared(path, tmp_path / "two", workers=2)
    assert content(tmp_path / "one") == content(tmp_path / "two")
    assert len(content(tmp_path / "one")) > 2


def test_rows_do_not_depend_on_where_or_how_compressed_a_source_lies(tmp_path, small_chunks):
    rows = pairs(200)
    write(tmp_path / "here" / "a.jsonl", rows)
    write(tmp_path / "there" / "b.jsonl.gz", rows)
    prepared(str(tmp_path / "here" / "a.jsonl"), tmp_path / "one", pairs=True)
    prepared(str(tmp_path / "there" / "b.jsonl.gz"), tmp_path / "two", pairs=True)
    assert content(tmp_path / "one") == content(tmp_path / "two")


def test_rows_that_are_there_are_used_again(tmp_path):
    path = write(tmp_path / "a.jsonl", texts(50))
    first = prepared(path, tmp_path / "rows").manifest
    shard = next((tmp_path / "rows").glob("*.array_record"))
    before = shard.stat().st_mtime_ns
    assert prepared(path, tmp_path / "rows").manifest == first
    assert shard.stat().st_mtime_ns == before
    assert not (tmp_path / "rows" / "work").exists()


def test_a_touched_source_is_the_same_source(tmp_path):
    path = write(tmp_path / "a.jsonl", texts(50))
    first = prepared(path, tmp_path / "rows").manifest
    os.utime(path, ns=(1, 1))
    assert prepared(path, tmp_path / "rows").manifest == first


def test_a_source_that_is_gone_may_have_been_prepared_elsewhere(tmp_path):
    path = write(tmp_path / "a.jsonl", texts(50))
    first = prepared(path, tmp_path / "rows").manifest
    Path(path).unlink()
    assert prepared(path, tmp_path / "rows").manifest == first


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"row_length": 64}, "config.data.row_length was 128 and is 64"),
        ({"add_eos": False}, "config.data.add_eos was True and is False"),
        ({"too_long": "drop"}, "config.data.too_long"),
        ({"tokenizer": "other"}, "the tokenizer is another"),
        ({"content": 1}, "has changed"),
        ({"format": "responses"}, "they are rows of text"),
        ({"pairs": True}, "laid out for"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_other_rows_are_refused_or_give_way(tmp_path, change, message):
    path = write(tmp_path / "a.jsonl", texts(50))
    old = prepared(path, tmp_path / "rows").manifest
    if change.pop("content", 0):
        stat = Path(path).stat()
        rows = texts(50)
        rows[7]["text"] = rows[7]["text"].replace("w5", "w6").replace("w7", "w8")
        write(Path(path), rows)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
        assert Path(path).stat().st_size == stat.st_size
    if change.get("tokenizer"):
        values = json.loads(TOKENIZER._content)
        values["added_tokens"][0]["lstrip"] = not values["added_tokens"][0]["lstrip"]
        change["tokenizer"] = Tokenizer(
            json.dumps(values), TOKENIZER.special_tokens, None, "another"
        )
    with pytest.raises(UserError, match=message) as error:
        prepared(path, tmp_path / "rows", **change)
    assert "Delete the folder" in str(error.value)
    assert read_manifest(tmp_path / "rows") == old
    if "format" not in change and "pairs" not in change:
        new = prepared(path, tmp_path / "rows", replace=True, **change).manifest
        assert new.id != old.id


@pytest.mark.parametrize("spec", ["", "nothing.jsonl", "empty.jsonl", "folder"])
def test_a_missing_or_empty_source_is_an_error(tmp_path, spec):
    (tmp_path / "empty.jsonl").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError):
        prepared(str(tmp_path / spec) if spec else "", tmp_path / "rows")
    assert not (tmp_path / "rows" / MANIFEST).exists()


def test_a_source_of_another_kind_than_the_objective_needs_is_an_error(tmp_path):
    path = write(tmp_path / "a.jsonl", pairs(5))
    with pytest.raises(DataError, match="rows are preferences, but the objective needs text"):
        prepared(path, tmp_path / "rows")


BAD = {
    b"{broken": "not JSON",
    b'{"txt": "w5"}': "is missing",
    b'{"text": 7}': "must be text",
    b'{"text": ""}': "is empty",
    b'{"text": "w5 \xff"}': "not UTF-8",
    b'["text"]': "object",
    b'{"text": "\\ud800"}': "surrogate",
    b"": "blank",
}


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: BAD[bad])
def test_a_bad_row_stops_preparation_with_file_line_and_reason(tmp_path, bad):
    good = [json.dumps(row).encode() for row in texts(40)]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([*good[:20], bad, *good[20:], b"[]"]) + b"\n")
    with pytest.raises(DataError, match=BAD[bad]) as error:
        prepared(str(path), tmp_path / "rows")
    assert (error.value.file, error.value.line) == (str(path), 21)


def test_a_chat_row_without_a_chat_template_is_named(tmp_path):
    chat = {"prompt": [{"role": "user", "content": "w5"}], "chosen": "w6", "rejected": "w7"}
    path = write(tmp_path / "chat.jsonl", [*pairs(3), chat])
    plain = Tokenizer(TOKENIZER._content, TOKENIZER.special_tokens, None, "no template")
    with pytest.raises(DataError, match=r"chat\.jsonl:4: .*no chat template"):
        prepared(path, tmp_path / "rows", pairs=True, tokenizer=plain)


def test_bad_rows_are_put_aside_named_and_counted(tmp_path, small_chunks):
    good = [json.dumps(row).encode() for row in texts(200)]
    lines, places = list(good), []
    for number, bad in enumerate(BAD):
        places.append(20 * number + 1)
        lines.insert(20 * number, bad)
    mixed, clean = tmp_path / "mixed.jsonl", tmp_path / "clean.jsonl"
    mixed.write_bytes(b"\n".join(lines) + b"\n")
    clean.write_bytes(b"\n".join(good) + b"\n")
    found = prepared(str(mixed), tmp_path / "rows", on_bad_row="quarantine")
    assert found.manifest.read["bad_rows"] == len(BAD)
    assert found.manifest.read["rows"] == len(good) + len(BAD)
    named = [
        json.loads(x) for x in (tmp_path / "rows" / work.QUARANTINE).read_text().split("\n")[:-1]
    ]
    assert [(row["file"], row["line"]) for row in named] == [(str(mixed), n) for n in places]
    for row, bad in zip(named, BAD, strict=True):
        assert BAD[bad] in row["reason"]
    expected = prepared(str(clean), tmp_path / "clean")
    assert found.manifest.packed["tokens"] == expected.manifest.packed["tokens"]
    # Rows without the bad ones are not what on_bad_row=stop would have made.
    with pytest.raises(UserError, match="8 bad rows were left out"):
        prepared(str(mixed), tmp_path / "rows")


def test_ten_thousand_damaged_rows_are_each_used_or_named(tmp_path):
    rng = random.Random(0)
    rows = [json.dumps(row).encode() for row in pairs(10_000)]
    lines = []
    for line in rows:
        damaged = bytearray(line)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(damaged)) if damaged else 0
            kind = rng.randrange(4)
            if kind == 0:
                damaged[at : at + 1] = bytes([rng.randrange(256)])
            elif kind == 1:
                del damaged[at : at + rng.randint(1, 30)]
            elif kind == 2:
                damaged[at:at] = damaged[max(at - 9, 0) : at]
            else:
                damaged = damaged[:at]
        lines.append(bytes(damaged).replace(b"\n", b"\r"))
    path = tmp_path / "damaged.jsonl"
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    options = {"pairs": True, "on_bad_row": "quarantine", "row_length": 256}
    counts = prepared(str(path), tmp_path / "rows", **options).manifest
    named = (tmp_path / "rows" / work.QUARANTINE).read_text(encoding="utf-8").split("\n")[:-1]
    places = [json.loads(line)["line"] for line in named]
    blank = 0  # at the end of a file blank lines are no rows
    while not lines[-1 - blank].strip():
        blank += 1
    assert counts.read["rows"] == 10_000 - blank
    assert counts.read["bad_rows"] == len(places) == len(set(places))
    used = counts.read["rows"] - counts.read["bad_rows"]
    assert used > 500
    assert counts.packed["pairs"] + counts.read["dropped_pairs"] == used
    # With "stop", the first of them is named.
    with pytest.raises(DataError) as error:
        prepared(str(path), tmp_path / "other", pairs=True)
    assert error.value.line == places[0]


CHILD = """
import sys
from gram_jax.config import DataConfig
from gram_jax.data import prepare
from gram_jax.data.examples import Layout
from gram_jax.data.meter import Meter
from gram_jax.data.tokenizer import Tokenizer
if __name__ == "__main__":
    path, folder, tokenizer, workers = sys.argv[1:]
    prepare.CHUNK_BYTES, prepare._ROWS_PER_SHARD, prepare._BYTES_PER_WORKER = 4000, 16, 1
    prepare.prepared_rows(path, DataConfig(row_length=128, workers=int(workers)),
        Tokenizer.load(tokenizer), __import__("pathlib").Path(folder),
        layout=Layout("text", True), replace=False, meter=Meter(quiet=True))
"""


def test_killed_anywhere_it_goes_on_with_what_it_has(tmp_path, monkeypatch):
    """SIGKILL while chunks and shards are made, by one process or by two; then the same rows."""
    path = write(tmp_path / "a.jsonl", texts(900))
    TOKENIZER.save(tmp_path / "tokenizer")
    (tmp_path / "child.py").write_text(CHILD)
    folder = tmp_path / "rows"
    rng = random.Random(1)
    kills = chunks_kept = 0
    for attempt in range(20):
        workers = "2" if attempt == 1 else "1"
        command = [sys.executable, str(tmp_path / "child.py"), path, str(folder),
                   str(tmp_path / "tokenizer"), workers]  # fmt: skip
        child = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(Path.cwd())})
        began, had = time.monotonic(), len(list(folder.glob("work/chunk-??????")))
        moved = rng.randrange(3, 12)
        while child.poll() is None and time.monotonic() - began < 60:
            done = [*folder.glob("work/chunk-??????"), *folder.glob("work/rows-*.json")]
            if len(done) >= had + moved and kills < 3:
                child.send_signal(signal.SIGKILL)
                break
            time.sleep(0.002)
        status = child.wait(timeout=60)
        if status == 0:
            break
        assert status == -signal.SIGKILL
        kills += 1
        chunks_kept = max(chunks_kept, len(list(folder.glob("work/chunk-??????"))))
    assert kills == 3
    assert chunks_kept > 5
    monkeypatch.setattr(prepare, "CHUNK_BYTES", 4000)
    monkeypatch.setattr(prepare, "_ROWS_PER_SHARD", 16)
    prepared(path, tmp_path / "whole")
    assert content(folder) == content(tmp_path / "whole")
    assert not (folder / "work").exists()
    assert not list(folder.glob("*.tmp"))


def test_what_was_half_made_of_another_source_is_not_used(tmp_path, small_chunks):
    path = tmp_path / "a.jsonl"
    write(path, texts(200))
    path.write_bytes(path.read_bytes() + b"{broken\n")
    with pytest.raises(DataError, match=r":201: not JSON"):
        prepared(str(path), tmp_path / "rows")
    assert list((tmp_path / "rows" / "work").glob("chunk-*"))
    write(path, texts(200, seed=9))
    prepared(str(path), tmp_path / "rows")
    prepared(str(path), tmp_path / "whole")
    assert content(tmp_path / "rows") == content(tmp_path / "whole")


def stage(folder, **data):
    config = Config(
        model=ModelConfig(vocab_size=V),
        data=DataConfig(row_length=128, workers=1, **data),
        objective=ObjectiveConfig(name="next_token"),
    )
    return config, stage_data(config, TOKENIZER, folder, replace=False, quiet=True)


@pytest.mark.parametrize("orders", ["both", "random"])
def test_a_pair_that_a_judge_sees_in_both_orders_counts_once(tmp_path, orders):
    """So that a length in pairs is as many labels for a judge as for any other reading."""
    template = tmp_path / "judge.toml"
    words = "{question} w3 {response_a} w4 {response_b} w5"
    template.write_text(f'labels = ["w1", "w2"]\nprompt = "{words}"\n')
    config = Config(
        data=DataConfig(
            train=(write(tmp_path / "pairs.jsonl", pairs(60)),),
            format="preferences",
            row_length=256,
            judge_template=str(template),
            judge_orders=orders,
            workers=1,
        ),
        objective=ObjectiveConfig(name="judge"),
    )
    data = stage_data(config, TOKENIZER, tmp_path / "data", replace=False, quiet=True)
    per_row = data.per_row(())
    assert per_row["pairs"] * len(data.train) == pytest.approx(60)
    assert ", pairs 60," in data.text()[0]
    length = TrainConfig(length=60, length_unit="pairs", batch_rows=1)
    assert num_steps(length, per_row) == len(data.train)


def test_a_stage_mixes_text_and_responses_by_weight(tmp_path):
    a = write(tmp_path / "a.jsonl", texts(200))
    b = write(tmp_path / "b.jsonl", responses(300))
    _, data = stage(tmp_path / "data", train=(a, b), weights=(1.0, 3.0), validation=(a, b))
    numbers = data.order.numbers(0, 400)
    assert (numbers < data.train.sizes[0]).sum() == 100
    assert len(data.identity()) == 2
    assert len(data.validation) == len(data.train)
    tokens = [s.manifest.packed["tokens"] / len(s) for s in data.train.sets]
    expected = (tokens[0] + 3 * tokens[1]) / 4
    assert data.train.mean("tokens", (1.0, 3.0)) == pytest.approx(expected)
    length = TrainConfig(length=100 * 8 * expected, length_unit="tokens", batch_rows=8)
    assert num_steps(length, data.per_row((1.0, 3.0))) in (100, 101)
    lines = data.text()
    assert len(lines) == 4
    assert "padding" in lines[0] and a in lines[0]


def test_several_files_may_be_one_source(tmp_path, small_chunks):
    rows = texts(100)
    a, b = write(tmp_path / "a.jsonl", rows[:60]), write(tmp_path / "b.jsonl", rows[60:])
    found = prepared(f"{a},{b}", tmp_path / "rows")
    assert found.manifest.read["rows"] == 100
    assert len(found.manifest.sources) == 2


def test_progress_says_rows_per_second_and_padding(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", texts(50))
    prepared_rows(
        path, DataConfig(row_length=128, workers=1), TOKENIZER, tmp_path / "rows",
        layout=Layout("text", True), replace=False, meter=Meter(),
    )  # fmt: skip
    said = capsys.readouterr().err
    assert f"tokenising {path}: 50 rows" in said
    assert "rows/s" in said
    assert "padding" in said


def test_rows_are_read_back_as_they_were_written(tmp_path):
    found = prepared(write(tmp_path / "a.jsonl", texts(50)), tmp_path / "rows")
    again = RowSet(tmp_path / "rows")
    np.testing.assert_array_equal(found.read([3, 1]), again.read([3, 1]))
