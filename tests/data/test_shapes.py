"""Every shape of data is recognised by its columns and becomes the row it means."""

import json
from pathlib import Path

import pytest

from gram_jax.config import DataConfig
from gram_jax.config_rules import validate
from gram_jax.data.shapes import FORMATS, LABELLED, UNLABELLED, detect_format, kind_of, parse_row
from gram_jax.data.sources import PreferenceRow, ResponsesRow, UnpairedRow
from gram_jax.errors import DataError
from gram_jax.pair import Pair
from gram_jax.scoring_input import candidates_of

ASK = {"role": "user", "content": "Can dogs get covid?"}
BRIEF = {"role": "system", "content": "Be brief."}
YES, NO = ({"role": "assistant", "content": text} for text in ("Yes.", "No, never."))
HH = "\n\nHuman: Is it far?\n\nAssistant: To where?\n\nHuman: The sea.\n\nAssistant:"
FRAMED = (
    "[The Start of Assistant A's Answer]\nYes.\n[The End of Assistant A's Answer]\n\n"
    "[The Start of Assistant B's Answer]\nNo, never.\n[The End of Assistant B's Answer]"
)
JUDGE = (
    f"Please act as a judge.\n\n[User Question]\nCan dogs\n\nget covid?\n\n{FRAMED}\n\n#Preferred: "
)
TURNS = [{"from": "system", "value": "Be brief."}, {"from": "human", "value": ASK["content"]}]
PAIRED = (Pair(0, 1),)
BOTH = ("chosen", "rejected")


def parse(record, format="auto", kinds=LABELLED + UNLABELLED, reference_field=""):
    record = json.loads(json.dumps(record))
    if format == "auto":
        format = detect_format(record, file="f.jsonl", line=3, kinds=kinds)
    row = parse_row(record, format, file="f.jsonl", line=3, reference_field=reference_field)
    return format, row


def preferences(prompt, responses, pairs=PAIRED, fields=BOTH, subset="", reference=None):
    return PreferenceRow(prompt, responses, pairs, fields, subset, reference, 3)


def fault(record, format="auto", **options):
    with pytest.raises(DataError) as caught:
        parse(record, format, **options)
    error = caught.value
    assert (error.file, error.line) == ("f.jsonl", 3)
    assert "\n" not in str(error)
    return error


RM_BENCH = {
    "id": 7, "prompt": "p", "chosen": ["c0", "c1", "c2"], "rejected": ["r0", "r1", "r2"],
    "domain": "chat", "error": "",
}  # fmt: skip
JUDGEBENCH = {
    "pair_id": "x", "original_id": "1", "source": "mmlu-pro-law", "question": "q?",
    "response_A": "a", "response_B": "b", "label": "B>A", "response_model": "m",
}  # fmt: skip
PANDALM = {
    "idx": 1, "motivation_app": "mail", "instruction": "Sort.", "input": "b a", "response1": "a b",
    "response2": "b a", "annotator1": 1, "annotator2": 1, "annotator3": 2, "cmp_key": "k",
}  # fmt: skip
UNIFIED = {
    "id": "1", "conv_A": [ASK, YES], "conv_B": [ASK, NO], "conv_A_rating": 0.0,
    "conv_B_rating": 1.0, "num_turns": 2, "source": "hh-rlhf",
}  # fmt: skip
SHAREGPT = {
    "conversations": TURNS, "chosen": {"from": "gpt", "value": "Yes."},
    "rejected": {"from": "gpt", "value": "No, never."},
}  # fmt: skip
RESPONSES = ("Yes.", "No, never.")


@pytest.mark.parametrize(
    ("record", "format", "row"),
    [
        (
            {"prompt": "p", "chosen": "c", "rejected": "r"},
            "preferences",
            preferences("p", ("c", "r")),
        ),
        (
            {"prompt": [ASK], "chosen": [YES], "rejected": NO, "subset": "s", "margin": 0.5},
            "preferences",
            preferences([ASK], ([YES], [NO]), (Pair(0, 1, margin=0.5),), subset="s"),
        ),
        (
            {"prompt": "p", "chosen": "c", "rejected": "r", "margin": None, "system": "Be brief."},
            "preferences",
            preferences("Be brief.\n\np", ("c", "r")),
        ),
        (
            {"prompt": [ASK], "chosen": "c", "rejected": "r", "system": "Be brief."},
            "preferences",
            preferences([BRIEF, ASK], ("c", "r")),
        ),
        (
            {"chosen": "The sky is blue.", "rejected": "The sky is bright green."},
            "implicit",
            preferences("The sky is", (" blue.", " bright green.")),
        ),
        (
            {"chosen": [BRIEF, ASK, YES], "rejected": [BRIEF, ASK, NO], "margin": 2},
            "implicit",
            preferences([BRIEF, ASK], ([YES], [NO]), (Pair(0, 1, margin=2.0),)),
        ),
        (
            # As ultrafeedback_binarized: the question as text, and whole conversations.
            {"prompt": ASK["content"], "chosen": [ASK, YES], "rejected": [ASK, NO]},
            "implicit",
            preferences([ASK], ([YES], [NO])),
        ),
        (
            {"chosen": f"{HH} A mile.", "rejected": f"{HH} Ask another."},
            "hh",
            preferences(HH, (" A mile.", " Ask another.")),
        ),
        ({"prompt": "p", "completion": "c", "label": False}, "unpaired",
         UnpairedRow("p", "c", False, None, 3)),
        ({"prompt": [ASK], "completion": [YES], "label": True}, "unpaired",
         UnpairedRow([ASK], [YES], True, None, 3)),
        (
            {"instruction": "Sort.", "input": "b a", "output": "a b"},
            "alpaca",
            ResponsesRow("Sort.\nb a", ("a b",), 3),
        ),
        (
            {"instruction": "Sort.", "input": "", "chosen": "a b", "rejected": "b a"},
            "alpaca_preferences",
            preferences("Sort.", ("a b", "b a")),
        ),
        (
            {"instruction": "Sort.", "input": None, "output": ["a b", "b a"], "system": "Be."},
            "alpaca_preferences",
            preferences("Be.\n\nSort.", ("a b", "b a"), fields=("output[0]", "output[1]")),
        ),
        (
            {"instruction": JUDGE, "input": "", "output": "B"},
            "gram",
            preferences(
                "Can dogs\n\nget covid?", RESPONSES, (Pair(1, 0),), ("instruction", "instruction")
            ),
        ),
        (
            SHAREGPT,
            "sharegpt",
            preferences([BRIEF, ASK], ([YES], [NO])),
        ),
        (
            UNIFIED,
            "unified_feedback",
            preferences([ASK], ([YES], [NO]), (Pair(1, 0),), ("conv_A", "conv_B"), "hh-rlhf"),
        ),
        (
            UNIFIED | {"conv_A_rating": 3, "conv_B_rating": 3.0},
            "unified_feedback",
            preferences([ASK], ([YES], [NO]), (Pair(0, 1, 0.5),), ("conv_A", "conv_B"), "hh-rlhf"),
        ),
        (
            {"prompt": "p", "responses": ["a", "b", "c"], "scores": [1, 5, 1]},
            "kway",
            preferences(
                "p",
                ("a", "b", "c"),
                (Pair(1, 0, 1.0, 1 / 3), Pair(0, 2, 0.5, 1 / 3), Pair(1, 2, 1.0, 1 / 3)),
                ("responses[0]", "responses[1]", "responses[2]"),
            ),
        ),
        (
            {"prompt": "p", "responses": ["a", "b"], "ranks": [2, 1]},
            "kway",
            preferences("p", ("a", "b"), (Pair(1, 0),), ("responses[0]", "responses[1]")),
        ),
        (
            {"id": 1, "prompt": "p", "chosen": "c", "rejected": "r", "subset": "math-prm",
             "chosen_model": "x", "rejected_model": "y"},
            "rewardbench",
            preferences("p", ("c", "r"), subset="math-prm"),
        ),
        (
            JUDGEBENCH,
            "judgebench",
            preferences("q?", ("a", "b"), (Pair(1, 0),), ("response_A", "response_B"),
                        "mmlu-pro-law"),
        ),
        (
            {"input": "i", "output_1": "x", "output_2": "y", "label": 2},
            "llmbar",
            preferences("i", ("x", "y"), (Pair(1, 0),), ("output_1", "output_2")),
        ),
        (
            PANDALM,
            "pandalm",
            preferences("Sort.\nb a", ("a b", "b a"), (Pair(0, 1, 2 / 3),),
                        ("response1", "response2")),
        ),
    ],
)  # fmt: skip
def test_a_record_is_recognised_and_becomes_the_row_it_means(record, format, row):
    assert parse(record) == (format, row)
    assert parse(record, format) == (format, row)


def test_every_format_is_tested_here_and_known_to_the_settings():
    (mark,) = test_a_record_is_recognised_and_becomes_the_row_it_means.pytestmark
    tested = {format for _, format, _ in mark.args[1]} | {"rm_bench", "pairs", "text", "responses"}
    assert tested == set(FORMATS)
    for format in FORMATS:
        validate(DataConfig(format=format))


def test_rm_bench_compares_every_style_with_every_other():
    format, row = parse(RM_BENCH)
    assert format == "rm_bench"
    assert row.responses == ("c0", "c1", "c2", "r0", "r1", "r2")
    assert [(p.a, p.b) for p in row.pairs] == [(a, 3 + b) for a in range(3) for b in range(3)]
    assert {(p.target, p.weight) for p in row.pairs} == {(1.0, 1 / 9)}
    assert (row.subset, row.fields[4]) == ("chat", "rejected[1]")


@pytest.mark.parametrize(
    ("votes", "pair"),
    [
        ((1, 1, 1), Pair(0, 1)),
        ((2, 2, 1), Pair(1, 0, 2 / 3)),
        ((1, 2, 0), Pair(0, 1, 0.5)),
        ((2, 0, 0), Pair(1, 0, 2 / 3)),
        ((2, None, None), Pair(1, 0)),
    ],
)
def test_votes_of_annotators_are_a_soft_target(votes, pair):
    fields = dict(zip(("annotator1", "annotator2", "annotator3"), votes, strict=True))
    (found,) = parse(PANDALM | fields)[1].pairs
    assert (found.a, found.b) == (pair.a, pair.b)
    assert found.target == pytest.approx(pair.target, abs=1e-15)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_all_pairs_of_a_prompt_weigh_as_much_as_one(count):
    record = {"prompt": "p", "responses": [f"r{i}" for i in range(count)]}
    for values in ([0] * count, list(range(count))):
        row = parse(record | {"scores": values})[1]
        assert len(row.pairs) == count * (count - 1) // 2
        assert sum(pair.weight for pair in row.pairs) == pytest.approx(1)
        for pair in row.pairs:
            assert pair.target == (0.5 if values[pair.a] == values[pair.b] else 1.0)
            assert values[pair.a] >= values[pair.b]


def test_reference_logprobs_stand_in_the_order_of_the_responses():
    def reference(record, values):
        return parse(record | {"logprob": values}, reference_field="logprob")[1].reference

    assert reference(JUDGEBENCH, [-1, -2]) == (-1.0, -2.0)
    assert reference(RM_BENCH, [1, 2, 3, 4, 5, 6]) == (1, 2, 3, 4, 5, 6)
    assert reference({"prompt": "p", "responses": ["a", "b"], "ranks": [1, 2]}, [0, -1]) == (0, -1)
    unpaired = {"prompt": "p", "completion": "c", "label": True}
    assert reference(unpaired, -3) == reference(unpaired, [-3]) == -3.0


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("The sky is blue.", "The sky is black.", "The sky is"),  # not "The sky is bl"
        ("The sky is", "The sky is blue.", "The sky"),  # something must be left
        ("Q: a?\nA: yes", "Q: a?\nA: no", "Q: a?\nA:"),
        ("Say it:\n\nhello", "Say it: hello", "Say it:"),
        ("One two  three", "One two   four", "One two"),
    ],
)
def test_an_implicit_prompt_ends_where_a_word_ends(chosen, rejected, prompt):
    row = parse({"chosen": chosen, "rejected": rejected})[1]
    assert row.prompt == prompt
    assert tuple(prompt + response for response in row.responses) == (chosen, rejected)


def test_a_dialogue_ends_with_its_last_turn_even_where_responses_begin_alike():
    row = parse({"chosen": f"{HH} It is far.", "rejected": f"{HH} It is near."})[1]
    assert row.prompt == HH
    assert row.responses == (" It is far.", " It is near.")
    named = parse({"chosen": f"{HH} It is far.", "rejected": f"{HH} It is near."}, "implicit")[1]
    assert named == row


@pytest.mark.parametrize(
    ("record", "kinds", "format"),
    [
        # Best-of-n data with scores is preferences to an objective on pairs, else just responses.
        ({"prompt": "p", "responses": ["a", "b"], "scores": [0, 1]}, LABELLED, "kway"),
        ({"prompt": "p", "responses": ["a", "b"], "scores": [0, 1]}, UNLABELLED, "responses"),
        ({"prompt": "p", "responses": ["a", "b"], "scores": None}, LABELLED, "responses"),
        ({"text": "t", "prompt": "p", "chosen": "c", "rejected": "r"}, LABELLED, "preferences"),
        ({"text": "t", "prompt": "p", "chosen": "c", "rejected": "r"}, UNLABELLED, "text"),
        ({"prompt": "p", "completion": "c", "label": True, "chosen": "c", "rejected": "r"},
         LABELLED, "preferences"),
        ({"instruction": "i", "output": "o", "chosen": "c", "rejected": "r"}, LABELLED,
         "alpaca_preferences"),
        ({"instruction": JUDGE, "output": "A"}, UNLABELLED, "alpaca"),
        # A list of messages is a conversation; one of texts is RM-Bench's styles.
        ({"prompt": [ASK], "chosen": [YES], "rejected": [NO]}, LABELLED, "preferences"),
        ({"prompt": "p", "chosen": ["a"], "rejected": ["b"]}, LABELLED, "rm_bench"),
        # Dialogue text with a prompt of its own is what the prompt is answered with.
        ({"prompt": "p", "chosen": HH, "rejected": HH}, LABELLED, "preferences"),
    ],
)  # fmt: skip
def test_a_record_that_fits_several_shapes_is_the_first_that_is_wanted(record, kinds, format):
    assert detect_format(record, file="f", line=1, kinds=kinds) == format


def test_pairs_are_two_responses_of_any_shape_without_their_labels():
    assert parse({"prompt": "p", "responses": ["a", "b", "c"]}, "pairs")[1] == ResponsesRow(
        "p", ("a", "b", "c"), 3
    )
    for record in (UNIFIED, SHAREGPT, {"chosen": [ASK, YES], "rejected": [ASK, NO]}):
        found = parse(record, "pairs")[1]
        assert found == ResponsesRow(found.prompt, ([YES], [NO]), 3)
        assert found.prompt[-1] == ASK
    asked = {
        "instruction": "[User Question]\nCan dogs get covid?\n\n",
        "input": "",
        "output": FRAMED,
    }
    assert parse(asked, "pairs")[1] == ResponsesRow("Can dogs get covid?", RESPONSES, 3)
    asked["input"] = "Even cats?"
    assert parse(asked, "pairs")[1].prompt == "Can dogs get covid?\nEven cats?"
    assert "needs two" in str(fault({"prompt": "p", "response": "r"}, "pairs"))
    assert "two responses" in str(fault({"prompt": "p", "completion": "r", "label": True}, "pairs"))
    assert "two responses" in str(fault({"text": "t"}, "pairs"))


TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]


def test_tools_stand_before_the_messages():
    record = {"prompt": [ASK], "chosen": [YES], "rejected": [NO], "system": "Be brief."}
    for tools in (TOOLS, json.dumps(TOOLS)):
        first, *others = parse(record | {"tools": tools})[1].prompt
        assert (first["role"], json.loads(first["content"])) == ("tools", TOOLS)
        assert others == [BRIEF, ASK]
    for none in (None, "", []):
        assert parse(record | {"tools": none})[1].prompt == [BRIEF, ASK]


PLAIN = {"prompt": "p", "chosen": "c", "rejected": "r"}


@pytest.mark.parametrize(
    ("record", "change", "field", "part"),
    [
        (PLAIN, {"margin": "big"}, "margin", "finite number"),
        (PLAIN, {"margin": 10**400}, "margin", "finite number"),
        (PLAIN, {"system": 3}, "system", "must be text"),
        (PLAIN, {"tools": TOOLS}, "tools", "the prompt is text"),
        (PLAIN, {"prompt": [BRIEF, ASK], "system": "Be."}, "system", "keep one"),
        (PLAIN, {"prompt": [ASK], "tools": "{"}, "tools", "list of JSON objects"),
        (PLAIN, {"prompt": [ASK], "tools": ["t"]}, "tools", "list of JSON objects"),
        ({"chosen": "abc", "rejected": "xyz"}, {}, "rejected", "begins otherwise"),
        ({"chosen": "一二三", "rejected": "一二四"}, {}, "rejected", "begins otherwise"),
        ({"chosen": "a b", "rejected": "a b"}, {}, "rejected", "same as chosen"),
        ({"chosen": [ASK, YES], "rejected": [YES, NO]}, {}, "rejected", "another last message"),
        ({"chosen": [ASK, YES], "rejected": [ASK, YES]}, {}, "rejected", "same as chosen"),
        ({"chosen": [ASK, ASK], "rejected": [ASK, NO]}, {}, "chosen", "[user]"),
        ({"prompt": "q", "chosen": [ASK, YES], "rejected": [ASK, NO]}, {}, "prompt", "message"),
        ({"chosen": f"{HH} a", "rejected": f"\n\nHuman: x{HH} b"}, {}, "rejected", "another"),
        ({"chosen": HH, "rejected": f"{HH} b"}, {}, "chosen", "empty turn"),
        ({"prompt": "p", "completion": "c", "label": 1}, {}, "label", "true"),
        ({"prompt": "p", "completion": "", "label": True}, {}, "completion", "empty"),
        ({"instruction": "i", "output": "o", "history": [["a", "b"]]}, {}, "history", "not read"),
        ({"instruction": "i", "output": ["a"]}, {}, "output", "two responses"),
        ({"instruction": JUDGE, "output": "C"}, {}, "output", '"A" or "B"'),
        ({"instruction": FRAMED, "output": "A"}, {}, "instruction", "[User Question]"),
        ({"instruction": JUDGE.replace("\nYes.\n", "\n"), "output": "A"}, {}, "instruction",
         "empty answer A"),
        (SHAREGPT, {"conversations": []}, "conversations", "empty list"),
        (SHAREGPT, {"conversations": "x"}, "conversations", "list of turns"),
        (SHAREGPT, {"conversations": [{"from": "human"}]}, "conversations[0]", "from and value"),
        (SHAREGPT, {"conversations": [{"from": "function_call", "value": "x"}]},
         "conversations[0].from", "one of human"),
        (SHAREGPT, {"chosen": {"from": "gpt", "value": 3}}, "chosen.value", "must be text"),
        (SHAREGPT, {"chosen": {"from": "human", "value": "x"}}, "chosen", "one assistant message"),
        (UNIFIED, {"conv_B": [NO, NO]}, "conv_B", "another last message"),
        (UNIFIED, {"conv_A": [YES], "conv_B": [NO]}, "conv_B", "one message at least"),
        (UNIFIED, {"conv_A": "x"}, "conv_A", "list of chat messages"),
        (UNIFIED, {"conv_A_rating": "1"}, "conv_A_rating", "finite number"),
        (UNIFIED, {"conv_B": [ASK, YES]}, "conv_B", "same as conv_A"),
        ({"prompt": "p", "responses": ["a"], "scores": [1]}, {}, "responses", "2 responses"),
        ({"prompt": "p", "responses": ["a", "b"], "scores": [1]}, {}, "scores", "2 finite"),
        ({"prompt": "p", "responses": ["a", "b"], "ranks": [1, None]}, {}, "ranks", "2 finite"),
        ({"prompt": "p", "responses": ["a", "b"], "ranks": [1, 2], "scores": [1, 2]}, {}, "ranks",
         "keep one"),
        ({"prompt": "p", "responses": ["a", ""], "scores": [1, 2]}, {}, "responses[1]", "empty"),
        (RM_BENCH, {"rejected": ["r0", "c1", "r2"]}, "rejected[1]", "also chosen"),
        (JUDGEBENCH, {"label": "A=B"}, "label", '"A>B"'),
        (JUDGEBENCH, {"response_B": "a"}, "response_B", "same as response_A"),
        ({"input": "i", "output_1": "x", "output_2": "y", "label": True}, {}, "label", "1 or 2"),
        (PANDALM, {"annotator2": 3}, "annotator2", "a tie"),
        (PANDALM, {"input": 3}, "input", "must be text"),
    ],
)  # fmt: skip
def test_a_wrong_field_is_named(record, change, field, part):
    error = fault(record | change)
    assert error.field == field
    assert part in str(error)


def test_the_documentation_has_a_row_of_each_format():
    text = (Path(__file__).parents[2] / "docs" / "data_formats.md").read_text("utf-8")
    lines = text.split("A row of each:\n\n")[1].split("\n\n")[0].split("\n")
    found = [parse(json.loads(line))[0] for line in lines]
    assert set(found) == set(FORMATS) - {"pairs"}
    for format in FORMATS:
        assert f"| `{format}` |" in text
    listed = [line.split("`")[1] for line in text.split("\n") if line.startswith("| `")]
    # Labelled ones stand in the order in which a row is compared with them.
    labelled = [name for name in FORMATS if kind_of(name) in LABELLED]
    assert [name for name in listed if name in labelled] == labelled


def test_what_is_trained_on_and_what_is_scored_have_the_same_prompt():
    record = {"prompt": [ASK], "chosen": [YES], "rejected": [NO], "system": "Be brief."}
    for more in ({}, {"tools": TOOLS}):
        row = record | more
        scored = candidates_of(row, file="f.jsonl", line=3)
        assert scored.prompt == parse(row)[1].prompt == parse(row, "pairs")[1].prompt
        assert scored.prompt[-2:] == [BRIEF, ASK]
