"""A tokenizer is trained from a user's own files, whatever kind they are."""

import json
import subprocess
import sys

import pytest

from gram_jax.data.tokenizer import Tokenizer
from gram_jax.errors import DataError
from gram_jax.train_tokenizer import texts_of, train


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_all_known_columns_are_learnt_from():
    row = {
        "text": "a",
        "prompt": [{"role": "user", "content": "b"}, {"role": "assistant", "tool_calls": []}],
        "chosen": "c",
        "rejected": [{"role": "assistant", "content": "d"}],
        "responses": ["e", "f"],
        "response": "g",
        "source": "not this",
    }
    assert sorted("".join(texts_of(row, "x.jsonl", 1))) == list("abcdefg")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction": "x"}, "x.jsonl:3: has none of the columns text, prompt"),
        ({"prompt": "x", "chosen": 3}, "x.jsonl:3: field 'chosen': must be text"),
        ({"responses": ["x", None]}, "x.jsonl:3: field 'responses': must be text"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(row, message):
    with pytest.raises(DataError) as caught:
        list(texts_of(row, "x.jsonl", 3))
    assert message in str(caught.value)


def test_frequent_words_of_every_file_become_one_token(tmp_path):
    texts = write(tmp_path / "a.jsonl", *[{"text": "zebra zebra"}] * 20)
    pairs = write(tmp_path / "b.jsonl", *[{"prompt": "q", "chosen": "okapi", "rejected": ""}] * 20)
    tokenizer = train([texts, pairs], 300)
    assert len(tokenizer.encode_response("okapi", add_eos=False)) == 1
    assert len(tokenizer.encode_response("zebra", add_eos=False)) == 1
    assert tokenizer.vocab_size <= 300


def test_the_command_writes_a_folder_once(tmp_path):
    data = write(tmp_path / "a.jsonl", {"text": "A short text."})
    command = [
        sys.executable, "-m", "gram_jax.train_tokenizer",
        f"--input={data}", "--vocab_size=300", f"--output={tmp_path / 'tokenizer'}",
    ]  # fmt: skip
    first = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "written to" in first.stdout
    tokenizer = Tokenizer.load(tmp_path / "tokenizer")
    ids = tokenizer.encode_response("A short text.", add_eos=False)
    assert tokenizer.decode(ids) == "A short text."
    second = subprocess.run(command, capture_output=True, text=True)
    assert second.returncode == 2
    assert "has a tokenizer.json already" in second.stderr
