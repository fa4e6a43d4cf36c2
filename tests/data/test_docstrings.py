"""The built-in preference task: the damage is real, and nothing but the damage tells."""

import random
import sysconfig
from collections import Counter
from pathlib import Path

import pytest

from gram_jax.data import builtin, docstrings
from gram_jax.data.builtin import Docstring
from gram_jax.data.docstrings import KINDS, preference_pairs, prompt_of, response_of

EXAMPLE = Docstring("p", "p.f", "(data, loc=0)", "The sum of all the parts of data in a box. " * 3)


@pytest.fixture(scope="module")
def library():
    root = Path(sysconfig.get_path("stdlib"))
    folders = ("email", "asyncio", "unittest", "xml", "tkinter", "http", "importlib", "json")
    found = [
        item
        for name in folders
        for item in builtin._read_folder(root / name, "stdlib", name).docstrings
    ]
    return builtin.distinct(found)


@pytest.fixture(scope="module")
def pairs(library):
    return preference_pairs(library, library, seed=3, per_docstring=len(KINDS))[0]


def of_kind(pairs, kind):
    chosen = [pair for pair in pairs if pair.kind == kind]
    assert len(chosen) > 40
    return chosen


def test_all_kinds_are_made(pairs):
    assert set(Counter(pair.kind for pair in pairs)) == set(KINDS)


def test_length_tells_nothing(pairs):
    assert all(len(pair.chosen) == len(pair.rejected) for pair in pairs)


def test_responses_differ_in_words_and_not_in_blanks(pairs):
    for pair in pairs:
        assert pair.chosen.split() != pair.rejected.split()
        assert 80 <= len(pair.chosen) <= 300
        if pair.kind != "other":
            blanks = [
                "".join(c for c in text if c in "\n") for text in (pair.chosen, pair.rejected)
            ]
            assert blanks[0] == blanks[1]


def test_a_swap_exchanges_two_neighbours(pairs):
    for pair in of_kind(pairs, "swap"):
        before, after = pair.chosen.split(), pair.rejected.split()
        at = [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]
        assert len(at) == 2
        assert at[1] == at[0] + 1
        assert Counter("".join(before)) == Counter("".join(after))


def test_displaced_words_are_those_of_the_chosen_in_another_order(pairs):
    for pair in of_kind(pairs, "displaced"):
        before, after = pair.chosen.split(), pair.rejected.split()
        moved = sum(a != b for a, b in zip(before, after, strict=True))
        assert Counter(pair.chosen) == Counter(pair.rejected)
        assert len(before) / 8 < moved <= len(before) / 4


def test_renamed_parameters_are_gone_and_the_new_ones_are_not_in_the_signature(pairs):
    for pair in of_kind(pairs, "names"):
        before, after = (set(docstrings.re.findall(r"\w+", text)) for text in pair[1:3])
        own = set(docstrings._parameters(pair.prompt[pair.prompt.index("(") :].strip()))
        assert before - after <= own
        assert not (after - before) & own


def test_a_splice_replaces_one_line_by_a_sentence_of_another_object(pairs):
    for pair in of_kind(pairs, "splice"):
        before, after = pair.chosen.split("\n"), pair.rejected.split("\n")
        assert sum(a != b for a, b in zip(before, after, strict=True)) == 1


def test_the_text_of_another_object_is_a_whole_response(pairs, library):
    responses = {response_of(item) for item in library}
    assert all(pair.rejected in responses for pair in of_kind(pairs, "other"))


def test_pairs_depend_on_the_seed_and_not_on_the_order(library, pairs):
    shuffled = random.Random(0).sample(library, len(library))
    again, _ = preference_pairs(shuffled, shuffled, seed=3, per_docstring=len(KINDS))
    assert sorted(again) == sorted(pairs)
    other, _ = preference_pairs(library, library, seed=4, per_docstring=len(KINDS))
    assert sorted(other) != sorted(pairs)


def test_one_docstring_gives_as_many_pairs_as_asked(library):
    found, skipped = preference_pairs(library, library, seed=0, per_docstring=2)
    counts = Counter(pair.prompt for pair in found)
    assert max(counts.values()) == 2
    assert len(counts) + skipped["length"] <= len(library)


def test_what_is_impossible_is_skipped_and_counted():
    none = [Docstring("p", "p.f", "()", "Word " * 30)]
    assert preference_pairs(none, none, seed=0, kinds=["names", "splice"]) == (
        [],
        {"names": 1, "splice": 1},
    )
    with pytest.raises(ValueError, match="nonsense"):
        preference_pairs(none, none, seed=0, kinds=["nonsense"])


def test_the_prompt_is_name_signature_and_newline():
    assert prompt_of(EXAMPLE) == "p.f(data, loc=0)\n"
    prompt, text = docstrings.pretraining_text(EXAMPLE)
    assert prompt == "p.f(data, loc=0)\n"
    assert text == docstrings.response_of(EXAMPLE)
    assert EXAMPLE.text.startswith(text)


def test_a_long_docstring_is_cut_after_a_paragraph_else_a_sentence():
    paragraphs = "\n\n".join(["x" * 99 + "."] * 8)
    assert response_of(EXAMPLE._replace(text=paragraphs)) == "\n\n".join(["x" * 99 + "."] * 2)
    sentences = " ".join(["The " + "x" * 80 + " e.g. this."] * 9)
    cut = response_of(EXAMPLE._replace(text=sentences))
    assert cut == " ".join(["The " + "x" * 80 + " e.g. this."] * 3)
    headed = "A text. " * 30 + "\n\nParameters\n----------\n\n" + "y" * 300
    assert response_of(EXAMPLE._replace(text=headed)) == ("A text. " * 30).strip()
    assert response_of(EXAMPLE._replace(text="x" * 900)) is None


def test_train_and_held_out_are_apart_and_the_share_is_right(library):
    train, held_out = docstrings.split(library)
    assert len(train) + len(held_out) == len(library)
    assert 0.05 < len(held_out) / len(library) < 0.12
    assert not {item.text for item in train} & {item.text for item in held_out}
    assert docstrings.split(library[::-1])[1] == held_out[::-1]
