"""A shuffled file is scored by prompts and written in its own order, whatever happens between."""

import gzip
import io
import json
import random

import numpy as np
import pytest
from stopped_jobs import Killed, stop_after

from benchmarks.models import SHAPES, write_model
from gram_jax import scoring_job
from gram_jax.checkpoints import load_model
from gram_jax.config import ComputeConfig
from gram_jax.data.builtin import reference_topics
from gram_jax.data.tokenizer import Tokenizer
from gram_jax.errors import DataError, UserError
from gram_jax.grouping import PromptOrder, has_places, lines_of, rows_of
from gram_jax.scorer import RewardSettings
from gram_jax.scoring_job import ScoringJob, run_job

PROMPTS, PAIRS = 12, 5


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    texts, folder = [topic.text for topic in reference_topics()], tmp_path_factory.mktemp("model")
    write_model(folder, SHAPES["tiny"], Tokenizer.train(texts, SHAPES["tiny"].vocab_size))
    return load_model(folder, ComputeConfig())


@pytest.fixture(scope="module")
def rows():
    """Pairs of a few long prompts, shuffled, so that those of a prompt are far apart."""
    texts = [" ".join(topic.text.split()) for topic in reference_topics()]
    made = [
        {
            "id": f"{prompt}-{pair}",
            "prompt": texts[prompt][:160],
            "chosen": texts[20 + pair][: 20 + 3 * prompt],
            "rejected": texts[30 + pair][: 50 - prompt],
        }
        for prompt in range(PROMPTS)
        for pair in range(PAIRS)
    ]
    random.Random(0).shuffle(made)
    return made


def write(path, rows):
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def score(folder, rows, loaded, name="in.jsonl", output="out.jsonl", **settings):
    folder.mkdir(exist_ok=True)
    if rows is not None:
        write(folder / name, rows)
    reward = RewardSettings(row_length=256, batch_rows=1, **settings)
    job = ScoringJob(input=str(folder / name), output=str(folder / output), reward=reward)
    result = run_job(job, lambda: loaded, stream=io.StringIO())
    raw = (folder / output).read_bytes()
    found = gzip.decompress(raw) if output.endswith(".gz") else raw
    return [json.loads(line) for line in found.decode().split("\n")[:-1]], result


def rewards(rows):
    return {row["id"]: row["reward"] for row in rows}


def test_lines_are_taken_by_prompts_in_the_order_of_their_first_lines():
    order = PromptOrder()
    for prompt in ("b", "a", "b", [{"role": "user", "content": "a"}], "a"):
        order.add(prompt)
    assert order.lines().tolist() == [1, 3, 2, 5, 4]


def test_a_file_that_is_by_prompts_already_is_left_so():
    order = PromptOrder()
    for prompt in ("b", "b", "a", "c"):
        order.add(prompt)
    assert order.lines() is None
    assert PromptOrder().lines() is None


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"", b"\n", b"\n\n"])
def test_a_line_is_found_by_its_place(tmp_path, start, end, monkeypatch):
    monkeypatch.setattr("gram_jax.grouping._CHUNK", 7)  # ends of lines fall on ends of chunks, too
    file = tmp_path / "a.jsonl"
    lines = [{"n": n, "x": "\u2028é" * n} for n in range(9)]
    raw = [json.dumps(line, ensure_ascii=False).encode() for line in lines]
    file.write_bytes(start + b"\n".join(raw) + end)
    order = np.array([9, 1, 5, 2, 8])
    assert list(rows_of(file, order)) == [(n, lines[n - 1]) for n in order]
    assert list(lines_of(file, order - 1)) == [raw[n - 1] + b"\n" for n in order]


def test_only_plain_files_on_a_disk_have_places(tmp_path):
    for name, expected in (("a.jsonl", True), ("a.jsonl.gz", False), ("a.json", False)):
        (tmp_path / name).write_bytes(b"{}\n")
        assert has_places(tmp_path / name) == expected
    assert not has_places("memory://a.jsonl")


def test_a_shuffled_file_is_computed_like_a_sorted_one_and_keeps_its_order(tmp_path, rows, loaded):
    found, result = score(tmp_path / "a", rows, loaded)
    assert [row["id"] for row in found] == [row["id"] for row in rows]
    by_prompt = sorted(rows, key=lambda row: row["prompt"])
    expected, ordered = score(tmp_path / "b", by_prompt, loaded)
    in_order, packed = score(tmp_path / "c", rows, loaded, "in.jsonl.gz")
    for other in (rewards(expected), rewards(in_order)):
        for name, reward in rewards(found).items():
            np.testing.assert_allclose(reward, other[name], rtol=1e-5, atol=1e-5)
    assert result.summary.pairs["n"] == PROMPTS * PAIRS
    assert result.summary.tokens == packed.summary.tokens
    assert result.summary.tokens_computed <= 1.02 * ordered.summary.tokens_computed


def test_blocks_share_what_their_prompts_have_in_common(tmp_path, rows, loaded, monkeypatch):
    monkeypatch.setattr(scoring_job, "BLOCK_BATCHES", 2)
    _, by_prompt = score(tmp_path / "a", rows, loaded)
    _, in_order = score(tmp_path / "b", rows, loaded, "in.jsonl.gz")
    assert by_prompt.summary.tokens_computed < 0.7 * in_order.summary.tokens_computed


@pytest.mark.parametrize("output", ["out.jsonl", "out.jsonl.gz"])
def test_stopped_anywhere_it_ends_in_the_same_file(tmp_path, rows, loaded, monkeypatch, output):
    monkeypatch.setattr(scoring_job, "BLOCK_BATCHES", 1)
    whole, _ = score(tmp_path / "whole", rows, loaded, output=output)
    stops = 0
    for batches in (0, 3, 2, 5, 4, 99):
        with monkeypatch.context() as patch:
            stop_after(patch, batches)
            try:
                found, result = score(tmp_path / "cut", rows, loaded, output=output)
            except Killed:
                stops += 1
    assert stops >= 4 and found == whole
    assert (tmp_path / "cut" / output).read_bytes() == (tmp_path / "whole" / output).read_bytes()
    assert sorted(file.name for file in (tmp_path / "cut").iterdir()) == [
        "in.jsonl", output, f"{output}.state.json"
    ]  # fmt: skip
    _, again = score(tmp_path / "cut", None, loaded, output=output)
    assert again.was_complete and again.summary == result.summary


def test_another_file_is_not_mixed_with_what_is_done(tmp_path, rows, loaded, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        with pytest.raises(Killed):
            score(tmp_path / "a", rows, loaded)
    other = [*rows[:-1], {**rows[-1], "chosen": "Something else."}]
    with pytest.raises(UserError, match="the input's rows differ"):
        score(tmp_path / "a", other, loaded)


def test_a_job_that_an_earlier_version_began_in_file_order_goes_on_so(
    tmp_path, rows, loaded, monkeypatch
):
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        patch.setattr(scoring_job, "has_places", lambda path: False)
        with pytest.raises(Killed):
            score(tmp_path / "a", rows, loaded)
    state = tmp_path / "a" / "out.jsonl.state.json"
    values = json.loads(state.read_text())
    assert values["lines"] > 0 and not values.pop("by_prompt")
    state.write_text(json.dumps(values))
    found, _ = score(tmp_path / "a", rows, loaded)
    assert [row["id"] for row in found] == [row["id"] for row in rows]
    assert not json.loads(state.read_text())["by_prompt"]


def test_a_row_that_is_too_long_is_named_by_its_line(tmp_path, rows, loaded):
    long = {"id": "long", "prompt": rows[0]["prompt"], "response": "word " * 400}
    with pytest.raises(DataError, match=rf"in\.jsonl:{len(rows) + 1}: "):
        score(tmp_path / "a", [*rows, long], loaded)
