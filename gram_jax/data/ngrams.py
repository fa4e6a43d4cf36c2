"""Runs of n words as 64-bit numbers, and whether a text has one that is in other texts.

A word is a run of letters, digits and underscores, without regard to case; so neither spaces nor
punctuation tell texts apart. Training on text that evaluation files hold is commonly looked for by
runs of 13 words (Brown et al. 2020, arXiv 2005.14165, appendix C).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from gram_jax.data.token_records import record_key

Keys = npt.NDArray[np.uint64]

_WORD = re.compile(r"\w+")
_BASE = np.uint64(0x9E3779B97F4A7C15)
_MIXERS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))


def ngram_keys(text: str, n: int) -> Keys:
    """A key of each run of ``n`` words, in order; none of a text that has fewer words."""
    words = word_keys(text)
    keys = np.zeros(max(len(words) - n + 1, 0), np.uint64)
    for place in range(n):
        keys = keys * _BASE + words[place : place + len(keys)]
    return mixed(keys)


def word_keys(text: str) -> Keys:
    """A key of each word of a text, in order."""
    return np.array([_word_key(word) for word in _WORD.findall(text.casefold())], np.uint64)


def mixed(keys: Keys) -> Keys:
    """Keys in which every bit depends on all bits (the finaliser of splitmix64)."""
    for shift, factor in _MIXERS:
        keys = (keys ^ (keys >> np.uint64(shift))) * np.uint64(factor)
    return keys


def distinct_keys(texts: Iterable[str], n: int) -> Keys:
    """Keys of all runs of ``n`` words of some texts, sorted, each once."""
    found = [np.unique(ngram_keys(text, n)) for text in texts]
    return np.unique(np.concatenate(found)) if found else np.zeros(0, np.uint64)


def shares_one(text: str, n: int, keys: Keys) -> bool:
    """Whether a text has a run of ``n`` words that is among ``keys``, which are sorted."""
    own = ngram_keys(text, n)
    if not len(keys) or not len(own):
        return False
    places = np.minimum(np.searchsorted(keys, own), len(keys) - 1)
    return bool((keys[places] == own).any())


@functools.lru_cache(maxsize=1 << 18)
def _word_key(word: str) -> int:
    return record_key(word.encode("utf-8"))
