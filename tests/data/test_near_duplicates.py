"""Rows that nearly repeat an earlier one, and texts that share a run of words with others."""

import json
import random

import numpy as np
import peer_models
import pytest

from gram_jax.config import DataConfig
from gram_jax.config_rules import validate
from gram_jax.data import prepare
from gram_jax.data.examples import Layout
from gram_jax.data.meter import Meter
from gram_jax.data.near_duplicates import (
    PERMUTATIONS,
    band_keys,
    band_rows,
    repeated_among,
    repeated_in,
    signature,
)
from gram_jax.data.ngrams import distinct_keys, ngram_keys, shares_one
from gram_jax.data.prepare import prepared_rows
from gram_jax.data.rowset import read_manifest
from gram_jax.data.sources import PreferenceRow, TextRow
from gram_jax.errors import UserError
from gram_jax.pair import Pair

TOKENIZER = peer_models.tokenizer()


def words(rng, count):
    return [f"w{rng.randrange(3, 90)}" for _ in range(count)]


def text(content):
    return TextRow(content, "", 1)


def shingles(content):
    found = content.split()
    return {tuple(found[i : i + 5]) for i in range(len(found) - 4)}


def with_changes(rng, content, share):
    return " ".join(f"x{rng.random()}" if rng.random() < share else w for w in content.split())


def test_signatures_estimate_the_share_of_shingles_that_two_texts_have_in_common():
    rng = random.Random(0)
    errors = []
    for change in (0.0, 0.01, 0.03, 0.06, 0.12, 0.3) * 6:
        a = " ".join(f"v{rng.randrange(5000)}" for _ in range(400))
        b = with_changes(rng, a, change)
        truth = len(shingles(a) & shingles(b)) / len(shingles(a) | shingles(b))
        errors.append(float((signature(text(a)) == signature(text(b))).mean()) - truth)
    assert np.std(errors) < 0.045
    assert abs(np.mean(errors)) < 0.03


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.9, 0.97])
def test_pairs_as_alike_as_the_threshold_meet_in_a_band(threshold):
    rows = band_rows(threshold)
    bands = PERMUTATIONS // rows
    assert (1 - threshold**rows) ** bands <= 0.01
    assert (1 - threshold ** (rows + 1)) ** (PERMUTATIONS // (rows + 1)) > 0.01
    rng = np.random.default_rng(0)
    a = rng.integers(0, 2**32, (2000, PERMUTATIONS), np.uint32)
    b = np.where(rng.random(a.shape) < threshold, a, a + np.uint32(1))
    met = (band_keys(a, threshold) == band_keys(b, threshold)).any(axis=0)
    assert met.mean() > 0.98
    # And those that are not alike hardly ever do.
    c = np.where(rng.random(a.shape) < 0.1, a, a + np.uint32(1))
    assert (band_keys(a, threshold) == band_keys(c, threshold)).any(axis=0).mean() < 0.15


def test_case_and_punctuation_do_not_tell_texts_apart():
    a, b = "One, two: three - FOUR five six.", "one two three four five  six"
    assert np.array_equal(signature(text(a)), signature(text(b)))
    assert np.array_equal(ngram_keys(a, 3), ngram_keys(b, 3))


def test_a_text_without_words_repeats_none_and_a_short_one_only_itself():
    assert signature(text("... !")) is None
    a, b, c = (signature(text(t)) for t in ("yes", "Yes!", "no"))
    assert np.array_equal(a, b) and not np.array_equal(a, c)


def test_of_a_chain_the_first_is_kept_and_of_rows_that_are_unlike_all():
    base = np.arange(PERMUTATIONS, dtype=np.uint32)
    chain = [base.copy() for _ in range(4)]
    for step in range(1, 4):  # each differs from the one before in 16 places
        chain[step] = chain[step - 1].copy()
        chain[step][16 * step : 16 * step + 16] += np.uint32(1000)
    other = base + np.uint32(5000)
    bucket = np.stack([chain[0], other, chain[1], chain[2], chain[3], other])
    assert repeated_in(bucket, 0.8).tolist() == [False, False, True, False, True, True]
    # Met in other bands too, the third of the chain is compared with the second.
    assert repeated_among(bucket, 0.8).tolist()[:3] == [False, False, True]
    assert not repeated_among(np.stack([base, other]), 0.8).any()


def preference(prompt, chosen, rejected):
    fields = ("chosen", "rejected")
    return PreferenceRow(prompt, (chosen, rejected), (Pair(0, 1),), fields, "", None, 1)


def test_pairs_repeat_each_other_only_with_the_same_prompt_and_in_the_same_order():
    long = " ".join(words(random.Random(1), 60))
    row = preference("What?", long, "no")
    same = signature(row) == signature(preference("  what? ", f"{long} more", "no"))
    assert same.mean() > 0.8
    for other in (preference("Why?", long, "no"), preference("What?", "no", long)):
        assert (signature(row) == signature(other)).mean() < 0.05


def test_a_run_of_words_is_found_wherever_it_stands():
    rng = random.Random(2)
    evaluation = [" ".join(f"v{rng.randrange(999)}" for _ in range(40)) for _ in range(20)]
    keys = distinct_keys(evaluation, 13)
    assert len(keys) == 20 * 28
    run = evaluation[7].split()[11:24]
    around = " ".join(["a", *run[:6], "\n", *(w.upper() + "," for w in run[6:]), "b"])
    assert shares_one(around, 13, keys)
    assert not shares_one(" ".join(["a", *run[:12], "b", run[12]]), 13, keys)
    assert not shares_one(" ".join(run[:12]), 13, keys)
    assert not shares_one(around, 13, keys[:0])


def prepared(tmp_path, rows, **options):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(**{"row_length": 64, "workers": 1} | options)
    validate(config)
    folder = tmp_path / "rows"
    prepared_rows(
        str(path), config, TOKENIZER, folder,
        layout=Layout("text", True), replace=True, meter=Meter(quiet=True),
    )  # fmt: skip
    return read_manifest(folder)


def test_repeated_and_overlapping_texts_are_left_out_counted_and_part_of_the_key(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(prepare, "CHUNK_BYTES", 2000)
    rng = random.Random(3)
    rows = [{"text": " ".join(words(rng, 50))} for _ in range(100)]
    near = [{"text": row["text"] + " w5"} for row in rows[:30]]
    inside = [{"text": " ".join(["w4", *row["text"].split()[9:30]])} for row in rows[50:55]]
    plain = prepared(tmp_path, [*rows, *near])
    assert plain.read["near_duplicates"] == 0
    assert "near_duplicates" not in plain.key["selection"]
    found = prepared(tmp_path, [*rows, *near], near_duplicates=0.8)
    assert found.read["near_duplicates"] == 30
    assert found.packed["tokens"] == prepared(tmp_path, rows).packed["tokens"]
    assert found.id != plain.id
    # Those left out for evaluation's sake are no earlier rows.
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in inside))
    options = {"exclude": (str(tmp_path / "eval.jsonl"),), "exclude_ngrams": 13}
    found = prepared(tmp_path, [*rows, *near], near_duplicates=0.8, **options)
    assert found.read["overlapping_texts"] == 5
    assert found.read["near_duplicates"] == 30
    counted = prepared(tmp_path, rows, on_overlap="count", **options)
    assert counted.read["overlapping_texts"] == 5
    assert counted.packed["tokens"] == prepared(tmp_path, rows).packed["tokens"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"near_duplicates": 1.5}, "near_duplicates is a share"),
        ({"exclude_ngrams": 13}, "goes with sources in exclude"),
        ({"exclude_ngrams": -1, "exclude": ("a.jsonl",)}, "number of words"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        validate(DataConfig(**options))
