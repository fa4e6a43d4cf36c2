"""Lines and fields are checked, and a fault is named with its file, line and field."""

import gzip
import json

import pyarrow as pa
import pytest

from gram_jax.data.shapes import detect_format, parse_row
from gram_jax.data.sources import PreferenceRow, ResponsesRow, TextRow, read_jsonl
from gram_jax.errors import DataError, UserError
from gram_jax.pair import Pair

ASSISTANT = {"role": "assistant", "content": "four"}
QUESTION = [{"role": "user", "content": "2+2?"}]


def write(path, *rows):
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_bytes("".join(line + "\n" for line in lines).encode("utf-8"))
    return path


def fault(function, *args, **options):
    with pytest.raises(DataError) as caught:
        list(function(*args, **options))
    return caught.value


def parse(record, format, reference_field=""):
    return parse_row(record, format, file="a", line=3, reference_field=reference_field)


def test_message_of_a_data_error_gives_file_line_field_and_reason():
    error = DataError("is empty", file="a.jsonl", line=3, field="prompt")
    assert str(error) == "a.jsonl:3: field 'prompt': is empty"
    assert str(DataError("is empty", file="a.jsonl")) == "a.jsonl: is empty"
    assert isinstance(error, UserError)


def test_separators_inside_a_string_do_not_end_a_line(tmp_path):
    text = "a\u2028b\u2029c\x85d\x0be"
    path = write(tmp_path / "a.jsonl", {"text": text}, {"text": "next"})
    assert [(line, row["text"]) for line, row in read_jsonl(path)] == [(1, text), (2, "next")]


def test_a_compressed_file_reads_like_the_plain_one(tmp_path):
    plain = write(tmp_path / "a.jsonl", {"text": "one"}, {"text": "two"})
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert list(read_jsonl(packed)) == list(read_jsonl(plain))
    with pa.CompressedOutputStream(tmp_path / "a.jsonl.zst", "zstd") as stream:
        stream.write(plain.read_bytes())
    assert list(read_jsonl(tmp_path / "a.jsonl.zst")) == list(read_jsonl(plain))


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
    (tmp_path / "a.jsonl.zst").write_bytes(b'{"text": "one"}\n')
    assert "damaged" in str(fault(read_jsonl, tmp_path / "a.jsonl.zst"))


def test_the_lines_before_a_bad_one_are_given_first(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"n": 1}\n{"n": 2}\n{"n": \n{"n": 4}\n')
    lines = read_jsonl(path)
    assert [next(lines), next(lines)] == [(1, {"n": 1}), (2, {"n": 2})]
    assert fault(lambda: lines).line == 3


def test_a_text_counts_under_its_source_or_its_file():
    assert parse({"text": "t", "source": "s"}, "text") == TextRow("t", "s", 3)
    for file, source in (
        ("data/a.jsonl.zst", "a"),
        ("b.parquet", "b"),
        ("c.json", "c"),
        ("d.1.arrow", "d.1"),
        ("e", "e"),
    ):
        row = parse_row({"text": "t", "source": None}, "text", file=file, line=1)
        assert row == TextRow("t", source, 1)


PAIR = (Pair(0, 1),), ("chosen", "rejected")


def test_preferences_have_their_line_subset_and_reference():
    row = {"prompt": "p", "chosen": "c", "rejected": "r", "logprob": [-1, -2.5], "subset": "s"}
    found = parse(row, "preferences", "logprob")
    assert found == PreferenceRow("p", ("c", "r"), *PAIR, "s", (-1.0, -2.5), 3)
    found = parse(row | {"subset": None}, "preferences")
    assert found == PreferenceRow("p", ("c", "r"), *PAIR, "", None, 3)


def test_chat_responses_may_be_text_one_message_or_a_list_of_one():
    row = {"prompt": QUESTION, "chosen": ASSISTANT, "rejected": "five"}
    for chosen in (ASSISTANT, [ASSISTANT]):
        found = parse(row | {"chosen": chosen}, "preferences")
        assert found.responses == ([ASSISTANT], "five")
        found = parse({"prompt": QUESTION, "responses": [chosen, "five"]}, "responses")
        assert found.responses == ([ASSISTANT], "five")


def test_a_prompt_has_one_or_more_responses_which_may_be_equal():
    assert parse({"prompt": "p", "response": "r"}, "responses") == ResponsesRow("p", ("r",), 3)
    row = {"prompt": "", "responses": ["r", "r", "q"], "response": None}
    assert parse(row, "responses") == ResponsesRow("", ("r", "r", "q"), 3)


@pytest.mark.parametrize(
    ("record", "format"),
    [
        ({"text": "t"}, "text"),
        ({"text": "t", "prompt": "p"}, "text"),
        ({"text": "t", "prompt": "p", "response": "r"}, "responses"),
        ({"prompt": "p", "responses": []}, "responses"),
        ({"prompt": "p", "chosen": "c", "rejected": "r", "response": "x"}, "preferences"),
        # Columns of a table that a row does not use are null.
        ({"prompt": "p", "chosen": None, "rejected": None, "response": "x"}, "responses"),
        ({"prompt": None, "response": None, "text": "t"}, "text"),
        # A null that the row needs is for parse_row to name.
        ({"prompt": "p", "chosen": None, "rejected": "r"}, "preferences"),
        ({"text": None}, "text"),
    ],
)
def test_the_format_of_a_record_follows_from_its_fields(record, format):
    assert detect_format(record, file="a", line=1) == format


@pytest.mark.parametrize("record", [{}, {"prompt": "p", "chosen": "c"}, {"response": "r"}])
def test_a_record_of_no_format_is_an_error_that_names_fields_and_formats(record):
    error = fault(detect_format, record, file="a", line=7)
    assert (error.file, error.line) == ("a", 7)
    assert f"fields here: {', '.join(sorted(record)) or 'none'}" in str(error)
    for field in ("text", "responses", "rejected"):
        assert field in error.reason


@pytest.mark.parametrize(
    ("change", "field", "part"),
    [
        ({"chosen": None}, "chosen", "null"),
        ({"chosen": ""}, "chosen", "empty"),
        ({"chosen": b"c"}, "chosen", "not bytes"),
        ({"rejected": 3}, "rejected", "a number"),
        ({"rejected": "c"}, "rejected", "same as chosen"),
        ({"chosen": [ASSISTANT]}, "chosen", "the prompt is text"),
        ({"prompt": QUESTION, "chosen": [*QUESTION, ASSISTANT]}, "chosen", "[user, assistant]"),
        ({"prompt": []}, "prompt", "empty list"),
        ({"prompt": [{"role": "user", "content": 3}]}, "prompt[0].content", "must be text"),
        ({"prompt": [{"content": "x"}]}, "role", "missing"),
        ({"logprob": [1.0]}, "logprob", "two finite numbers"),
        ({"logprob": [1.0, float("nan")]}, "logprob", "two finite numbers"),
        ({"logprob": [1.0, 10**400]}, "logprob", "two finite numbers"),
        ({"logprob": [1.0, True]}, "logprob", "two finite numbers"),
        ({"subset": 1}, "subset", "must be text"),
        ({"prompt": "\ud800"}, "prompt", "surrogate"),
    ],
)
def test_bad_preference_fields_are_named(change, field, part):
    good = {"prompt": "p", "chosen": "c", "rejected": "r", "logprob": [0, 0]}
    error = fault(parse, good | change, "preferences", "logprob")
    assert (error.file, error.line, error.field) == ("a", 3, field)
    assert part in str(error)


@pytest.mark.parametrize(
    ("change", "field", "part"),
    [
        ({"responses": []}, "responses", "at least one"),
        ({"responses": "r"}, "responses", "must be a list"),
        ({"responses": ["r", ""]}, "responses[1]", "is empty"),
        ({"responses": [[ASSISTANT]]}, "responses[0]", "the prompt is text"),
        ({"response": "r"}, "responses", "stands beside response"),
        ({"responses": None}, "response", "is missing"),
        ({"prompt": 1}, "prompt", "must be text"),
    ],
)
def test_bad_responses_are_named(change, field, part):
    error = fault(parse, {"prompt": "p", "responses": ["r"]} | change, "responses")
    assert (error.file, error.line, error.field) == ("a", 3, field)
    assert part in str(error)


def test_a_missing_field_is_an_error_that_lists_those_there():
    row = {"prompt": "p", "chosen": "c"}
    assert "fields here: chosen, prompt" in str(fault(parse, row, "preferences"))
    assert fault(parse, row, "text").field == "text"


def test_messages_can_be_printed_whatever_the_data_holds():
    row = {"\ud800": 1, "line\nbreak\x1b[31m": 2, **{f"field{n}": n for n in range(10_000)}}
    for error in (fault(parse, row, "text"), fault(detect_format, row, file="a", line=1)):
        assert len(str(error)) < 500
        assert str(error).isprintable()
        assert str(error).encode("utf-8")


def test_an_unknown_format_is_a_mistake_of_the_caller():
    with pytest.raises(ValueError, match=r"there are .*preferences"):
        parse({}, "texts")
