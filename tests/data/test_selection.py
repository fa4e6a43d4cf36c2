"""Held-out prompts, prompts of evaluation files and draws of pairs: which rows a stage uses."""

import json
import random

import numpy as np
import peer_models
import pytest

from gram_jax.config import Config, DataConfig, ObjectiveConfig
from gram_jax.config_rules import validate
from gram_jax.data import prepare
from gram_jax.data.examples import Layout
from gram_jax.data.judge import JudgeTemplate
from gram_jax.data.meter import Meter
from gram_jax.data.prepare import prepared_rows
from gram_jax.data.rowset import ROW_FORMAT, read_manifest
from gram_jax.data.selection import drawn, normalised
from gram_jax.data.stage import stage_data
from gram_jax.data.token_records import ExampleCounts, TokenRecord
from gram_jax.errors import DataError, UserError
from gram_jax.pair import Pair

TOKENIZER = peer_models.tokenizer()
LIKELIHOOD = Layout("likelihood", True)
# The tokenizer of the tests knows words only.
TEMPLATE = JudgeTemplate(
    ("w90", "w91"), "w80 {question} w81 {response_a} w82 {response_b} w83", chat_template_kwargs={}
)


def words(rng, low, high):
    return " ".join(f"w{rng.randrange(3, 80)}" for _ in range(rng.randint(low, high)))


def preferences(count, seed=0, prompts=40):
    """Rows whose chosen responses are all different, so that a pair is known by its chosen."""
    rng = random.Random(seed)
    asked = [words(rng, 4, 9) for _ in range(prompts)]
    return [
        {
            "prompt": rng.choice(asked),
            "chosen": f"{words(rng, 6, 12)}",
            "rejected": words(rng, 2, 5),
        }
        for _ in range(count)
    ]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def prepared(spec, folder, *, use="train", layout=LIKELIHOOD, **options):
    config = DataConfig(**{"row_length": 64, "workers": 1} | options)
    validate(config)
    return prepared_rows(
        spec, config, TOKENIZER, folder,
        layout=layout, replace=False, meter=Meter(quiet=True), use=use,
    )  # fmt: skip


def branches(found):
    """Token ids of each branch of the rows: (ids of the prefix, ids of the branch)."""
    seen = set()
    for row in found.read(range(len(found))):
        for segment in range(1, int(row["segment_ids"].max()) + 1):
            own = row["segment_ids"] == segment
            prefix = tuple(row["tokens"][own & (row["branch_ids"] == 0)].tolist())
            for branch in sorted(set(row["branch_ids"][own].tolist()) - {0}):
                inside = own & (row["branch_ids"] == branch)
                seen.add((prefix, tuple(row["tokens"][inside].tolist())))
    return seen


def pair_count(found):
    return int((found.read(range(len(found)))["pair_weight"] != 0).sum())


def content(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.array_record"))}


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(prepare, "CHUNK_BYTES", 2000)
    monkeypatch.setattr(prepare, "_ROWS_PER_SHARD", 16)


def test_prompts_are_the_same_whatever_their_case_and_spaces():
    chat = [{"role": "user", "content": "what is  2+2?\n"}]
    system = [{"role": "system", "content": "Be brief."}]
    assert normalised("What is\n2+2?") == normalised(chat) == normalised(system + chat)
    assert normalised("What is 2+2?") != normalised("What is 2+3?")
    two = [*chat, {"role": "assistant", "content": "4"}, {"role": "user", "content": "and 3+3?"}]
    assert normalised(two) != normalised(chat)


def test_held_out_prompts_are_a_share_and_never_trained_on(tmp_path, small_chunks):
    rows = preferences(600, prompts=300)
    path = write(tmp_path / "a.jsonl", rows)
    train = prepared(path, tmp_path / "train", holdout=0.25)
    held = prepared(path, tmp_path / "held", use="held_out", holdout=0.25)
    whole = prepared(path, tmp_path / "whole")
    assert branches(train) | branches(held) == branches(whole)
    assert not {prefix for prefix, _ in branches(train)} & {prefix for prefix, _ in branches(held)}
    assert pair_count(train) + pair_count(held) == pair_count(whole) == 600
    asked = {row["prompt"] for row in rows}
    # 300 prompts, each with probability 1/4: 75, and a standard deviation of 7.5.
    assert abs(held.manifest.read["examples"] - len(asked) / 4) < 4 * 7.5
    read = train.manifest.read, held.manifest.read
    assert read[0]["other_part"] + read[1]["other_part"] == 600
    assert read[0]["other_part"] == pair_count(held)


def test_which_prompts_are_held_out_depends_on_their_texts_alone(tmp_path, small_chunks):
    rows = preferences(200)
    spread = [row | {"prompt": row["prompt"].upper().replace(" ", "\n")} for row in rows]
    random.Random(3).shuffle(rows)
    found = [
        prepared(write(tmp_path / f"{name}.jsonl", some), tmp_path / name, holdout=0.3)
        for name, some in (("a", rows), ("b", rows[::-1]), ("c", spread))
    ]
    assert branches(found[0]) == branches(found[1])
    counts = {one.manifest.read["other_part"] for one in found}
    assert len(counts) == 1 and counts != {0}


def test_a_stage_validates_on_held_out_prompts(tmp_path):
    path = write(tmp_path / "a.jsonl", preferences(200))
    config = Config(
        data=DataConfig(row_length=64, workers=1, train=(path,), holdout=0.3),
        objective=ObjectiveConfig(name="smoothed_pairwise"),
    )
    data = stage_data(config, TOKENIZER, tmp_path / "data", replace=False, quiet=True)
    assert data.validation is not None
    ours, theirs = data.train.sets[0], data.validation.sets[0]
    assert pair_count(ours) + pair_count(theirs) == 200
    assert f"other part {pair_count(theirs)}" in data.text()[0]
    config.data.validation = (path,)
    with pytest.raises(UserError, match="leave out one of them"):
        validate(config)


def test_prompts_of_evaluation_files_are_left_out_or_counted(tmp_path, small_chunks):
    rows = preferences(300, prompts=30)
    path = write(tmp_path / "a.jsonl", rows)
    known = sorted({row["prompt"] for row in rows})[:5]
    overlapping = sum(row["prompt"] in known for row in rows)
    evaluation = write(
        tmp_path / "eval.jsonl",
        [
            {"prompt": known[0].upper(), "chosen": "x", "rejected": "y"},
            {"prompt": [{"role": "user", "content": f" {known[1]}"}], "response": "x"},
            {"question": known[2], "response_A": "a", "response_B": "b", "label": "A>B"},
            {"prompt": known[3]},
        ],
    )
    other = write(tmp_path / "other.jsonl", [{"instruction": known[4], "output": "x"}])
    exclude = (f"{evaluation},{other}",)
    found = prepared(path, tmp_path / "rows", exclude=exclude)
    assert found.manifest.read["overlapping_rows"] == overlapping > 0
    assert pair_count(found) == 300 - overlapping
    clean = [row for row in rows if row["prompt"] not in known]
    expected = prepared(write(tmp_path / "clean.jsonl", clean), tmp_path / "clean")
    assert branches(found) == branches(expected)
    counted = prepared(path, tmp_path / "counted", exclude=exclude, on_overlap="count")
    assert counted.manifest.read["overlapping_rows"] == overlapping
    assert pair_count(counted) == 300
    # What is validated on is validated on, whatever is excluded from training.
    assert pair_count(prepared(path, tmp_path / "v", use="validation", exclude=exclude)) == 300


def test_a_bad_evaluation_file_is_named(tmp_path):
    path = write(tmp_path / "a.jsonl", preferences(10))
    bad = write(tmp_path / "eval.jsonl", [{"prompt": "p"}, {"x": 1}])
    for options in ({}, {"on_bad_row": "quarantine"}):
        with pytest.raises(DataError, match=r"eval\.jsonl:2: the columns fit no format"):
            prepared(path, tmp_path / "rows", exclude=(bad,), **options)
    with pytest.raises(DataError, match="there is no such file"):
        prepared(path, tmp_path / "rows", exclude=(str(tmp_path / "none.jsonl"),))


def test_texts_are_held_out_and_excluded_as_they_are(tmp_path):
    rng = random.Random(4)
    rows = [{"text": words(rng, 3, 30)} for _ in range(80)]
    path, layout = write(tmp_path / "a.jsonl", rows), Layout("text", True)
    evaluation = write(tmp_path / "eval.jsonl", rows[:7])
    found = prepared(path, tmp_path / "rows", layout=layout, exclude=(evaluation,))
    assert found.manifest.read["overlapping_rows"] == 7
    parts = [
        prepared(path, tmp_path / use, layout=layout, use=use, holdout=0.5).manifest.read
        for use in ("train", "held_out")
    ]
    assert [part["examples"] for part in parts] == [part["other_part"] for part in parts[::-1]]
    assert min(part["examples"] for part in parts) > 20


@pytest.mark.parametrize("shape", ["preferences", "kway"])
def test_a_draw_has_exactly_so_many_pairs_and_holds_every_smaller_one(
    tmp_path, small_chunks, shape
):
    rows = preferences(240)
    if shape == "kway":
        rng = random.Random(5)
        rows = [
            {"prompt": words(rng, 4, 9), "responses": [words(rng, 5, 9) for _ in range(3)],
             "scores": [1, 2, 3]}
            for _ in range(80)
        ]  # fmt: skip
    path = write(tmp_path / "a.jsonl", rows)
    draws = {
        count: prepared(path, tmp_path / f"{count}", max_pairs=count) for count in (1, 10, 100, 240)
    }
    for count, found in draws.items():
        assert pair_count(found) == found.manifest.packed["pairs"] == count
        assert found.manifest.read["undrawn_pairs"] == 240 - count
    for small, large in ((1, 10), (10, 100), (100, 240)):
        assert branches(draws[small]) < branches(draws[large])
    assert branches(draws[240]) == branches(prepared(path, tmp_path / "all"))
    other = prepared(path, tmp_path / "other", max_pairs=10, draw_seed=1)
    assert pair_count(other) == 10
    assert branches(other) != branches(draws[10])
    with pytest.raises(DataError, match="has 240 pairs that can be used, fewer than"):
        prepared(path, tmp_path / "more", max_pairs=241)


def test_a_drawn_pair_keeps_its_responses_and_their_reference():
    responses = tuple(np.array([number], np.int32) for number in (10, 11, 12, 13))
    pairs = (Pair(0, 1), Pair(3, 1, 0.5, 0.25, 2.0), Pair(1, 2))
    reference = (-1.0, -2.0, -3.0, -4.0)
    whole = TokenRecord(9, np.array([5], np.int32), responses, pairs, reference, (7, 3, 8))
    counts = ExampleCounts()
    found = drawn(whole, 6, counts)
    assert [response.tolist() for response in found.responses] == [[11], [13]]
    assert found.pairs == (Pair(1, 0, 0.5, 0.25, 2.0),)
    assert (found.key, found.reference, counts.undrawn_pairs) == (9, (-2.0, -4.0), 2)
    assert drawn(whole, 8, counts) is whole
    assert drawn(whole, 2, counts) is None
    assert counts.undrawn_pairs == 5


@pytest.mark.parametrize(("orders", "each"), [("both", 2), ("random", 1)])
def test_a_judges_draw_counts_comparisons_not_orders(tmp_path, small_chunks, orders, each):
    path = write(tmp_path / "a.jsonl", preferences(60))
    layout = Layout("judge", False, TEMPLATE, orders)
    found = prepared(path, tmp_path / "rows", layout=layout, max_pairs=7)
    assert pair_count(found) == 7 * each
    assert found.manifest.read["undrawn_pairs"] == 53
    weights = found.read(range(len(found)))["pair_weight"]
    assert float(weights.sum()) == 7


def test_a_judge_draws_the_labels_that_other_readings_draw(tmp_path, small_chunks):
    """Of rows with several pairs too, which are one record for them and several for a judge."""
    rows = [
        {"prompt": f"w{50 + i}", "responses": [f"w{10 + i} w{40 + j}" for j in range(3)],
         "scores": [1, 2, 3]}
        for i in range(30)
    ]  # fmt: skip
    path = write(tmp_path / "a.jsonl", rows)
    (known,) = TOKENIZER.encode_responses([" ".join(f"w{n}" for n in range(10, 43))], add_eos=False)
    plain, expected = prepared(path, tmp_path / "plain", max_pairs=20), set()
    for row in plain.read(range(len(plain))):
        for slot in np.flatnonzero(row["pair_weight"]):
            sides = np.isin(row["sequence_ids"], [row["pair_a"][slot], row["pair_b"][slot]])
            expected.add(frozenset(known).intersection(row["targets"][sides].tolist()))
    layout = Layout("judge", False, TEMPLATE)
    judged = prepared(path, tmp_path / "judged", layout=layout, max_pairs=20)
    assert {frozenset(known).intersection(branch) for _, branch in branches(judged)} == expected
    assert len(expected) == 20


def test_selected_rows_do_not_depend_on_the_number_of_processes(
    tmp_path, monkeypatch, small_chunks
):
    rows = preferences(300)
    path = write(tmp_path / "a.jsonl", rows)
    evaluation = write(tmp_path / "eval.jsonl", [{"prompt": rows[0]["prompt"]}])
    options = {"holdout": 0.2, "exclude": (evaluation,), "max_pairs": 50}
    prepared(path, tmp_path / "one", **options)
    monkeypatch.setattr(prepare, "_BYTES_PER_WORKER", 1)
    found = prepared(path, tmp_path / "two", workers=2, **options)
    assert content(tmp_path / "one") == content(tmp_path / "two")
    assert pair_count(found) == 50


def test_pairs_of_labelled_responses_meet_wherever_they_stand(tmp_path, small_chunks):
    rng = random.Random(6)
    rows = []
    for _ in range(40):
        prompt = words(rng, 4, 9)
        rows += [
            {"prompt": prompt, "completion": words(rng, 3, 9), "label": label}
            for label in (True, True, False)
        ]
    rows += [{"prompt": words(rng, 4, 9), "completion": "w5", "label": True} for _ in range(9)]
    rng.shuffle(rows)
    path = write(tmp_path / "a.jsonl", rows)
    found = prepared(path, tmp_path / "rows")
    assert found.manifest.key["format"] == "unpaired"
    assert (found.manifest.packed["pairs"], found.manifest.read["unpaired_left_out"]) == (80, 9)
    weights = found.read(range(len(found)))["pair_weight"]
    np.testing.assert_allclose(weights.sum(), 40)
    judge = Layout("judge", False, TEMPLATE)
    with pytest.raises(DataError, match="a judge compares two responses"):
        prepared(path, tmp_path / "judge", layout=judge)
    with pytest.raises(DataError, match="has no pairs to draw from"):
        prepared(path, tmp_path / "draw", max_pairs=5)


def test_a_share_that_holds_no_prompt_is_an_error(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": "w5 w6"}])
    options = {"layout": Layout("text", True), "use": "held_out", "holdout": 1e-9}
    with pytest.raises(DataError, match=r"nothing to validate on: rows 1, other part 1"):
        prepared(path, tmp_path / "rows", **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"holdout": 0.1}, "config.data.holdout was 0.2 and is 0.1"),
        ({"max_pairs": 20}, "config.data.max_pairs was 30 and is 20"),
        ({"draw_seed": 1}, "config.data.draw_seed was 0 and is 1"),
        ({"on_overlap": "count"}, "config.data.on_overlap was 'drop' and is 'count'"),
        ({"exclude": ()}, "config.data.exclude holds other files"),
        ({"use": "held_out"}, "use was 'train' and is 'held_out'"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_rows_of_another_selection_are_other_rows(tmp_path, change, message):
    rows = preferences(100)
    path = write(tmp_path / "a.jsonl", rows)
    evaluation = write(tmp_path / "eval.jsonl", [{"prompt": rows[0]["prompt"]}])
    options = {"holdout": 0.2, "exclude": (evaluation,), "max_pairs": 30}
    first = prepared(path, tmp_path / "rows", **options).manifest
    (tmp_path / "moved.jsonl").write_bytes((tmp_path / "eval.jsonl").read_bytes())
    moved = options | {"exclude": (str(tmp_path / "moved.jsonl"),)}
    gone = options | {"exclude": (str(tmp_path / "gone.jsonl"),)}
    for same in (options, moved, gone):
        assert prepared(path, tmp_path / "rows", **same).manifest == first
    with pytest.raises(UserError, match=message):
        prepared(path, tmp_path / "rows", **options | change)


def test_rows_of_an_older_version_are_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", preferences(20))
    prepared(path, tmp_path / "rows")
    manifest = tmp_path / "rows" / "manifest.json"
    values = json.loads(manifest.read_text())
    values["key"] = {"row_format": ROW_FORMAT - 1, "sources": []}
    manifest.write_text(json.dumps(values))
    assert read_manifest(tmp_path / "rows") is not None
    with pytest.raises(UserError, match="another version of gram_jax made them"):
        prepared(path, tmp_path / "rows")
