"""The ranking job: rows in order with their rankings, whatever happens to the process."""

import io

import pytest
from jsonl_files import read, write
from strength_judge import StrengthJudge, StrengthScorer

from gram_jax import ranking_input, ranking_job
from gram_jax.errors import DataError, UserError
from gram_jax.packing import PackCounts
from gram_jax.ranking_job import Engine, RankingJob, run_ranking
from gram_jax.scoring import EngineCounts

SETTINGS = {"checkpoint": "abc", "too_long": "error"}


def made_rows(count):
    """Rows of one to five responses whose text says how good they are, and labels of some."""
    rows = []
    for i in range(count):
        strengths = [(7 * i + 3 * k) % 11 / 2 for k in range(i % 5 + 1)]
        row = {"id": i, "prompt": f"Question {i}", "responses": [f"{s}" for s in strengths]}
        row["reference"] = "2.25"
        if i % 3 == 0:
            row["scores"] = [int(s) for s in strengths]
        elif i % 3 == 1:
            row["best_response"] = 0
        rows.append(row)
    return rows


def engine(scorer):
    return Engine(scorer, SETTINGS, PackCounts(), EngineCounts(), batch_tokens=64)


def run(folder, rows, scorer, name="out.jsonl", source="in.jsonl", **options):
    """Runs a job over these rows; returns (rows written, result)."""
    folder.mkdir(exist_ok=True)
    job = RankingJob(input=write(folder / source, rows), output=str(folder / name), **options)
    result = run_ranking(job, lambda: engine(scorer), stream=io.StringIO())
    return read(folder / name), result


def strengths(row):
    return [float(response) for response in row["responses"]]


def best_first(row):
    return sorted(range(len(row["responses"])), key=lambda i: -strengths(row)[i])


@pytest.mark.parametrize("method", ["", "reference", "keep_best"])
def test_rows_come_back_in_order_with_their_rankings(tmp_path, method):
    rows = made_rows(30)
    found, result = run(tmp_path, rows, StrengthJudge(0.5), method=method)
    added = ("rewards", "ranking", "best", "comparisons")
    assert [{k: v for k, v in row.items() if k not in added} for row in found] == rows
    made = 0
    for row in found:
        n, order = len(row["responses"]), best_first(row)
        assert row["ranking"] == (order[:1] if method == "keep_best" else order)
        assert row["best"] == order[0]
        assert len(row["rewards"]) == n
        assert (
            row["comparisons"] == {"": n * (n - 1) // 2, "reference": n, "keep_best": n - 1}[method]
        )
        made += row["comparisons"]
    summary = result.summary
    assert (summary.rows, summary.responses) == (30, sum(len(row["responses"]) for row in rows))
    assert (summary.comparisons, summary.sequences) == (made, 2 * made)


@pytest.mark.parametrize("kind", ["likelihood", "head"])
def test_rewards_are_written_as_they_are(tmp_path, kind):
    rows = made_rows(12)
    found, result = run(tmp_path, rows, StrengthScorer(kind))
    for row in found:
        assert row["rewards"] == strengths(row)
        assert row["ranking"] == best_first(row)
        assert row["comparisons"] == 0
    assert result.summary.method == "scalar"
    assert result.summary.sequences == result.summary.responses


def test_one_of_the_responses_is_the_reference(tmp_path):
    rows = [row for row in made_rows(20) if len(row["responses"]) > 1]
    for row in rows:
        del row["reference"]
    for scorer in (StrengthJudge(), StrengthScorer()):
        folder = tmp_path / scorer.kind
        found, result = run(folder, rows, scorer, method="reference", reference_index=1)
        for row in found:
            assert row["rewards"][1] == 0.5
            assert row["ranking"] == best_first(row)
            assert row["comparisons"] == len(row["responses"]) - 1
    assert result.summary.sequences == result.summary.responses


def test_the_summary_says_what_other_methods_cost_and_how_often_the_best_was_found(tmp_path):
    rows = [
        {"prompt": "a", "responses": ["1", "3", "2.25"], "best_response": 1},
        {"prompt": "b", "responses": ["2", "1"], "scores": [0, 5]},
        {"prompt": "c", "responses": ["2", "1", "0", "3"], "scores": [7, 1, 7, 7]},
        {"prompt": "d long", "responses": ["2", "1"]},
    ]
    _, result = run(tmp_path, rows, StrengthJudge(), method="keep_best")
    summary = result.summary
    assert summary.costs == {"scalar": 0, "reference": 7, "keep_best": 7, "round_robin": 11}
    # Found in rows 1 and 3. By chance 1/3, 1/2 and 3/4. Longest: the third, and twice the first.
    assert (summary.labelled, summary.hits, summary.longest) == (3, 2, 1)
    assert summary.chance == pytest.approx(1 / 3 + 1 / 2 + 3 / 4)
    assert summary.truncated_rows == 1
    text = summary.text()
    for words in ("4 rows, 11 responses ranked by judge, method keep_best", "7 comparisons",
                  "14 sequences", "66.7%", "of 3 labelled rows (at random 52.8%", "33.3%",
                  "keep_best (here)", "comparisons/s", "1 rows were truncated"):  # fmt: skip
        assert words in text
    assert [line.split()[:3] for line in text.splitlines()[-4:]] == [
        ["scalar", "0", "11"], ["reference", "7", "14"], ["keep_best", "(here)", "7"],
        ["round_robin", "11", "22"],
    ]  # fmt: skip


def test_compressed_files_hold_the_same_rows(tmp_path):
    rows = made_rows(10)
    plain, _ = run(tmp_path, rows, StrengthJudge())
    found, _ = run(tmp_path, rows, StrengthJudge(), "out.jsonl.gz", "in.jsonl.gz")
    assert found == plain


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"responses": ["a"]}, {}, r"in\.jsonl:2: field 'prompt': is missing"),
        ({"prompt": "a", "response": "b"}, {}, r":2: field 'responses': must be a list"),
        ({"prompt": "a", "responses": []}, {}, r":2: field 'responses': must be a list"),
        ({"prompt": "a", "responses": ["b", 3]}, {}, r":2: field 'responses\[1\]': must be text"),
        ({"prompt": "a", "responses": ["b"], "best": 0}, {}, r":2: field 'best': is there already"),
        ({"prompt": "a", "responses": ["b"], "best_response": 1}, {},
         r":2: field 'best_response': must be the place of a response, 0 to 0"),
        ({"prompt": "a", "responses": ["b"], "scores": [1, 2]}, {},
         r":2: field 'scores': must be a list of 1 numbers"),
        ({"prompt": "a", "responses": ["b"]}, {"method": "reference"},
         r":2: field 'reference': is missing; .* --reference_index"),
        ({"prompt": "a", "responses": ["b"], "reference": 4}, {"method": "reference"},
         r":2: field 'reference': must be text"),
        ({"prompt": "a", "responses": ["b"]}, {"method": "reference", "reference_index": 1},
         r":2: field 'responses': are 1; --reference_index=1 is none of them"),
    ],
)  # fmt: skip
def test_a_bad_row_is_named_before_anything_is_loaded(tmp_path, row, options, message):
    good = {"prompt": "a", "responses": ["b", "c"], "reference": "d"}
    job = RankingJob(
        input=write(tmp_path / "in.jsonl", [good, row]), output=str(tmp_path / "out"), **options
    )
    with pytest.raises(DataError, match=message):
        run_ranking(job, pytest.fail)
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]


def test_settings_that_do_not_go_together_are_refused(tmp_path):
    rows = made_rows(3)
    with pytest.raises(UserError, match="--reference_index is for --method=reference"):
        run(tmp_path, rows, StrengthJudge(), reference_index=0)
    with pytest.raises(UserError, match="a likelihood gives every response a reward"):
        run(tmp_path, rows, StrengthScorer(), method="round_robin")
    with pytest.raises(UserError, match="--input and --output are both"):
        run(tmp_path, rows, StrengthJudge(), name="in.jsonl")


def test_a_score_that_is_no_number_is_named(tmp_path):
    rows = [{"prompt": "a", "responses": ["1", "2"]}, {"prompt": "a", "responses": ["1", "nan"]}]
    with pytest.raises(DataError, match=r"in\.jsonl:2: the model gives a score that is not finite"):
        run(tmp_path, rows, StrengthJudge())


class Killed(BaseException):
    """What a killed process would not have noticed."""


class MortalJudge(StrengthJudge):
    """Gives so many verdicts and no more."""

    def __init__(self, verdicts):
        super().__init__()
        self.left = verdicts

    def score(self, questions):
        for verdict in super().score(questions):
            if self.left == 0:
                raise Killed
            self.left -= 1
            yield verdict


@pytest.fixture
def short_blocks(monkeypatch):
    monkeypatch.setattr(ranking_input, "ROUND_SEQUENCES", 12)
    monkeypatch.setattr(ranking_job, "_SECONDS_BETWEEN_RECORDS", 0)


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.gz"])
@pytest.mark.parametrize("method", ["keep_best", "round_robin", "reference"])
def test_a_job_stopped_anywhere_ends_in_the_same_file(tmp_path, short_blocks, name, method):
    rows = made_rows(60)
    _, whole = run(tmp_path / "whole", rows, StrengthJudge(), name, method=method)
    stops = 0
    for verdicts in (0, 5, 20, 29, 20, 40, 999):
        try:
            _, result = run(tmp_path / "torn", rows, MortalJudge(verdicts), name, method=method)
        except Killed:
            stops += 1
            with (tmp_path / "torn" / f"{name}.partial").open("ab") as stream:
                stream.write(b'{"id": 7, "prompt": "a torn li')
    assert stops >= 3
    torn = tmp_path / "torn"
    assert (torn / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    for field in ("rows", "responses", "comparisons", "costs", "hits", "chance", "longest"):
        assert getattr(result.summary, field) == getattr(whole.summary, field), field
    assert not (torn / f"{name}.partial").exists()


def test_a_complete_job_is_not_done_again(tmp_path):
    rows = made_rows(5)
    _, first = run(tmp_path, rows, StrengthJudge())
    again = run(tmp_path, rows, MortalJudge(0))[1]
    assert again.was_complete
    assert again.summary == first.summary


def test_the_output_of_another_job_is_left_alone(tmp_path, short_blocks):
    rows = made_rows(20)
    run(tmp_path, rows, StrengthJudge())
    before = (tmp_path / "out.jsonl").read_bytes()
    with pytest.raises(UserError, match="method was 'round_robin' and is 'keep_best'"):
        run(tmp_path, rows, StrengthJudge(), method="keep_best")
    with pytest.raises(UserError, match="rows differ from those of the 20 lines done"):
        run(tmp_path, rows[1:], StrengthJudge())
    assert (tmp_path / "out.jsonl").read_bytes() == before


def test_progress_counts_comparisons(tmp_path):
    rows = made_rows(25)
    stream = io.StringIO()
    job = RankingJob(input=write(tmp_path / "in.jsonl", rows), output=str(tmp_path / "out.jsonl"))
    result = run_ranking(job, lambda: engine(StrengthJudge()), stream=stream)
    total = result.summary.comparisons
    assert f"comparison {total}/{total}  comparisons/s" in stream.getvalue()


@pytest.mark.parametrize(("method", "sizes"), [("keep_best", [6, 3]), ("round_robin", [4, 5])])
def test_a_block_fills_one_round(tmp_path, short_blocks, method, sizes):
    # One to five responses: 2, 2, 6, 12 and 20 sequences each with each, 2 in a round of keep_best.
    rows = [row for row in made_rows(15) if len(row["responses"]) in (2, 3)] + made_rows(3)
    path = write(tmp_path / "in.jsonl", rows)
    blocks = ranking_input.read_ranking_blocks(path, method, None, 0)
    assert [len(block.rows) for block in blocks] == sizes


def test_memory_is_that_of_a_block(tmp_path, monkeypatch):
    monkeypatch.setattr(ranking_input, "MAX_CHARACTERS", 100)
    rows = made_rows(40)
    path = write(tmp_path / "in.jsonl", rows)
    blocks = list(ranking_input.read_ranking_blocks(path, "keep_best", None, 0))
    assert [row.row for block in blocks for row in block.rows] == rows
    assert all(len(block.rows) < 10 for block in blocks)
    # From the end of a block on, the others are the same.
    later = list(ranking_input.read_ranking_blocks(path, "keep_best", None, blocks[2].end))
    assert later == blocks[3:]
