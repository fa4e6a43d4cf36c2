"""Rankings by real models: likelihoods, judges, and the command."""

import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import peer_models
import pytest
import torch
from jsonl_files import read, write

from gram_jax.checkpoints import load_model
from gram_jax.config import ComputeConfig
from gram_jax.data.builtin import reference_topics
from gram_jax.data.judge import JudgeTemplate
from gram_jax.data.tokenizer import Tokenizer
from gram_jax.errors import DataError
from gram_jax.ranking import bradley_terry
from gram_jax.ranking_job import Engine, RankingJob, run_ranking
from gram_jax.scorer import Question, RewardSettings, Scorer, judge_probability
from gram_jax.scoring_job import ScoringJob, run_job

SIZES = {
    "vocab_size": 400, "hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 256,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
}  # fmt: skip


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
    Tokenizer.train(english, 400).save(path)
    return path


@pytest.fixture(scope="module")
def loaded(folder):
    return load_model(folder, ComputeConfig())


def english_rows(english, count):
    """Rows of two to four responses of different lengths."""
    rows = []
    for i in range(count):
        responses = [english[(i + k) % 40][20 : 40 + 20 * k] for k in range(i % 3 + 2)]
        rows.append({"id": i, "prompt": english[i % 40][:20], "responses": responses})
    return rows


def engine(scorer):
    return Engine.of(scorer)


def likelihood(loaded, **changes):
    options = {"average": "sum", "beta": 0.1, "row_length": 128, "max_length": 128,
               "too_long": "error", "batch_rows": 2}  # fmt: skip
    scorer = Scorer(loaded, RewardSettings(**options | changes))
    return engine(scorer)


def run_likelihood(folder, rows, loaded, method="", **changes):
    folder.mkdir(exist_ok=True)
    job = RankingJob(
        input=write(folder / "in.jsonl", rows), output=str(folder / "out.jsonl"), method=method
    )
    result = run_ranking(job, lambda: likelihood(loaded, **changes), stream=io.StringIO())
    return read(folder / "out.jsonl"), result.summary


@pytest.mark.parametrize("average", ["sum", "mean"])
def test_rewards_are_those_of_score(tmp_path, english, loaded, average):
    rows = english_rows(english, 30)
    found, summary = run_likelihood(tmp_path, rows, loaded, average=average)
    job = ScoringJob(
        input=str(tmp_path / "in.jsonl"), output=str(tmp_path / "scored.jsonl"),
        reward=RewardSettings(average=average, row_length=128, batch_rows=2),
    )  # fmt: skip
    scores = run_job(job, lambda: loaded, stream=io.StringIO()).summary
    for row, scored in zip(found, read(tmp_path / "scored.jsonl"), strict=True):
        np.testing.assert_allclose(row["rewards"], scored["reward"], rtol=1e-5)
        assert row["best"] == np.argmax(scored["reward"])
    assert summary.tokens_computed == scores.tokens_computed
    assert summary.compile_seconds > 0


def test_a_likelihood_gives_the_probability_of_beating_a_reference(tmp_path, english, loaded):
    rows = english_rows(english, 6)
    for row in rows:
        row["reference"] = row["responses"][-1]
    found, summary = run_likelihood(tmp_path / "p", rows, loaded, "reference")
    scored, _ = run_likelihood(tmp_path / "r", rows, loaded)
    for row, other in zip(found, scored, strict=True):
        rewards = np.array(other["rewards"])
        expected = 1 / (1 + np.exp(-0.1 * (rewards - rewards[-1])))
        np.testing.assert_allclose(row["rewards"], expected, rtol=1e-4)
        assert row["ranking"] == other["ranking"]
    assert summary.sequences == summary.responses + 6


def test_what_is_too_long_is_named_or_cut(tmp_path, english, loaded):
    long = {"id": 3, "prompt": english[1][:600], "responses": ["a", "b and c"]}
    rows = [*english_rows(english, 3), long]
    with pytest.raises(
        DataError, match=r"in\.jsonl:4: field 'responses\[1\]': prompt .* max_length=128"
    ):
        run_likelihood(tmp_path, rows, loaded)
    found, summary = run_likelihood(tmp_path / "cut", rows, loaded, too_long="truncate")
    assert ["truncated" in row for row in found] == [False, False, False, True]
    assert summary.truncated_rows == 1
    short = {"prompt": "a", "responses": ["b", "c"], "reference": english[1][:600]}
    with pytest.raises(DataError, match=r":1: field 'reference': prompt .* max_length=128"):
        run_likelihood(tmp_path / "reference", [short], loaded, "reference")


def test_what_the_tokenizer_cannot_do_is_named(tmp_path, english, loaded):
    chat = {"prompt": [{"role": "user", "content": "Hello?"}], "responses": ["a", "b"]}
    rows = [*english_rows(english, 3), chat]
    with pytest.raises(DataError, match=r"in\.jsonl:4: .* chat template"):
        run_likelihood(tmp_path, rows, loaded)


TEMPLATE = """
labels = ["A", "B"]
prompt = "{question} One: {response_a} Two: {response_b} Better:"
"""


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    path = tmp_path_factory.mktemp("template") / "judge.toml"
    path.write_text(TEMPLATE)
    return path


@pytest.fixture(scope="module")
def judge(loaded, template):
    settings = RewardSettings(reading="judge", template=JudgeTemplate.load(str(template)),
                              row_length=256, batch_rows=2)  # fmt: skip
    return Scorer(loaded, settings)


def transformers_wins(peer, tokenizer, row):
    """p(i is better than j), [n, n], from the logits of transformers in both orders."""
    texts = row["responses"]
    n = len(texts)

    def first_is_better(a, b):
        text = f"{row['prompt']} One: {a} Two: {b} Better:"
        ids = tokenizer(text).input_ids
        with torch.inference_mode():
            logits = peer(torch.tensor([ids])).logits[0, -1]
        labels = [tokenizer(text + label).input_ids[len(ids)] for label in "AB"]
        return torch.softmax(logits[labels].double(), 0)[0].item()

    p = np.array([[first_is_better(a, b) for b in texts] for a in texts])
    return np.where(np.eye(n), 0, (p + 1 - p.T) / 2)


def test_a_judge_ranks_as_the_logits_of_transformers_say(
    tmp_path, english, folder, peer, loaded, judge
):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = english_rows(english, 9)
    found = {}
    for method, options in (("", {}), ("keep_best", {}), ("reference", {"reference_index": 1})):
        job = RankingJob(
            input=write(tmp_path / "in.jsonl", rows), output=str(tmp_path / f"{method}.jsonl"),
            method=method, **options,
        )  # fmt: skip
        summary = run_ranking(job, lambda: engine(judge), stream=io.StringIO()).summary
        assert (summary.kind, summary.sequences) == ("judge", 2 * summary.comparisons)
        found[method] = read(tmp_path / f"{method}.jsonl")
    spread = 0.0
    for rated, best, against in zip(*found.values(), strict=True):
        wins = transformers_wins(peer, tokenizer, rated)
        n, ratings = len(wins), bradley_terry(wins)
        spread = max(spread, np.ptp(ratings))
        np.testing.assert_allclose(rated["rewards"], ratings, atol=1e-4)
        np.testing.assert_allclose(np.sort(ratings)[::-1], ratings[rated["ranking"]], atol=1e-4)
        np.testing.assert_allclose(
            np.delete(against["rewards"], 1), np.delete(wins[:, 1], 1), atol=1e-5
        )
        keep = 0
        for i in range(1, n):
            keep = i if wins[i, keep] > 0.5 else keep
        assert best["best"] == keep
    assert spread > 0.05  # the judge is not indifferent


def test_the_example_of_the_documentation_runs(tmp_path, english, folder, loaded, judge):
    text = (Path(__file__).parents[1] / "docs" / "ranking.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    checkpoint = tmp_path / "judge"
    shutil.copytree(folder, checkpoint)
    described = {"reward": "judge", "judge": {"template": judge.settings.template.to_dict()}}
    (checkpoint / "gram_config.json").write_text(json.dumps(described))
    rows = [row for row in english_rows(english, 9) if len(row["responses"]) == 4][:2]
    groups = [row["responses"][:3] for row in rows]
    names = {"CHECKPOINT": checkpoint, "prompts": [row["prompt"] for row in rows],
             "groups": groups, "greedy": [row["responses"][3] for row in rows]}  # fmt: skip
    exec(code, names)
    advantages, rewards = np.array(names["advantages"]), np.array(names["rewards"])
    assert advantages.shape == rewards.shape == (2, 3)
    np.testing.assert_allclose(advantages.sum(1), 0, atol=1e-5)
    pairs = [(i, 3) for i in range(3)]
    questions = [Question(row["prompt"], row["responses"], pairs) for row in rows]
    # In rows as long as the example's: in others, rounding differs.
    alike = Scorer(loaded, RewardSettings(reading="judge", template=judge.settings.template))
    for verdict, reward in zip(alike.score(questions), rewards, strict=True):
        expected = judge_probability(verdict.forward, verdict.backward)
        np.testing.assert_allclose(reward, expected, atol=1e-6)


COMMAND = [sys.executable, "-m", "gram_jax.rank"]
ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("reward", ["likelihood", "judge"])
def test_the_command_ranks_and_explains_its_errors(
    tmp_path, english, folder, loaded, judge, template, reward
):
    rows = english_rows(english, 5)
    made = likelihood(loaded) if reward == "likelihood" else engine(judge)
    (tmp_path / "here").mkdir()
    job = RankingJob(
        input=write(tmp_path / "here" / "in.jsonl", rows), output=str(tmp_path / "here" / "o.jsonl")
    )
    run_ranking(job, lambda: made, stream=io.StringIO())
    expected = read(tmp_path / "here" / "o.jsonl")
    source = write(tmp_path / "in.jsonl", rows)
    command = [*COMMAND, f"--checkpoint={folder}", f"--input={source}", "--batch_rows=8"]
    command += [f"--reward={reward}", "--row_length=256", f"--template={template}"]
    done = subprocess.run(
        [*command, f"--output={tmp_path / 'out.jsonl'}"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = read(tmp_path / "out.jsonl")
    for row, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(row["rewards"], other["rewards"], rtol=1e-5, atol=1e-5)
        assert row["ranking"] == other["ranking"]
    method = "scalar" if reward == "likelihood" else "round_robin"
    assert f"5 rows, 14 responses ranked by {reward}, method {method}" in done.stdout
    write(tmp_path / "in.jsonl", [rows[0], {"prompt": "a", "responses": "b"}])
    failed = subprocess.run(
        [*command, f"--output={tmp_path / 'no.jsonl'}"], cwd=ROOT, capture_output=True, text=True
    )
    assert failed.returncode == 2
    assert failed.stderr.strip().splitlines()[-1] == (
        f"error: {source}:2: field 'responses': must be a list of at least one response"
    )
