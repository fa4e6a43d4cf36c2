"""Files by URL: read and written as local ones; what cannot be reached is said in seconds."""

import gzip
import io
import json
import socket
import threading
import time

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gram_jax import storage
from gram_jax.checkpoints import load_model
from gram_jax.config import ComputeConfig
from gram_jax.data.records import open_source
from gram_jax.data.sources import read_jsonl
from gram_jax.errors import DataError
from gram_jax.scorer import RewardSettings
from gram_jax.scoring_job import ScoringJob, run_job
from gram_jax.storage import Remote, local_output, located

ROWS = [{"text": f"w5 w{number}"} for number in range(40)]


@pytest.fixture
def memory():
    """A store in memory, emptied at the end; ``memory(path, data)`` puts a file there."""
    system = fsspec.filesystem("memory")

    def put(path, data):
        system.pipe_file(f"/{path}", data)
        return f"memory://{path}"

    yield put
    system.rm("/", recursive=True)


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def records(spec, size=100):
    return [record for block in open_source(spec).blocks(size) for _, record in block.records()]


def test_json_lines_and_parquet_are_read_by_url(memory):
    zst = pa.Codec("zstd").compress(lines(ROWS), asbytes=True)
    table = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS), table)
    kinds = {
        "a.jsonl": lines(ROWS),
        "a.jsonl.gz": gzip.compress(lines(ROWS)),
        "a.jsonl.zst": zst,
        "a.json": json.dumps(ROWS).encode(),
        "a.parquet": table.getvalue(),
    }
    for name, data in kinds.items():
        assert records(memory(f"kinds/{name}", data)) == ROWS, name


def test_folders_and_patterns_are_their_files_in_order(memory):
    for number in range(3):
        memory(f"many/part-{number}.jsonl", lines(ROWS[10 * number : 10 * number + 10]))
    memory("many/_SUCCESS", b"")
    assert records("memory://many") == records("memory://many/part-*.jsonl") == ROWS[:30]
    found = [str(path) for path in open_source("memory://many").files()]
    assert found == [f"memory:///many/part-{number}.jsonl" for number in range(3)]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("memory://none.jsonl", "there is no such file"),
        ("memory://none/*.jsonl", "no file is there, or fits the pattern"),
        ("memory://here/a.array_record", "copy or mount others"),
        ("nosuch://a/b.jsonl", "cannot be reached (Protocol not known: nosuch"),
        ("gs://bucket/a.jsonl", "gcsfs"),
    ],
)
def test_what_cannot_be_read_is_one_clear_error(memory, spec, message):
    memory("here/a.array_record", b"x")
    with pytest.raises(DataError) as caught:
        open_source(spec)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_damage_in_a_store_is_named_as_in_a_file(memory):
    spec = memory("cut.jsonl.gz", gzip.compress(lines(ROWS))[:-20])
    with pytest.raises(DataError, match="gzip data is cut off or damaged"):
        list(read_jsonl(spec))


@pytest.fixture
def silent_server():
    """A server that takes connections and says nothing: its port."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        held = []
        accept = threading.Thread(target=lambda: held.append(server.accept()), daemon=True)
        accept.start()
        yield server.getsockname()[1]
        for connection, _ in held:
            connection.close()


def test_a_store_that_does_not_answer_is_an_error_in_time(silent_server, monkeypatch):
    monkeypatch.setattr(storage, "REACH_SECONDS", 0.5)
    began = time.monotonic()
    with pytest.raises(DataError, match=r"no answer within .* check the network"):
        open_source(f"ftp://127.0.0.1:{silent_server}/a.jsonl")
    assert time.monotonic() - began < 10


def test_a_store_that_refuses_is_an_error(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(DataError, match=r"cannot be reached .*refused"):
        open_source(f"ftp://127.0.0.1:{port}/a.jsonl")


def test_what_is_written_to_a_store_appears_whole_or_not_at_all(memory, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    place = Remote("memory://out/scored.jsonl")
    with pytest.raises(KeyboardInterrupt), local_output(str(place)) as output:
        located(output).write_bytes(b"half")
        raise KeyboardInterrupt
    assert not place.exists()
    with local_output(str(place)) as output:
        assert located(output).read_bytes() == b"half"  # where it goes on
        located(output).write_bytes(b"whole\n")
    with place.open() as stream:
        assert stream.read() == b"whole\n"
    assert not list((tmp_path / "gram_jax" / "outputs").iterdir())
    with pytest.raises(DataError, match="exists already"), local_output(str(place)):
        pytest.fail("it would be overwritten")


def test_a_scoring_job_from_store_to_store(memory, tmp_path, monkeypatch, peer_model):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    _, folder = peer_model("llama")
    rows = [{"prompt": "w5 w6", "chosen": f"w{n}", "rejected": "w9"} for n in range(10, 14)]
    (tmp_path / "in.jsonl").write_bytes(lines(rows))
    source = memory("in.jsonl", lines(rows))
    reward = RewardSettings(row_length=64, batch_rows=2)

    def score(given, output):
        job = ScoringJob(input=given, output=output, reward=reward)
        run_job(job, lambda: load_model(folder, ComputeConfig()), stream=io.StringIO())

    score(str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"))
    with local_output("memory://out.jsonl") as output:
        score(source, output)
    with Remote("memory://out.jsonl").open() as stream:
        assert stream.read() == (tmp_path / "out.jsonl").read_bytes()
