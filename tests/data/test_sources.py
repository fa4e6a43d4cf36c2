"""Files are read line by line, and a fault is named with its file, line and field."""

import gzip
import json

import pytest

from gram_jax.data.sources import read_jsonl, read_preferences, read_texts
from gram_jax.errors import DataError, UserError

ASSISTANT = {"role": "assistant", "content": "four"}
QUESTION = [{"role": "user", "content": "2+2?"}]


def write(path, *rows):
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_bytes("".join(line + "\n" for line in lines).encode("utf-8"))
    return path


def fault(reader, *args):
    with pytest.raises(DataError) as caught:
        list(reader(*args))
    return caught.value


def test_message_of_a_data_error_gives_file_line_field_and_reason():
    error = DataError("is empty", file="a.jsonl", line=3, field="prompt")
    assert str(error) == "a.jsonl:3: field 'prompt': is empty"
    assert str(DataError("is empty", file="a.jsonl")) == "a.jsonl: is empty"
    assert isinstance(error, UserError)


def test_separators_inside_a_string_do_not_end_a_line(tmp_path):
    text = "a\u2028b\u2029c\x85d\x0be"
    path = write(tmp_path / "a.jsonl", {"text": text}, {"text": "next"})
    assert [(line, row["text"]) for line, row in read_jsonl(path)] == [(1, text), (2, "next")]


def test_a_gzip_file_reads_like_the_plain_one(tmp_path):
    plain = write(tmp_path / "a.jsonl", {"text": "one"}, {"text": "two"})
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert list(read_jsonl(packed)) == list(read_jsonl(plain))
    assert [row.source for row in read_texts(packed)] == ["a", "a"]


def test_a_last_line_needs_no_newline_and_may_be_followed_by_blank_ones(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n{"text": "two"}')
    assert len(list(read_jsonl(path))) == 2
    path.write_bytes(b'{"text": "one"}\n\n  \n')
    assert len(list(read_jsonl(path))) == 1


@pytest.mark.parametrize(
    ("content", "line", "part"),
    [
        (b"", None, "empty"),
        (b"\n\n", None, "empty"),
        (b'{"a": 1}\n\n{"a": 2}\n', 2, "blank"),
        (b'{"a": 1}\n{"a": \n', 2, "not JSON"),
        (b'{"a": "\xff"}\n', 1, "not UTF-8"),
        (b'{"a": 1}\n[1]\n', 2, "not a list"),
        (b"[" * 100_000 + b"\n", 1, "nested"),
    ],
)
def test_damaged_lines_are_named(tmp_path, content, line, part):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    error = fault(read_jsonl, path)
    assert (error.file, error.line) == (str(path), line)
    assert part in str(error)


def test_missing_files_folders_and_cut_gzip_are_named(tmp_path):
    assert "no such file" in str(fault(read_jsonl, tmp_path / "none.jsonl"))
    assert "folder" in str(fault(read_jsonl, tmp_path))
    path = tmp_path / "a.jsonl.gz"
    whole = gzip.compress(b'{"text": "one"}\n' * 50)
    path.write_bytes(whole[:-9])
    assert "cut off" in str(fault(read_jsonl, path))
    path.write_bytes(b'{"text": "one"}\n')
    assert "damaged" in str(fault(read_jsonl, path))


def test_preferences_are_read_with_their_line_subset_and_reference(tmp_path):
    path = write(
        tmp_path / "a.jsonl",
        {"prompt": "p", "chosen": "c", "rejected": "r", "logprob": [-1, -2.5], "subset": "s"},
        {"prompt": "p", "chosen": "c", "rejected": "r", "logprob": [-1.0, 0]},
    )
    first, second = read_preferences(path, "logprob")
    assert first == ("p", "c", "r", "s", (-1.0, -2.5), 1)
    assert second == ("p", "c", "r", "", (-1.0, 0.0), 2)
    assert next(read_preferences(path)).reference is None


def test_chat_responses_may_be_text_one_message_or_a_list_of_one(tmp_path):
    row = {"prompt": QUESTION, "chosen": ASSISTANT, "rejected": "five"}
    path = write(tmp_path / "a.jsonl", row, row | {"chosen": [ASSISTANT]})
    assert [(row.chosen, row.rejected) for row in read_preferences(path)] == [
        ([ASSISTANT], "five"),
        ([ASSISTANT], "five"),
    ]


@pytest.mark.parametrize(
    ("change", "field", "part"),
    [
        ({"chosen": None}, "chosen", "null"),
        ({"chosen": ""}, "chosen", "empty"),
        ({"rejected": 3}, "rejected", "a number"),
        ({"rejected": "c"}, "rejected", "same as chosen"),
        ({"chosen": [ASSISTANT]}, "chosen", "the prompt is text"),
        ({"prompt": QUESTION, "chosen": [*QUESTION, ASSISTANT]}, "chosen", "[user, assistant]"),
        ({"prompt": []}, "prompt", "empty list"),
        ({"prompt": [{"role": "user", "content": 3}]}, "prompt[0].content", "must be text"),
        ({"prompt": [{"content": "x"}]}, "role", "missing"),
        ({"logprob": [1.0]}, "logprob", "two finite numbers"),
        ({"logprob": [1.0, float("nan")]}, "logprob", "two finite numbers"),
        ({"subset": 1}, "subset", "must be text"),
        ({"prompt": "\ud800"}, "prompt", "surrogate"),
    ],
)
def test_bad_preference_fields_are_named(tmp_path, change, field, part):
    good = {"prompt": "p", "chosen": "c", "rejected": "r", "logprob": [0, 0]}
    path = tmp_path / "a.jsonl"
    path.write_text(f"{json.dumps(good)}\n{json.dumps(good | change)}\n", encoding="ascii")
    error = fault(read_preferences, path, "logprob")
    assert (error.line, error.field) == (2, field)
    assert part in str(error)


def test_a_missing_field_is_an_error_that_lists_those_there(tmp_path):
    path = write(tmp_path / "a.jsonl", {"prompt": "p", "chosen": "c"})
    assert "fields here: chosen, prompt" in str(fault(read_preferences, path))
    assert fault(read_texts, path).field == "text"
