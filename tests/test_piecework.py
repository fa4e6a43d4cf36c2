"""A scoring job in pieces writes what the job in one piece does, and knows what is done."""

import gzip
import io
import json
from pathlib import Path
from typing import NamedTuple

import pytest
import tiny
from several_processes import Interrupted, check_same_scores, read, rows_to_score, write

from gram_jax.config import MeshConfig
from gram_jax.data.tokenizer import Tokenizer
from gram_jax.errors import DataError, UserError
from gram_jax.models.decoder import Decoder
from gram_jax.pieces import check_blocks, cut, digest_of, jsonl_source, read_pieces
from gram_jax.piecework import by_pieces
from gram_jax.scorer import RewardSettings
from gram_jax.scoring_by_pieces import run_pieces
from gram_jax.scoring_input import check_row
from gram_jax.scoring_job import ScoringJob, run_job


class Loaded(NamedTuple):
    model: Decoder
    tokenizer: Tokenizer
    fingerprint: str


@pytest.fixture(scope="module")
def loaded():
    tokenizer = Tokenizer.train([f"Number {i} follows {i - 1}." for i in range(120)], 264)
    return Loaded(tiny.decoder(tiny.config(vocab_size=264)), tokenizer, "tiny")


def job(tmp_path, name, **settings):
    reward = RewardSettings(**{"row_length": 64, "batch_rows": 2} | settings)
    return ScoringJob(
        input=f"{tmp_path}/in.jsonl", output=f"{tmp_path}/{name}.jsonl", reward=reward
    )


def interrupt(the_job, loaded, pieces=4):
    stream = Interrupted(Path(f"{the_job.output}.shards"), pieces)
    with pytest.raises(KeyboardInterrupt):
        run_pieces(the_job, lambda: loaded, stream=stream)


def go_on(the_job, loaded):
    return run_pieces(the_job, lambda: loaded, stream=io.StringIO())


def test_in_pieces_the_same_is_written_as_in_one(tmp_path, loaded):
    write(tmp_path / "in.jsonl", rows_to_score(300))
    expected = run_job(job(tmp_path, "one"), lambda: loaded, stream=io.StringIO()).summary
    pieces = job(tmp_path, "pieces")
    interrupt(pieces, loaded)
    folder = tmp_path / "pieces.jsonl.shards"
    kept = {p.name: p.stat().st_mtime_ns for p in folder.glob("0*.json")}
    assert len(kept) == 4
    assert by_pieces(pieces.output, MeshConfig()), "it goes on as it was begun"
    found = go_on(pieces, loaded)
    assert not folder.exists()
    check_same_scores(read(tmp_path / "pieces.jsonl"), read(tmp_path / "one.jsonl"))
    assert not found.was_complete
    assert (found.summary.rows, found.summary.tokens) == (expected.rows, expected.tokens)
    pairs = found.summary.pairs
    assert (pairs["n"], pairs["accuracy"]) == (100, expected.pairs["accuracy"])
    assert pairs["margin_mean"] == pytest.approx(expected.pairs["margin_mean"], rel=1e-4)
    # A finished one is known again, also by the job in one piece.
    assert run_job(pieces, lambda: loaded).was_complete
    assert not by_pieces(job(tmp_path, "other").output, MeshConfig()), "one process alone"


def test_what_is_done_is_kept_and_what_is_damaged_is_done_again(tmp_path, loaded):
    write(tmp_path / "in.jsonl", rows_to_score(300))
    the_job = job(tmp_path, "out")
    interrupt(the_job, loaded)
    folder = tmp_path / "out.jsonl.shards"
    kept, damaged = folder / "00000.jsonl", folder / "00001.jsonl"
    was, stamp = damaged.read_bytes(), kept.stat()
    damaged.write_bytes(was.replace(b"reward", b"rewarb", 1))
    with pytest.raises(UserError, match=r"00001\.jsonl: this piece of the output cannot be used"):
        go_on(the_job, loaded)
    after = kept.stat()
    assert (after.st_ino, after.st_mtime_ns) == (stamp.st_ino, stamp.st_mtime_ns)
    assert not go_on(the_job, loaded).was_complete
    assert was in (tmp_path / "out.jsonl").read_bytes()


def test_another_job_is_refused(tmp_path, loaded):
    write(tmp_path / "in.jsonl", rows_to_score(300))
    interrupt(job(tmp_path, "out"), loaded)
    with pytest.raises(UserError, match=r"shards was made by another job: add_eos was True"):
        go_on(job(tmp_path, "out", add_eos=False), loaded)
    write(tmp_path / "in.jsonl", rows_to_score(301)[1:])
    with pytest.raises(UserError, match="the input's rows differ"):
        go_on(job(tmp_path, "out"), loaded)


def facts(path, size=1024):
    def check(row):
        check_row(row.record, ["reward"], "likelihood", file=row.file, line=row.line)
        return {"row": 1}

    return check_blocks([jsonl_source(str(path))], check, size)


def read_again(path, blocks, pieces):
    return list(read_pieces([jsonl_source(str(path))], 1024, blocks, pieces))


@pytest.mark.parametrize("name", ["in.jsonl", "in.jsonl.gz"])
def test_pieces_hold_each_row_once_in_order(tmp_path, name):
    rows = rows_to_score(500)
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path = tmp_path / name
    path.write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    blocks = facts(path)
    assert sum(block.size for block in blocks) == len(text)
    for batch_tokens in (64, 1024, 1 << 20):
        pieces = cut(blocks, batch_tokens)
        assert pieces[0].first == 0
        assert sum(piece.blocks for piece in pieces) == len(blocks)
        # At least a batch each, but for the last one.
        for piece in pieces[:-1]:
            some = blocks[piece.first : piece.first + piece.blocks]
            assert sum(block.size for block in some) >= 4 * batch_tokens
        found = read_again(path, blocks, pieces)
        assert [piece for piece, _ in found] == pieces
        assert [row.record for _, some in found for row in some] == rows
        assert [row.line for _, some in found for row in some] == list(range(1, 501))
        odd = read_again(path, blocks, pieces[1::2])
        assert odd == found[1::2]
    assert len(cut(blocks, 64)) >= 4
    assert len(cut(blocks, 1 << 20)) == 1


def test_a_file_that_changes_is_noticed(tmp_path):
    path = tmp_path / "in.jsonl"
    write(path, rows_to_score(100))
    blocks = facts(path)
    pieces = cut(blocks, 64)
    other = path.read_bytes().replace(b"Number", b"Numbar", 1)
    path.write_bytes(other)
    assert digest_of(facts(path)) != digest_of(blocks)
    with pytest.raises(UserError, match="has changed since it was checked"):
        read_again(path, blocks, pieces)
    write(path, rows_to_score(20))
    with pytest.raises(UserError, match=r"has changed since it was checked|become shorter"):
        read_again(path, blocks, pieces[-1:])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a", "response": "b"}\nnot json\n', "in.jsonl:2: "),
        ('{"prompt": "a", "response": "b", "reward": 1}\n', "in.jsonl:1: field 'reward': is there"),
        ("", "the file is empty"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, text, message):
    path = tmp_path / "in.jsonl"
    path.write_text(text)
    with pytest.raises(DataError) as caught:
        facts(path)
    assert message in str(caught.value)
