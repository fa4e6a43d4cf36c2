"""The job: rows in order, none twice and none lost, whatever happens to the process."""

import dataclasses
import gzip
import io
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import peer_models
import pytest
import torch
from stopped_jobs import Killed, stop_after

from gram_jax import scorer, scoring_input, scoring_job
from gram_jax.checkpoints import load_model
from gram_jax.config import ComputeConfig, MeshConfig
from gram_jax.data.builtin import reference_topics
from gram_jax.data.prompts import encode_candidates
from gram_jax.data.tokenizer import EOS, Tokenizer
from gram_jax.encoding import fit
from gram_jax.errors import DataError, UserError
from gram_jax.scorer import RewardSettings
from gram_jax.scoring_job import BLOCKS_IN_FLIGHT, ScoringJob, run_job
from gram_jax.scoring_state import JobFiles

SIZES = {
    "vocab_size": 400, "hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 256,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
}  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if m.role == 'assistant' %}"
    f"{EOS}{{% endif %}}{{{{ '\\n' }}}}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def english():
    return [" ".join(topic.text.split()) for topic in reference_topics()][:40]


@pytest.fixture(scope="module")
def peer():
    torch.set_num_threads(1)
    return peer_models.build("Llama", SIZES, seed=3)


@pytest.fixture(scope="module")
def folder(peer, english, tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    peer.save_pretrained(path)
    Tokenizer.train(english, 400, chat_template=TEMPLATE).save(path)
    return path


@pytest.fixture(scope="module")
def loaded(folder):
    return load_model(folder, ComputeConfig())


@pytest.fixture(scope="module")
def rows(english):
    """Rows of all three kinds; every fourth continues the prompt of the one before."""
    dice, made = random.Random(0), []
    for i in range(60):
        text = english[i % len(english)]
        at = dice.randrange(20, 80)
        good, bad = text[at : at + 90], english[dice.randrange(40)][:70]
        prompt = made[-1]["prompt"] if i % 4 == 3 else text[:at]
        row = {"id": i, "prompt": prompt}
        if i % 3 == 0:
            row |= {"chosen": good, "rejected": bad, "subset": "even" if i % 2 == 0 else "odd"}
        elif i % 3 == 1:
            row |= {"responses": [good, bad, good]}
        else:
            row |= {"response": good}
        made.append(row)
    return made


def write(path, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if str(path).endswith(".gz"):
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return str(path)


def read(path):
    data = Path(path).read_bytes()
    if str(path).endswith(".gz"):
        data = gzip.decompress(data)
    return [json.loads(line) for line in data.splitlines()]


def score(tmp_path, rows, loaded, name="out.jsonl", source="in.jsonl", per_token=False, **settings):
    """Runs a job over these rows; returns (rows written, result)."""
    path, output = write(tmp_path / source, rows), str(tmp_path / name)
    reward = RewardSettings(**{"row_length": 128, "batch_rows": 2} | settings)
    job = ScoringJob(input=path, output=output, reward=reward, per_token=per_token)
    result = run_job(job, lambda: loaded, stream=io.StringIO())
    return read(tmp_path / name), result


def as_list(value):
    return value if isinstance(value, list) else [value]


def check_alike(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert a["id"] == b["id"]
        assert a["num_tokens"] == b["num_tokens"]
        np.testing.assert_allclose(a["logprob"], b["logprob"], rtol=1e-5)


@pytest.fixture(scope="module")
def scored(rows, loaded, tmp_path_factory):
    return score(tmp_path_factory.mktemp("scored"), rows, loaded, per_token=True)[0]


def peer_logprobs(peer, prompt, response):
    ids = torch.tensor(np.concatenate((prompt, response)), dtype=torch.long)
    with torch.inference_mode():
        logits = peer(ids[None, :-1]).logits[0, len(prompt) - 1 :]
    return torch.log_softmax(logits, -1)[range(len(response)), response.tolist()].numpy()


def test_rows_come_back_in_order_with_the_scores_of_transformers(rows, scored, peer, loaded):
    added = ("logprob", "num_tokens", "reward", "token_logprobs")
    assert [{k: v for k, v in row.items() if k not in added} for row in scored] == rows
    for row in scored:
        responses = row.get("responses") or [
            row[k] for k in ("response", "chosen", "rejected") if k in row
        ]
        assert isinstance(row["logprob"], float) == ("response" in row)
        prompt, ids = encode_candidates(row["prompt"], responses, loaded.tokenizer)
        tokens = row["token_logprobs"] if "response" not in row else [row["token_logprobs"]]
        for i, response in enumerate(ids):
            expected = peer_logprobs(peer, prompt, response)
            np.testing.assert_allclose(as_list(row["logprob"])[i], expected.sum(), rtol=1e-4)
            np.testing.assert_allclose(tokens[i], expected, rtol=1e-4, atol=1e-4)
            assert as_list(row["num_tokens"])[i] == len(response)
            assert as_list(row["reward"])[i] == as_list(row["logprob"])[i]


def test_chat_messages_are_scored_as_their_template_writes_them(tmp_path, loaded, peer):
    prompt = [{"role": "user", "content": "What is a list?"}]
    good = [{"role": "assistant", "content": "A list is a mutable sequence."}]
    (row,), _ = score(tmp_path, [{"prompt": prompt, "chosen": good, "rejected": "No."}], loaded)
    from transformers import AutoTokenizer

    loaded.tokenizer.save(tmp_path / "tokenizer")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    text = theirs.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    assert text == "<|user|>What is a list?\n<|assistant|>"
    before = theirs(text, add_special_tokens=False).input_ids
    for i, text in enumerate(("A list is a mutable sequence.", "No.")):
        response = np.array(theirs(text + EOS, add_special_tokens=False).input_ids)
        expected = peer_logprobs(peer, np.array(before), response)
        np.testing.assert_allclose(row["logprob"][i], expected.sum(), rtol=1e-4)
        assert row["num_tokens"][i] == len(response)


def test_scores_do_not_depend_on_order_batch_or_row_length(tmp_path, rows, scored, loaded):
    shuffled = random.Random(1).sample(rows, len(rows))
    found, _ = score(tmp_path, shuffled, loaded, row_length=200, max_length=128, batch_rows=3)
    check_alike(found, [scored[row["id"]] for row in shuffled])


def test_a_pad_token_that_is_the_end_token_changes_nothing(tmp_path, rows, scored, folder, loaded):
    path = tmp_path / "tokenizer"
    loaded.tokenizer.save(path)
    peer_models.edit_json(path / "tokenizer_config.json", pad_token=EOS)
    other = dataclasses.replace(loaded, tokenizer=Tokenizer.load(path))
    assert other.tokenizer.pad_id == other.tokenizer.eos_id
    check_alike(score(tmp_path, rows, other)[0], scored)


def test_compressed_files_hold_the_same_rows(tmp_path, rows, scored, loaded):
    found, _ = score(tmp_path, rows, loaded, "out.jsonl.gz", "in.jsonl.gz", per_token=True)
    assert found == scored


def test_the_mean_is_over_the_tokens_with_the_end_token_or_without(tmp_path, rows, scored, loaded):
    found, _ = score(tmp_path, rows[:6], loaded, average="mean", add_eos=False)
    for row, other in zip(found, scored, strict=False):
        mean = np.divide(row["logprob"], row["num_tokens"])
        np.testing.assert_allclose(row["reward"], mean, rtol=1e-6)
        assert np.all(np.array(row["num_tokens"]) == np.array(other["num_tokens"]) - 1)


def test_prompts_and_equal_responses_are_computed_once(tmp_path, loaded, english):
    prompt = english[0][:200]
    rows = [{"id": i, "prompt": prompt, "responses": ["Yes.", "No.", "Yes."]} for i in range(4)]
    found, result = score(tmp_path, rows, loaded)
    assert len({json.dumps(row["logprob"]) for row in found}) == 1
    sizes = found[0]["num_tokens"]
    n = len(loaded.tokenizer.encode_prompt(prompt))
    assert result.summary.tokens == 4 * (3 * n + sum(sizes))
    assert result.summary.tokens_computed == n - 1 + sizes[0] + sizes[1]


def test_the_summary_reports_pairs_by_subset(tmp_path, rows, loaded):
    found, result = score(tmp_path, rows, loaded)
    right = sum(row["reward"][0] > row["reward"][1] for row in found if "chosen" in row)
    summary = result.summary
    assert (summary.rows, summary.candidates) == (60, 20 * 2 + 20 * 3 + 20)
    assert summary.pairs["n"] == 20
    assert summary.pairs["accuracy"]["value"] == right / 20
    assert set(summary.subsets) == {"even", "odd"}
    assert summary.tokens_computed < summary.tokens
    assert 0 < summary.padding < 1
    for word in ("60 rows", "odd", "longer wins", "tokens/s", "padding", f"{right / 20:.1%}"):
        assert word in summary.text()


def test_what_is_too_long_stops_the_job_and_is_named(tmp_path, rows, loaded, english):
    long = {"id": 9, "prompt": english[1][:900], "chosen": "a", "rejected": "b and c"}
    with pytest.raises(DataError, match=r"in\.jsonl:3: field 'rejected': prompt .* max_length=128"):
        score(tmp_path, [*rows[:2], long], loaded)


def test_what_is_truncated_is_cut_from_the_left_and_flagged(tmp_path, rows, loaded, peer, english):
    long = {"id": 2, "prompt": english[1][:900], "chosen": "a", "rejected": "b and c"}
    huge = {"id": 3, "prompt": "Say it.", "response": english[2][:900]}
    found, result = score(tmp_path, [*rows[:2], long, huge], loaded, too_long="truncate")
    assert result.summary.truncated_rows == 2
    assert "2 rows were truncated" in result.summary.text()
    assert ["truncated" in row for row in found] == [False, False, True, True]
    tokenizer = loaded.tokenizer
    prompt, ids = encode_candidates(long["prompt"], ["a", "b and c"], tokenizer)
    cut = found[2]["truncated"]
    assert cut == {"prompt_tokens": len(prompt) + len(ids[1]) - 128, "response_tokens": [0, 0]}
    kept = np.concatenate((prompt[:1], prompt[1 + cut["prompt_tokens"] :]))
    assert prompt[0] == tokenizer.bos_id
    for i in range(2):
        expected = peer_logprobs(peer, kept, ids[i]).sum()
        np.testing.assert_allclose(found[2]["logprob"][i], expected, rtol=1e-4)
    prompt, (response,) = encode_candidates(huge["prompt"], [huge["response"]], tokenizer)
    expected = {"prompt_tokens": len(prompt) - 2, "response_tokens": len(response) - 126}
    assert found[3]["truncated"] == expected
    assert found[3]["num_tokens"] == 126


def test_a_cut_keeps_bos_and_the_last_token_of_the_prompt():
    prompt, response = np.arange(10, dtype=np.int32), np.arange(50, 70, dtype=np.int32)
    short, (kept,), cut = fit(prompt, [response], 25, [0])
    assert short.tolist() == [0, 6, 7, 8, 9]
    assert len(kept) == 20
    assert cut == (5, (0,))
    short, (kept,), cut = fit(prompt, [response], 12, [0])
    assert short.tolist() == [0, 9]
    assert kept.tolist() == response[:10].tolist()
    assert cut == (8, (10,))
    short, _, _ = fit(prompt, [response], 12, [])
    assert short.tolist() == [9]
    short, (a, b), cut = fit(prompt, [response, response[:2]], 15, [0])
    assert (short.tolist(), len(a), len(b), cut) == ([0, 9], 13, 2, (8, (7, 0)))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a"}, r":2: no response, responses, or chosen and rejected"),
        ({"response": "a"}, r":2: field 'prompt': is missing"),
        ({"prompt": "a", "chosen": "b"}, r":2: field 'rejected': is missing"),
        ({"prompt": "a", "responses": []}, r":2: field 'responses': must be a list"),
        ({"prompt": "a", "responses": ["b", 3]}, r":2: field 'responses\[1\]': must be text"),
        ({"prompt": "a", "response": "b", "chosen": "c"}, r":2: field 'chosen': stands beside"),
        ({"prompt": "a", "response": "b", "reward": 1}, r":2: field 'reward': is there already"),
        ({"prompt": "a", "response": "b", "subset": 1}, r":2: field 'subset': must be text"),
    ],
)
def test_a_bad_row_is_named_before_anything_is_loaded(tmp_path, rows, row, message):
    path = write(tmp_path / "in.jsonl", [rows[0], row])
    with pytest.raises(DataError, match=message):
        run_job(ScoringJob(input=path, output=str(tmp_path / "out.jsonl")), pytest.fail)
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_length": 129}, "max_length=129 must be .* row_length=128"),
        ({"row_length": 512, "max_length": 300}, "the model's 256 positions"),
        ({"batch_rows": -1}, "batch_rows=-1 must be positive"),
        ({"average": "max"}, "average='max' must be one of sum, mean"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(tmp_path, rows, loaded, settings, message):
    with pytest.raises(UserError, match=message):
        score(tmp_path, rows, loaded, **settings)


def test_a_complete_job_is_not_done_again(tmp_path, rows, loaded, monkeypatch):
    found, first = score(tmp_path, rows, loaded)
    monkeypatch.setattr(scorer, "score_batches", pytest.fail)
    again, second = score(tmp_path, rows, loaded)
    assert (first.was_complete, second.was_complete) == (False, True)
    assert again == found
    assert second.summary == first.summary


@pytest.mark.parametrize("done", ["complete", "partial"])
def test_the_output_of_another_job_is_left_alone(tmp_path, rows, loaded, monkeypatch, done):
    if done == "complete":
        score(tmp_path, rows, loaded)
    else:
        stop_after(monkeypatch, 3)
        with pytest.raises(Killed):
            score(tmp_path, rows, loaded)
        monkeypatch.undo()
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.name != "in.jsonl"}
    for settings, message in (
        ({"average": "mean"}, "average was 'sum' and is 'mean'.*Delete it"),
        ({"max_length": 100, "row_length": 100}, "max_length was 128 and is 100"),
    ):
        with pytest.raises(UserError, match=message):
            score(tmp_path, rows, loaded, **settings)
    with pytest.raises(UserError, match="the input's rows differ"):
        score(tmp_path, [{**rows[0], "id": -1}, *rows[1:]], loaded)
    assert before == {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.name != "in.jsonl"}


def test_a_file_that_no_job_wrote_is_left_alone(tmp_path, rows, loaded):
    (tmp_path / "out.jsonl").write_text("precious\n")
    with pytest.raises(UserError, match="exists already; delete it or choose another"):
        score(tmp_path, rows, loaded)
    with pytest.raises(UserError, match="are both"):
        score(tmp_path, rows, loaded, name="in.jsonl")


def test_two_processes_do_not_write_one_output(tmp_path, rows, loaded):
    state = scoring_job.JobState({}, "")
    with JobFiles(tmp_path / "out.jsonl") as files:
        files.open(state)
        files.write_state(state)
        other = JobFiles(tmp_path / "out.jsonl")
        with other, pytest.raises(UserError, match="another process is writing it"):
            other.open(state)


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.gz"])
def test_a_job_stopped_anywhere_ends_in_the_same_file(tmp_path, rows, loaded, monkeypatch, name):
    monkeypatch.setattr(scoring_job, "BLOCK_BATCHES", 1)
    (tmp_path / "whole").mkdir()
    _, whole = score(tmp_path / "whole", rows, loaded, name)
    stops = 0
    for batches in (0, 1, 2, 3, 2, 1, 5, 4, 99):
        with monkeypatch.context() as patch:
            stop_after(patch, batches)
            try:
                _, result = score(tmp_path, rows, loaded, name)
            except Killed:
                stops += 1
                with (tmp_path / f"{name}.partial").open("ab") as stream:
                    stream.write(b'{"id": 7, "prompt": "a torn li')
    assert stops >= 4
    assert (tmp_path / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    for field in ("rows", "candidates", "tokens", "tokens_computed", "padding", "pairs", "subsets"):
        assert getattr(result.summary, field) == getattr(whole.summary, field), field
    assert not (tmp_path / f"{name}.partial").exists()


def test_lines_that_are_still_to_come_may_be_mended(tmp_path, rows, loaded, monkeypatch):
    mended = [*rows, {"id": 60, "prompt": "One", "response": "more."}]
    (tmp_path / "whole").mkdir()
    stop_after(monkeypatch, 3)
    with pytest.raises(Killed):
        score(tmp_path, rows, loaded)
    monkeypatch.undo()
    expected, _ = score(tmp_path / "whole", mended, loaded)
    found, result = score(tmp_path, mended, loaded)
    assert result.summary.rows == 61
    check_alike(found, expected)


def test_too_long_may_be_switched_to_truncate_midway(tmp_path, rows, loaded, monkeypatch, english):
    long = {"id": 60, "prompt": english[1][:900], "response": "a"}
    monkeypatch.setattr(scoring_job, "BLOCK_BATCHES", 1)
    with pytest.raises(DataError, match=":61: "):
        score(tmp_path, [*rows, long], loaded)
    assert json.loads((tmp_path / "out.jsonl.state.json").read_text())["lines"] > 0
    found, _ = score(tmp_path, [*rows, long], loaded, too_long="truncate")
    assert [row["id"] for row in found] == list(range(61))
    assert "truncated" in found[60]


def test_reading_is_never_far_ahead_of_writing(tmp_path, rows, loaded, monkeypatch):
    monkeypatch.setattr(scoring_input, "MAX_LINES", 5)
    real_read, real_append = scoring_input.read_jsonl, JobFiles.append
    lines_read, ahead, written = 0, [], 0

    def counting_read(path):
        nonlocal lines_read
        lines_read = 0
        for item in real_read(path):
            lines_read += 1
            yield item

    def counting_append(files, new):
        nonlocal written
        ahead.append(lines_read - written)
        written += len(new)
        return real_append(files, new)

    monkeypatch.setattr(scoring_input, "read_jsonl", counting_read)
    monkeypatch.setattr(JobFiles, "append", counting_append)
    score(tmp_path, rows, loaded)
    assert written == 60
    assert max(ahead) <= BLOCKS_IN_FLIGHT * 5


COMMAND = [sys.executable, "-m", "gram_jax.score"]
ROOT = Path(__file__).parents[1]


def test_killed_and_started_again_it_writes_each_row_once(tmp_path, rows, folder):
    many = [
        {**rows[i % 60], "id": i, "prompt": f"{i}: {rows[i % 60]['prompt']}"} for i in range(1200)
    ]
    source = write(tmp_path / "in.jsonl", many)
    # Small rows and batches make it slow enough to be caught in the middle.
    command = [*COMMAND, f"--checkpoint={folder}", f"--input={source}", "--batch_rows=1"]
    command += ["--row_length=128"]
    target, state = tmp_path / "out.jsonl", tmp_path / "out.jsonl.state.json"
    dice, caught = random.Random(0), 0
    for _ in range(2):
        lines = json.loads(state.read_text())["lines"] if state.exists() else 0
        process = subprocess.Popen(
            [*command, f"--output={target}"], cwd=ROOT, stderr=subprocess.PIPE, text=True
        )
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if state.exists() and json.loads(state.read_text())["lines"] > lines:
                time.sleep(dice.uniform(0, 0.3))
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.01)
        process.communicate(timeout=60)
        caught += process.returncode == -signal.SIGKILL
    assert caught >= 1
    for name in ("out.jsonl", "whole.jsonl"):
        done = subprocess.run(
            [*command, f"--output={tmp_path / name}"], cwd=ROOT, capture_output=True, text=True,
            timeout=120, check=True,
        )  # fmt: skip
        assert "1,200 rows" in done.stdout
    assert [row["id"] for row in read(target)] == list(range(1200))
    assert target.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_mesh_is_read_from_the_command_line():
    from gram_jax.mesh import parse_mesh

    assert parse_mesh("") == MeshConfig()
    assert parse_mesh("fsdp=2,context=4") == MeshConfig(fsdp=2, context=4)
    with pytest.raises(UserError, match=r"mesh.tensr is not a setting; did you mean mesh.tensor"):
        parse_mesh("tensr=4")
    with pytest.raises(UserError, match="must read fsdp=NUMBER"):
        parse_mesh("fsdp=two")


def test_the_command_explains_itself_and_its_errors(tmp_path, folder):
    shown = subprocess.run([*COMMAND, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0
    assert '{"prompt": ..., "chosen": ..., "rejected": ...}' in shown.stdout
    assert "--too_long" in shown.stdout
    source = write(tmp_path / "in.jsonl", [{"prompt": "a", "response": 3}])
    command = [*COMMAND, f"--checkpoint={folder}", f"--input={source}", "--output=o.jsonl"]
    failed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert failed.returncode == 2
    assert failed.stderr.strip().splitlines()[-1] == (
        f"error: {source}:1: field 'response': must be text, not a number"
    )
