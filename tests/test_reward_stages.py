"""From response pairs to a judge, and from a model to a reward head: trained, stored, scored."""

import dataclasses
import io
import json
import math
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

from gram_jax.checkpoints import find_step_folder, load_model, read_run_info
from gram_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    ObjectiveConfig,
    OptimizerConfig,
    TrainConfig,
)
from gram_jax.data.judge import JudgeTemplate
from gram_jax.data.loader import RowOrder
from gram_jax.data.rowset import RowSet
from gram_jax.data.stage import stage_data
from gram_jax.data.tokenizer import Tokenizer
from gram_jax.errors import UserError
from gram_jax.loop import run_stage
from gram_jax.model_card import export_checkpoint
from gram_jax.reporting import read_metrics
from gram_jax.reward_model import stored_settings
from gram_jax.scorer import Question, Scorer, judge_probability
from gram_jax.scoring_job import ScoringJob, run_job

V = 280
TEMPLATE = """
labels = ["A", "B"]
prompt = '''Question {question}
First: {response_a}
Second: {response_b}
Best:'''
pretrain_prompt = "Question {question}"
pretrain_response = "First: {response_a} Second: {response_b}"
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The better response says yes; each has as many words as the other."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    words = ["one", "two", "red", "blue", "day"]
    rows = []
    for i in range(60):
        fill = [" ".join(rng.choice(words, 2)) for _ in range(2)]
        rows.append(
            {"prompt": f"{i % 20}?", "chosen": f"yes {fill[0]}", "rejected": f"no {fill[1]}"}
        )
    pairs = [{"prompt": r["prompt"], "responses": [r["chosen"], r["rejected"]]} for r in rows]
    for name, some in (("train", rows[:40]), ("held_out", rows[40:]), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    (folder / "judge.toml").write_text(TEMPLATE)
    texts = [TEMPLATE, *(f"{r['prompt']} {r['chosen']} {r['rejected']}" for r in rows)]
    Tokenizer.train(texts, V).save(folder / "tokenizer")
    return folder


def config(data, source, name, format, init_from="", steps=30, **objective):
    return Config(
        init_from=str(init_from),
        tokenizer=str(data / "tokenizer"),
        model=tiny.config(vocab_size=V),
        compute=dataclasses.replace(tiny.COMPUTE),
        data=DataConfig(
            train=(str(data / f"{source}.jsonl"),),
            format=format,
            row_length=128,
            judge_template=str(data / "judge.toml"),
        ),
        objective=ObjectiveConfig(name=name, **objective),
        optimizer=OptimizerConfig(learning_rate=1e-2, weight_decay=0.0),
        train=TrainConfig(length=steps, batch_rows=8),
        checkpoint=CheckpointConfig(every=100),
    )


@pytest.fixture(scope="module")
def pretrained(data, tmp_path_factory):
    """Stage 1 on response pairs, one sequence each."""
    workdir = tmp_path_factory.mktemp("pretrain")
    run_stage(config(data, "pairs", "next_token", "pairs", steps=10), workdir, quiet=True)
    return workdir


@pytest.fixture(scope="module")
def judge(data, pretrained, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("judge")
    asked = config(data, "train", "judge", "preferences", pretrained, steps=80)
    run_stage(asked, workdir, quiet=True)
    return workdir


@pytest.fixture(scope="module")
def head(data, pretrained, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("head")
    asked = config(data, "train", "bradley_terry", "preferences", pretrained, chosen_ce=0.1)
    run_stage(asked, workdir, quiet=True)
    return workdir


def accuracy(data, workdir, tmp_path, **changes):
    settings = dataclasses.replace(stored_settings(workdir), row_length=128, **changes)
    output = tmp_path / "out.jsonl"
    job = ScoringJob(input=str(data / "held_out.jsonl"), output=str(output), reward=settings)
    run_job(job, lambda: load_model(workdir, tiny.COMPUTE), stream=io.StringIO())
    rows = [json.loads(line) for line in output.open()]
    return rows, np.mean([row["reward"][0] > row["reward"][1] for row in rows])


def test_stage_1_learns_both_responses_after_the_question(data, pretrained):
    lines = read_metrics(pretrained, split="train")
    assert lines[0]["loss"] == pytest.approx(math.log(V), abs=0.3)
    assert lines[-1]["loss"] < lines[0]["loss"] - 1
    info = read_run_info(find_step_folder(pretrained))
    assert info.judge["template"] == JudgeTemplate.load(data / "judge.toml").to_dict()
    assert stored_settings(pretrained).reading == "likelihood"


def test_a_judge_learns_and_its_checkpoint_says_how_to_read_it(data, judge, tmp_path):
    lines = read_metrics(judge, split="train")
    assert lines[0]["ranking_loss"] == pytest.approx(math.log(2), abs=0.1)
    assert lines[-1]["loss"] < 0.25 and lines[-1]["accuracy"] > 0.95
    assert stored_settings(judge).reading == "judge"
    rows, right = accuracy(data, judge, tmp_path)
    assert right == 1
    forward, backward = np.array([row["log_odds"] for row in rows]).T
    assert (forward > 0).all() and (backward < 0).all()
    # Near the optimum of the smoothed loss, log((1 - e) / e) = 2.94, and not far beyond.
    assert 1.5 < forward.mean() < 5


@pytest.mark.parametrize(("orders", "count", "weight"), [("both", 80, 0.5), ("random", 40, 1.0)])
def test_both_orders_are_trained_on_or_one_at_random(data, tmp_path, orders, count, weight):
    tokenizer = Tokenizer.load(data / "tokenizer")
    asked = config(data, "train", "judge", "preferences")
    asked.data.judge_orders = orders
    rows = stage_data(asked, tokenizer, tmp_path, replace=True, quiet=True).train
    batch = rows.read(np.arange(len(rows)))
    used = batch.pair_weight != 0
    assert used.sum() == count and set(batch.pair_weight[used]) == {weight}
    first_is_better = (batch.pair_target[used] == 1).sum()
    assert first_is_better == 40 if orders == "both" else 8 < first_is_better < 32


def test_the_log_counts_a_pair_once(data, pretrained, tmp_path):
    """A judge sees it in both orders, each with half its weight: their sum is the number."""
    asked = config(data, "train", "judge", "preferences", pretrained, steps=1)
    asked.data.validation = (str(data / "held_out.jsonl"),)
    result = run_stage(asked, tmp_path, quiet=True)
    assert result.validation["pairs"] == 20
    rows = RowSet(tmp_path / "data" / "train" / "0")
    first = rows.read(RowOrder([len(rows)], asked.seed).numbers(0, 8))
    assert result.metrics["pairs"] == first["pair_weight"].sum() > 1
    assert [row["pairs"] for row in read_metrics(tmp_path)] == [result.metrics["pairs"], 20]


def test_a_head_learns_and_its_checkpoint_says_so(data, head, tmp_path):
    lines = read_metrics(head, split="train")
    assert lines[-1]["accuracy"] > 0.95
    assert lines[-1]["loss"] > lines[-1]["ranking_loss"]  # the text regulariser
    assert stored_settings(head).reading == "head"
    rows, right = accuracy(data, head, tmp_path)
    assert right == 1
    assert "logprob" not in rows[0]


def test_a_head_starts_new_on_a_language_model_and_goes_on_from_a_head(data, head, pretrained):
    assert not hasattr(load_model(pretrained, tiny.COMPUTE).model, "head")
    again = config(data, "train", "bradley_terry", "preferences", head, steps=1)
    again.optimizer.learning_rate = 1e-9
    workdir = data / "again"
    run_stage(again, workdir, quiet=True)
    kept = load_model(workdir, tiny.COMPUTE).model.head[...]
    np.testing.assert_allclose(kept, load_model(head, tiny.COMPUTE).model.head[...], atol=1e-6)


def test_only_the_head_is_trained_on_a_frozen_trunk_and_it_resumes(data, pretrained, tmp_path):
    asked = config(data, "train", "bradley_terry", "preferences", pretrained, steps=4)
    asked.train.head_only = True
    asked.checkpoint.every = 2
    run_stage(asked, tmp_path / "whole", quiet=True)
    trunk = load_model(pretrained, tiny.COMPUTE).model
    found = load_model(tmp_path / "whole", tiny.COMPUTE).model
    np.testing.assert_array_equal(found.embedding[...], trunk.embedding[...])
    np.testing.assert_array_equal(found.stacks[0].q[...], trunk.stacks[0].q[...])
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "4")
    run_stage(asked, tmp_path / "resumed", quiet=True)
    resumed = load_model(tmp_path / "resumed", tiny.COMPUTE).model
    jax.tree.map(np.testing.assert_array_equal, resumed, found)


def test_a_trained_head_goes_out_as_a_classifier_and_comes_back(data, head, tmp_path):
    folder = export_checkpoint(head, tmp_path / "out")
    described = json.loads((folder / "gram_config.json").read_text())
    assert described["reward"] == "head" and described["objective"]["name"] == "bradley_terry"
    assert "discriminative" in (folder / "README.md").read_text()
    (tmp_path / "again").mkdir()
    rows, _ = accuracy(data, head, tmp_path)
    again, right = accuracy(data, folder, tmp_path / "again")
    assert right == 1
    rewards, rewards_again = (np.array([row["reward"] for row in some]) for some in (rows, again))
    np.testing.assert_allclose(rewards_again, rewards, rtol=1e-5, atol=1e-5)
    # A head goes on from it; nothing that needs log-probs does.
    asked = config(data, "train", "bradley_terry", "preferences", folder, steps=1)
    asked.optimizer.learning_rate = 1e-9
    run_stage(asked, tmp_path / "more", quiet=True)
    found = load_model(tmp_path / "more", tiny.COMPUTE).model
    assert not found.config.has_unembedding
    np.testing.assert_allclose(
        found.head[...], load_model(head, tiny.COMPUTE).model.head[...], atol=1e-6
    )
    for name, options in (("judge", {}), ("bradley_terry", {"chosen_ce": 0.1})):
        refused = config(data, "train", name, "preferences", folder, **options)
        with pytest.raises(UserError, match="this model is a sequence classifier"):
            run_stage(refused, tmp_path / f"no_{name}", quiet=True)


@pytest.mark.parametrize("classifier", [False, True], ids=["language model", "classifier"])
def test_a_trained_judge_goes_out_and_judges_the_same(data, judge, tmp_path, classifier):
    folder = export_checkpoint(judge, tmp_path / "out", classifier=classifier)
    info = read_run_info(find_step_folder(judge)).judge
    described = json.loads((folder / "gram_config.json").read_text())["judge"]
    assert described["template"] == info["template"] and described["labels"] == info["labels"]
    assert described["trained_on_orders"] == "both"
    (tmp_path / "again").mkdir()
    rows, _ = accuracy(data, judge, tmp_path)
    again, _ = accuracy(data, folder, tmp_path / "again")
    odds, odds_again = (np.array([row["log_odds"] for row in some]) for some in (rows, again))
    np.testing.assert_allclose(odds_again, odds, rtol=1e-5, atol=1e-5)


def test_the_code_of_the_documentation_gives_our_numbers(head, judge, tmp_path):
    text = (Path(__file__).parents[1] / "docs" / "export.md").read_text(encoding="utf-8")
    for_head, for_judge = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    question = Question("What is 2 + 2?", ["4.", "It is five."], [(0, 1)])
    names = {"folder": export_checkpoint(head, tmp_path / "head")}
    exec(for_head, names)
    settings = dataclasses.replace(stored_settings(head), row_length=128)
    (ours,) = Scorer(load_model(head, tiny.COMPUTE), settings).score([question])
    np.testing.assert_allclose(names["rewards"].detach(), ours.rewards, rtol=1e-5, atol=1e-5)
    names = {"folder": export_checkpoint(judge, tmp_path / "judge", classifier=True)}
    exec(for_head.split("texts =")[0] + for_judge, names)
    settings = dataclasses.replace(stored_settings(judge), row_length=128)
    (ours,) = Scorer(load_model(judge, tiny.COMPUTE), settings).score([question])
    assert names["s_ab"].item() == pytest.approx(ours.forward[0], rel=1e-5, abs=1e-5)
    p = judge_probability(ours.forward, ours.backward)[0]
    assert names["p"].item() == pytest.approx(p, abs=1e-5)


def test_a_judge_compares_any_responses(data, judge):
    loaded = load_model(judge, tiny.COMPUTE)
    settings = dataclasses.replace(stored_settings(judge), row_length=128)
    scorer = Scorer(loaded, settings)
    (verdict,) = scorer.score([Question("7?", ["no day", "yes day", "no red"], [(0, 1), (1, 2)])])
    assert verdict.forward[0] < 0 < verdict.forward[1]


def test_a_template_whose_labels_are_no_tokens_stops_before_training(data, pretrained, tmp_path):
    bad = tmp_path / "bad.toml"
    bad.write_text(TEMPLATE.replace('["A", "B"]', '["first", "second"]'))
    asked = config(data, "train", "judge", "preferences", pretrained)
    asked.data.judge_template = str(bad)
    with pytest.raises(UserError, match=r"label 'first' is not one token"):
        run_stage(asked, tmp_path / "run", quiet=True)
