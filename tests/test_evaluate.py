"""Evaluation: from files to numbers, rows and a report, with nothing lost on the way."""

import dataclasses
import gzip
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import peer_models
import pytest
from strength_judge import StrengthJudge, StrengthScorer

from gram_jax.checkpoints import load_model
from gram_jax.comparison import compare_runs
from gram_jax.config import ComputeConfig
from gram_jax.data.builtin import reference_topics
from gram_jax.data.judge import JudgeTemplate
from gram_jax.data.tokenizer import Tokenizer
from gram_jax.errors import DataError, UserError
from gram_jax.evaluation_input import EvaluationData
from gram_jax.evaluation_job import EvaluationJob, run_evaluation
from gram_jax.packing import PackCounts
from gram_jax.pieces import check_blocks, cut, read_pieces
from gram_jax.ranking_job import Engine
from gram_jax.scorer import QuestionError, RewardSettings, Scorer
from gram_jax.scoring import EngineCounts
from gram_jax.scoring_job import ScoringJob, run_job


def pair(prompt, chosen, rejected, **columns):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **columns}


BATCH_TOKENS = 64

# Responses that say how good they are: margins 2, -1, 0, 3, 1.
PAIRS = [
    pair("a", "3", "1", subset="x", id="first"),
    pair("b", "1.5", "2.5", subset="x"),
    pair("c", "2", "2.0", subset="y"),
    pair("c", "4", "1", subset="y"),
    pair("d long", "2", "1.00", subset="x"),
]


def write(path, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


def engine(scorer):
    return Engine(scorer, {"checkpoint": "abc"}, PackCounts(), EngineCounts(), BATCH_TOKENS)


def evaluate(folder, rows, scorer, name="out", **settings):
    """Evaluates on these rows; returns (results.json, rows of results.jsonl, console)."""
    data = settings.pop("data", None) or (write(folder / f"{name}.data.jsonl", rows),)
    job = EvaluationJob(checkpoint="model", data=data, output=str(folder / name), **settings)
    text = run_evaluation(job, lambda: engine(scorer), stream=io.StringIO())
    return (*read(folder / name), text)


def read(folder):
    lines = (folder / "results.jsonl").read_text().splitlines()
    return json.loads((folder / "results.json").read_text()), [json.loads(x) for x in lines]


@pytest.mark.parametrize("kind", ["likelihood", "head"])
def test_rewards_make_margins_and_accuracies(tmp_path, kind):
    found, rows, text = evaluate(tmp_path, PAIRS, StrengthScorer(kind))
    assert [row["margin"] for row in rows] == [2, -1, 0, 3, 1]
    assert [row["outcome"] for row in rows] == ["right", "wrong", "tie", "right", "right"]
    assert [row["rewards"] for row in rows][1] == [1.5, 2.5]
    assert [row["id"] for row in rows] == ["first", "2", "3", "4", "5"]
    # beta is 2: p = sig(2 x margin).
    assert rows[1]["p"] == pytest.approx(1 / (1 + np.exp(2)), rel=1e-6)
    everything = found["subsets"]["(all)"]["pairs"]
    assert (everything["n"], everything["ties"]) == (5, 1)
    assert everything["accuracy"]["value"] == 3.5 / 5
    assert found["subsets"]["x"]["pairs"]["accuracy"]["value"] == pytest.approx(2 / 3)
    # Macro: x 2 of 3, y 1.5 of 2.
    assert found["macro"]["value"] == pytest.approx((2 / 3 + 3 / 4) / 2)
    assert (found["pairs"], found["responses"], found["sequences"]) == (5, 10, 10)
    assert found["subsets"]["y"]["rewards"]["mean"] == pytest.approx((2 + 2 + 4 + 1) / 4)
    assert found["subsets"]["y"]["judge"] is None
    assert "reward: " + kind in text
    assert "counted one half: 1\n" in text


def test_a_judge_is_asked_in_both_orders(tmp_path):
    found, rows, text = evaluate(tmp_path, PAIRS, StrengthJudge(1.5))
    # Log-odds that the better one is better: margin + 1.5 shown first, margin - 1.5 second.
    assert [row["log_odds"] for row in rows][:2] == [[3.5, 0.5], [0.5, -2.5]]
    assert [row["margin"] for row in rows] == [2, -1, 0, 3, 1]

    def sig(x):
        return 1 / (1 + np.exp(-x))

    assert rows[0]["p"] == pytest.approx((sig(3.5) + sig(0.5)) / 2, rel=1e-6)
    judge = found["subsets"]["(all)"]["judge"]
    # Consistent: margins 2 and 3 alone exceed what it favours.
    assert (judge["consistency"], judge["undecided"]) == (2 / 5, 1 / 5)
    assert judge["mean_first"] > 0.5
    assert (found["sequences"], found["truncated"]) == (10, 1)
    assert found["subsets"]["(all)"]["rewards"] is None
    assert [row["truncated"] for row in rows] == [False] * 4 + [True]
    assert "something was cut to fit: 1\n" in text
    assert "mean p(A)" in text


def test_pairs_that_share_a_prompt_have_an_interval_by_bootstrap(tmp_path):
    found, _, text = evaluate(tmp_path, PAIRS, StrengthScorer())
    assert found["subsets"]["x"]["interval"] == "wilson"
    assert found["subsets"]["y"]["interval"] == "bootstrap"
    assert (found["subsets"]["y"]["prompts"], found["subsets"]["(all)"]["prompts"]) == (1, 4)
    assert "y*" in text


def test_what_is_odd_about_the_pairs_is_counted_and_printed(tmp_path):
    rows = [*PAIRS, PAIRS[0], PAIRS[0], pair("b", "2.5", "1.5"), pair("e", "1", "1")]
    found, _, text = evaluate(tmp_path, rows, StrengthScorer())
    assert (found["repeated"], found["contrary"], found["identical"]) == (2, 2, 1)
    assert found["pairs"] == 9
    for words in ("an earlier one, and count again: 2\n", "equal responses: 1\n", "as well: 2\n"):
        assert words in text
    plain, _, text = evaluate(tmp_path, PAIRS, StrengthScorer(), name="plain")
    assert (plain["repeated"], plain["contrary"], plain["identical"]) == (0, 0, 0)
    assert "repeat" not in text


def test_the_folder_says_what_its_numbers_are_made_of(tmp_path):
    import hashlib

    found, _, _ = evaluate(tmp_path, PAIRS, StrengthScorer(), seed=4)
    path = tmp_path / "out.data.jsonl"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    (data,) = found["data"]
    assert (data["benchmark"], data["rows"]) == ("preferences", 5)
    assert data["sha256"] == {str(path): digest}
    assert (found["checkpoint"], found["kind"], found["seed"]) == ("model", "likelihood", 4)
    assert found["settings"] == {"checkpoint": "abc"}
    assert "jax" in found["versions"]
    assert sum(found["reliability"]["count"]) == 5


def test_the_report_stands_alone_and_the_tables_can_be_pasted(tmp_path):
    evaluate(tmp_path, PAIRS, StrengthJudge())
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<svg") == 4
    for words in ("longer wins", "ECE", "Accuracy", digest_start(tmp_path)):
        assert words in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "src=" not in page
    table = (tmp_path / "out" / "results.md").read_text()
    assert "| x | 3 | 0.667 [" in table


def digest_start(folder):
    data = json.loads((folder / "out" / "results.json").read_text())["data"]
    return next(iter(data[0]["sha256"].values()))[:12]


def test_files_of_several_kinds_are_reported_apart(tmp_path):
    bench = [
        {"pair_id": "j", "source": "livecodebench", "question": "q", "response_A": "1",
         "response_B": "2", "label": "B>A"},
    ]  # fmt: skip
    listed = tmp_path / "natural.json"
    one = {"input": "q", "output_1": "2", "output_2": "1", "label": 1}
    listed.write_text(json.dumps([one, one | {"label": 2}], indent=1))
    data = (
        write(tmp_path / "plain.jsonl.gz", [pair("a", "2", "1")]),
        write(tmp_path / "bench.jsonl", bench),
        str(listed),
    )
    found, rows, text = evaluate(tmp_path, [], StrengthJudge(), data=data)
    names = ["preferences/plain", "judgebench/Coding", "llmbar/natural", "(all)"]
    assert list(found["subsets"]) == names
    assert [(row["file"], row["line"]) for row in rows[-2:]] == [(str(listed), 1), (str(listed), 2)]
    assert [one["title"] for one in found["official"]] == ["JudgeBench", "LLMBar"]
    judgebench = {one["name"]: one["value"] for one in found["official"][0]["sums"]}
    assert (judgebench["Coding"], judgebench["Macro"]) == (1.0, None)
    assert "Not the official sum: there is nothing of Knowledge, Reasoning, Math" in text
    assert "natural 2 (published 100)" in text


def items(path, *benchmark, **settings):
    data = EvaluationData([path], *benchmark, **settings)
    blocks = check_blocks(data.sources, lambda row: {"pair": len(data.item(row).pairs)}, 1024)
    found = read_pieces(data.sources, 1024, blocks, cut(blocks, 64))
    return [data.item(row) for _, rows in found for row in rows]


def test_chat_makes_a_users_message_of_a_prompt_that_is_text(tmp_path):
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    rows = [pair("a", "1", "2"), pair(messages, "1", "2")]
    path = write(tmp_path / "a.jsonl", rows)
    assert [item.prompt for item in items(path, chat=True)] == [
        [{"role": "user", "content": "a"}],
        messages,
    ]
    assert items(path)[0].prompt == "a"


def test_a_benchmark_can_be_named(tmp_path):
    path = write(tmp_path / "a.jsonl", [pair("a", "1", "2", subset="shp")])
    assert items(path)[0].benchmark == "preferences"
    assert items(path, "rewardbench")[0].benchmark == "rewardbench"
    with pytest.raises(DataError, match=r"a.jsonl:1: field 'domain': is missing"):
        items(path, "rmbench")


def test_all_data_is_checked_before_the_model_is_loaded(tmp_path):
    def load():
        raise AssertionError("the model was loaded")

    bad = write(tmp_path / "bad.jsonl", [PAIRS[0], pair("a", "1", "")])
    good = write(tmp_path / "good.jsonl", PAIRS)
    empty = tmp_path / "empty.json"
    empty.write_text("[]")
    broken = tmp_path / "broken.json"
    broken.write_text("[{]")
    numbers = tmp_path / "numbers.json"
    numbers.write_text("[1]")
    for data, message in [
        ((good, bad), r"bad.jsonl:2: field 'rejected': is empty"),
        ((str(tmp_path / "none.jsonl"),), "none.jsonl: there is no such file"),
        ((str(empty),), "empty.json: the file is empty"),
        ((str(broken),), "broken.json:1: the file's data is cut off or damaged"),
        ((str(numbers),), "numbers.json:1: a JSON object is expected"),
    ]:
        job = EvaluationJob(checkpoint="m", data=data, output=str(tmp_path / "out"))
        with pytest.raises(DataError, match=message):
            run_evaluation(job, load)
    job = dataclasses.replace(job, data=(good,), benchmark="mmlu")
    with pytest.raises(UserError, match="benchmark='mmlu' must be one of rewardbench2, rmbench"):
        run_evaluation(job, load)
    assert not (tmp_path / "out").exists()


def test_a_folder_with_results_is_not_written_over(tmp_path):
    evaluate(tmp_path, PAIRS, StrengthScorer())
    with pytest.raises(UserError, match=r"results.json exists already; delete it or choose"):
        evaluate(tmp_path, PAIRS, StrengthScorer())


def test_pairs_that_are_all_alike_can_be_drawn(tmp_path):
    found, _, _ = evaluate(tmp_path, [pair("a", "1", "1")] * 2, StrengthScorer())
    assert found["ties"] == 2
    assert found["subsets"]["(all)"]["pairs"]["length_correlation"] is None
    assert (tmp_path / "out" / "report.html").read_text().count("<svg") == 4


class Refusing(StrengthScorer):
    """Cannot do with the third question."""

    def score(self, questions):
        for number, question in enumerate(questions):
            if number == 2:
                raise QuestionError(number, "is too long", "response", 1)
            yield from super().score([question])


def test_a_question_that_cannot_be_answered_is_named_by_its_line(tmp_path):
    with pytest.raises(DataError, match=r"out.data.jsonl:3: field 'rejected': is too long"):
        evaluate(tmp_path, PAIRS, Refusing())
    with pytest.raises(UserError, match=r"data.jsonl:2: the model gives a reward that is not fin"):
        evaluate(tmp_path, [PAIRS[0], pair("b", "inf", "1")], StrengthScorer())
    assert not (tmp_path / "out" / "results.json").exists()


class Contrary(StrengthScorer):
    """Prefers the weaker response to some prompts."""

    def score(self, questions):
        for question in questions:
            (verdict,) = super().score([question])
            yield verdict._replace(rewards=-verdict.rewards) if question.prompt < "c" else verdict


def test_two_runs_are_compared_pair_by_pair(tmp_path):
    # Outcomes 1 0 .5 1 1, and with the first two turned round 0 1 .5 1 1.
    rows = [*PAIRS, pair("f", "1", "2", subset="x"), pair("g", "1", "2", subset="x")]
    rows[0] = pair("z", "3", "1", subset="x")
    evaluate(tmp_path, rows, StrengthScorer(), name="one")
    evaluate(tmp_path, rows, Contrary(), name="two")
    found = compare_runs(str(tmp_path / "one"), str(tmp_path / "two"))
    x, y = found.subsets["x"], found.subsets["y"]
    assert (x.n, x.first, x.second, x.improved, x.worsened) == (5, 2 / 5, 3 / 5, 1, 0)
    assert x.difference.value == pytest.approx(1 / 5)
    # One of five prompts: resampled, between none and three of them.
    assert (x.difference.low, x.difference.high) == (0.0, pytest.approx(3 / 5))
    assert (y.difference.value, y.difference.low, y.difference.high) == (0, 0, 0)
    assert found.subsets["(all)"].difference.value == pytest.approx(1 / 7)
    assert found.macro.value == pytest.approx((1 / 5 + 0) / 2)
    text = found.text()
    assert "+0.200 [+0.000, +0.600]" in text
    assert "+1 -0" in text
    back = compare_runs(str(tmp_path / "two"), str(tmp_path / "one"))
    assert back.subsets["x"].difference.value == pytest.approx(-1 / 5)
    assert back.subsets["x"].worsened == 1


def test_only_evaluations_of_the_same_pairs_are_compared(tmp_path):
    evaluate(tmp_path, PAIRS, StrengthScorer(), name="one")
    evaluate(tmp_path, PAIRS[:4], StrengthScorer(), name="fewer")
    evaluate(tmp_path, [*PAIRS[:3], pair("c", "4", "9"), PAIRS[4]], StrengthScorer(), name="other")
    one = str(tmp_path / "one")
    with pytest.raises(UserError, match=r"one has 5 pairs and .*fewer has 4: only evaluations"):
        compare_runs(one, str(tmp_path / "fewer"))
    with pytest.raises(UserError, match=r"line 4 of results.jsonl is another pair in"):
        compare_runs(one, str(tmp_path / "other"))
    with pytest.raises(UserError, match=r"nowhere: has no results.json; it must be the --output"):
        compare_runs(one, str(tmp_path / "nowhere"))
    damaged = tmp_path / "fewer" / "results.jsonl"
    lines = damaged.read_text().splitlines(keepends=True)
    damaged.write_text(lines[0].replace('"right"', '"good"') + lines[1])
    with pytest.raises(DataError, match="field 'outcome': 'good' is none of right, tie, wrong"):
        compare_runs(one, str(tmp_path / "fewer"))
    damaged.write_text("{}\n")
    with pytest.raises(DataError, match="field 'pair': must be text"):
        compare_runs(one, str(tmp_path / "fewer"))


SIZES = {
    "vocab_size": 500, "hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 512,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    peer_models.build("Llama", SIZES, seed=3).save_pretrained(folder)
    topics = [" ".join(topic.text.split()) for topic in reference_topics()][:20]
    Tokenizer.train([*topics, *[JudgeTemplate.load().prompt] * 3], 500).save(folder)
    return folder


@pytest.fixture(scope="module")
def english():
    topics = [" ".join(topic.text.split()) for topic in reference_topics()][:12]
    return [
        pair(text[:40], text[40:90], topics[i - 1][20:50], subset="even" if i % 2 else "odd")
        for i, text in enumerate(topics)
    ]


def test_the_rewards_are_those_that_score_writes(tmp_path, checkpoint, english):
    path = write(tmp_path / "pairs.jsonl", english)
    settings = RewardSettings(row_length=256, batch_rows=2)
    loaded = load_model(checkpoint, ComputeConfig())
    scorer = Scorer(loaded, settings)
    job = EvaluationJob(checkpoint=str(checkpoint), data=(path,), output=str(tmp_path / "out"))
    run_evaluation(job, lambda: Engine.of(scorer), stream=io.StringIO())
    found, rows = read(tmp_path / "out")
    run_job(
        ScoringJob(input=path, output=str(tmp_path / "scored.jsonl"), reward=settings),
        lambda: loaded,
        stream=io.StringIO(),
    )
    scored = [json.loads(x) for x in (tmp_path / "scored.jsonl").read_text().splitlines()]
    for row, expected in zip(rows, scored, strict=True):
        np.testing.assert_allclose(row["rewards"], expected["reward"], rtol=1e-5)
        assert row["num_tokens"] == expected["num_tokens"]
    assert found["tokens"] > 0
    assert 0 <= found["padding"] < 1
    assert found["settings"]["reward"] == "likelihood"


def test_the_command_evaluates_a_judge_and_compares_runs(tmp_path, checkpoint, english):
    path = write(tmp_path / "pairs.jsonl", english)

    def command(*flags):
        return subprocess.run(
            [sys.executable, "-m", "gram_jax.evaluate", *flags],
            capture_output=True,
            text=True,
            check=False,
            cwd=Path(__file__).parents[1],
        )

    out = tmp_path / "judge"
    done = command(
        f"--checkpoint={checkpoint}", f"--data={path}", f"--output={out}", "--reward=judge",
        "--row_length=512", "--batch_rows=2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found, rows = read(out)
    assert found["kind"] == "judge"
    assert len(rows) == 12
    assert all(len(row["log_odds"]) == 2 for row in rows)
    assert "mean p(A)" in done.stdout
    assert "pair 12/12" in done.stderr
    compared = command(f"--compare={out},{out}")
    assert compared.returncode == 0, compared.stderr
    assert "+0.000 [+0.000, +0.000]" in compared.stdout
    for flags, message in [
        ((f"--compare={out}",), "error: --compare=DIR,DIR takes two folders"),
        ((f"--data={path}",), "error: --checkpoint is missing"),
    ]:
        wrong = command(*flags)
        assert (wrong.returncode, wrong.stdout) == (2, "")
        assert message in wrong.stderr
