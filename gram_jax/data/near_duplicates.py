"""Rows that are nearly the same as an earlier row, found by MinHash.

Two rows are as alike as their sets of shingles (runs of five words): |A and B| / |A or B|, the
measure of Jaccard. A signature holds the least value of each of 128 hash functions over a set; the
share of places in which two signatures agree estimates that measure, with a standard deviation of
at most 0.045 (Broder 1997). Signatures are cut into bands, and only rows that agree in a whole band
are compared, so that the work does not grow with the number of pairs of rows.

A row is left out if it is nearly the same as an earlier row that it meets in a band, whether or not
that one is left out too: of a chain of rows the first is kept. Everything is decided within one
band's bucket, so one machine and many leave out the same rows.

Of a text, the text counts. Of a row with responses each response counts by itself, together with
its place and the prompt: rows of different prompts, or with chosen and rejected the other way
round, are never alike.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from gram_jax.data.judge import response_text
from gram_jax.data.ngrams import Keys, mixed, ngram_keys, word_keys
from gram_jax.data.selection import normalised
from gram_jax.data.sources import Row, TextRow, UnpairedRow
from gram_jax.data.token_records import record_key

PERMUTATIONS = 128
_SHINGLE = 5  # words
_MISSED = 0.01  # share of the pairs at the threshold that may meet in no band
_COMPARED = 64  # rows of a bucket, unlike each other, that the others are compared with
_COLUMNS = 1024  # shingles hashed at once

Signatures = npt.NDArray[np.uint32]

_generator = np.random.default_rng(20120)
_FACTORS, _TERMS = _generator.integers(0, 2**64, (2, PERMUTATIONS, 1), np.uint64) | np.uint64(1)


def signature(row: Row) -> Signatures | None:
    """The signature of a row, [128]; None if it has no words."""
    shingles = _shingles(row)
    if not len(shingles):
        return None
    least = np.full(PERMUTATIONS, 2**32 - 1, np.uint32)
    for start in range(0, len(shingles), _COLUMNS):
        hashed = shingles[start : start + _COLUMNS] * _FACTORS + _TERMS
        least = np.minimum(least, (hashed >> np.uint64(32)).min(axis=1).astype(np.uint32))
    return least


def band_rows(threshold: float) -> int:
    """How many places of a signature are a band, so that few pairs at the threshold are missed.

    A pair that is alike to s agrees in a band of r places with probability s^r.
    """
    for rows in range(PERMUTATIONS, 1, -1):
        if (1 - threshold**rows) ** (PERMUTATIONS // rows) <= _MISSED:
            return rows
    return 1


def band_keys(signatures: Signatures, threshold: float) -> Keys:
    """Of signatures [N, 128], a key of each band, [bands, N]; equal in rows that meet there."""
    rows = band_rows(threshold)
    bands = PERMUTATIONS // rows
    keys = np.zeros((bands, len(signatures)), np.uint64)
    for band in range(bands):
        for place in range(band * rows, (band + 1) * rows):
            keys[band] = mixed(keys[band] + signatures[:, place])
    return keys


def repeated_in(bucket: Signatures, threshold: float) -> npt.NDArray[np.bool_]:
    """Which rows of a bucket [N, 128], in their order, are nearly the same as an earlier one."""
    repeated = np.zeros(len(bucket), np.bool_)
    unlike = np.zeros((_COMPARED, PERMUTATIONS), np.uint32)
    number = 0
    for place, own in enumerate(bucket):
        agreed = (unlike[:number] == own).mean(axis=1)
        repeated[place] = bool((agreed >= threshold).any())
        if not repeated[place] and number < _COMPARED:
            unlike[number] = own
            number += 1
    return repeated


def repeated_among(signatures: Signatures, threshold: float) -> npt.NDArray[np.bool_]:
    """Which of all rows [N, 128], in their order, are nearly the same as an earlier one."""
    repeated = np.zeros(len(signatures), np.bool_)
    for keys in band_keys(signatures, threshold):
        order = np.argsort(keys, kind="stable")
        edges = np.flatnonzero(np.diff(keys[order])) + 1
        starts, ends = np.append(0, edges), np.append(edges, len(order))
        for bucket in np.flatnonzero(ends - starts > 1):  # most rows meet no other
            members = order[starts[bucket] : ends[bucket]]
            repeated[members] |= repeated_in(signatures[members], threshold)
    return repeated


def _shingles(row: Row) -> Keys:
    if isinstance(row, TextRow):
        return _text_shingles(row.text)
    prompt = record_key(normalised(row.prompt))
    if isinstance(row, UnpairedRow):
        named = [(f"{prompt}:{row.good}", row.response)]
    else:
        named = [(f"{prompt}:{place}", text) for place, text in enumerate(row.responses)]
    parts = [
        mixed(_text_shingles(response_text(response)) + np.uint64(record_key(name.encode())))
        for name, response in named
    ]
    return np.concatenate(parts)


def _text_shingles(text: str) -> Keys:
    """Runs of five words; of a shorter text, all of it."""
    number = len(word_keys(text))
    return ngram_keys(text, max(min(number, _SHINGLE), 1))
