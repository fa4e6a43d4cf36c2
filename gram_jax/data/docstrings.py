"""The quickstart's preference task: a Python object's own docstring against a damaged one.

The prompt is the object's name and signature, the chosen response the beginning of its docstring.
The rejected response has exactly as many characters, so that length tells nothing, and is one of:

  other      another object's docstring, from the same package if there is one of that length
  displaced  a quarter of the words permuted among each other
  names      the parameters named in the text renamed, consistently, to ones it does not have
  splice     one sentence replaced by another docstring's
  swap       two neighbouring words swapped

Only lower-case words without punctuation move, and line breaks stay where they were: nothing but
the words tells the two apart.
"""

from __future__ import annotations

import ast
import hashlib
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from gram_jax.data.builtin import Docstring

KINDS = ("other", "displaced", "names", "splice", "swap")
LONGEST_RESPONSE = 300
SHORTEST_RESPONSE = 80

_HELD_OUT_PERCENT = 8
_WORD = re.compile(r"(?<![^\s(])[a-z]{2,}(?![^\s])")
_NEIGHBOURS = re.compile(r"(?<![^\s(])([a-z]+) ([a-z]+)(?![^\s.,;:)])")
# Swapping one of these with its neighbour is never just another way to say the same.
_FUNCTION_WORDS = frozenset(
    {
        "a", "an", "the", "of", "to", "in", "for", "with", "by", "from", "on", "at", "into", "as",
        "is", "are", "if",
    }
)  # fmt: skip
_SENTENCE = re.compile(r"(?:(?<=^)|(?<=[.!?] )|(?<=\n))[A-Z][^\n]{28,}?[a-z)`'\"][.](?=\s|$)")
_SENTENCE_END = re.compile(r"(?<!\be\.g)(?<!\bi\.e)[.!?](?=\s)")
_SECTION_HEAD = re.compile(r"\n+[A-Z][\w ]*(\n[-=~]+|:)$|\n+(\.\. |::|>>>)[^\n]*$")


class DocstringPair(NamedTuple):
    """A prompt, a response, a damaged response of the same length, and what the damage is."""

    prompt: str
    chosen: str
    rejected: str
    kind: str
    package: str


def prompt_of(docstring: Docstring) -> str:
    """The object's name and signature, and a newline: `scipy.stats.norm.fit(data, loc=0)\\n`."""
    return f"{docstring.qualified_name}{docstring.signature}\n"


def response_of(docstring: Docstring) -> str | None:
    """The beginning of the docstring, cut after a paragraph, a sentence or at worst a line.

    Returns:
      `SHORTEST_RESPONSE` to `LONGEST_RESPONSE` characters, or None if no cut gives that many.
    """
    text = docstring.text
    if len(text) > LONGEST_RESPONSE:
        window = text[: LONGEST_RESPONSE + 1]
        paragraphs = [match.start() for match in re.finditer(r"\n\n", window)]
        sentences = [match.end() for match in _SENTENCE_END.finditer(window)]
        lines = [match.start() for match in re.finditer(r"\n", window)]
        half = [cut for cut in paragraphs if cut >= LONGEST_RESPONSE // 2]
        long_enough = [cut for cut in sentences if cut >= SHORTEST_RESPONSE]
        cuts = half or long_enough or lines or [0]
        text = text[: cuts[-1]].rstrip()
    while (head := _SECTION_HEAD.search(text)) is not None:
        text = text[: head.start()].rstrip()
    return text if SHORTEST_RESPONSE <= len(text) <= LONGEST_RESPONSE else None


def pretraining_text(docstring: Docstring) -> tuple[str, str]:
    """Returns (prompt, beginning of the docstring): stage 1 learns to write what stage 2 judges.

    Where `response_of` gives nothing (a short text), the text as far as a response may reach.
    """
    text = response_of(docstring) or docstring.text[:LONGEST_RESPONSE]
    return prompt_of(docstring), text


def is_held_out(docstring: Docstring, percent: int = _HELD_OUT_PERCENT) -> bool:
    """Whether the object is kept for evaluation; a function of its qualified name alone."""
    digest = hashlib.sha256(docstring.qualified_name.encode()).digest()
    return int.from_bytes(digest[:8], "big") % 100 < percent


def split(docstrings: Iterable[Docstring]) -> tuple[list[Docstring], list[Docstring]]:
    """Returns (to train on, held out), each in the order given."""
    train: list[Docstring] = []
    held_out: list[Docstring] = []
    for docstring in docstrings:
        (held_out if is_held_out(docstring) else train).append(docstring)
    return train, held_out


def preference_pairs(
    docstrings: Sequence[Docstring],
    pool: Sequence[Docstring],
    *,
    seed: int,
    kinds: Sequence[str] = KINDS,
    per_docstring: int = 1,
) -> tuple[list[DocstringPair], dict[str, int]]:
    """Makes preference pairs of graded difficulty.

    Each docstring draws from its own generator, seeded with `seed` and its name, so a pair depends
    neither on the other docstrings nor on the order of either argument.

    Args:
      docstrings: the objects to ask about.
      pool: where foreign docstrings, sentences and parameter names come from; not text that is to
        stay unseen.
      seed: any integer.
      kinds: the kinds of damage wanted, of `KINDS`.
      per_docstring: how many pairs of different kinds to make of one docstring.

    Returns:
      The pairs in the order of `docstrings`, and {kind: how often it was wanted but impossible},
      with the docstrings that give no response under `length`.

    Raises:
      ValueError: a kind is unknown.
    """
    unknown = sorted(set(kinds) - set(KINDS))
    if unknown:
        raise ValueError(f"unknown kinds {unknown}; there are {', '.join(KINDS)}")
    material = _Pool(pool)
    damages: dict[str, Callable[[Docstring, str, random.Random], str | None]] = {
        "other": material.other,
        "displaced": _displaced,
        "names": material.names,
        "splice": material.splice,
        "swap": _swap,
    }
    pairs: list[DocstringPair] = []
    skipped: Counter[str] = Counter()
    for docstring in docstrings:
        chosen = response_of(docstring)
        if chosen is None:
            skipped["length"] += 1
            continue
        rng = random.Random(f"{seed}/{docstring.qualified_name}")
        made = 0
        for kind in rng.sample(list(kinds), len(kinds)):
            if made == per_docstring:
                break
            rejected = damages[kind](docstring, chosen, rng)
            if rejected is None or rejected == chosen:
                skipped[kind] += 1
                continue
            pair = DocstringPair(prompt_of(docstring), chosen, rejected, kind, docstring.package)
            pairs.append(pair)
            made += 1
    return pairs, dict(sorted(skipped.items()))


class _Foreign(NamedTuple):
    """A response or a sentence, and whose it is."""

    owner: str
    package: str
    text: str


class _Pool:
    """Foreign material by exact length, in an order that does not depend on how it came."""

    def __init__(self, docstrings: Iterable[Docstring]) -> None:
        self._responses: dict[int, list[_Foreign]] = defaultdict(list)
        # A summary stands in for a summary, a later sentence for a later one.
        self._sentences: dict[tuple[bool, int], list[_Foreign]] = defaultdict(list)
        used: Counter[str] = Counter()
        for docstring in sorted(docstrings, key=lambda d: (d.qualified_name, d.text)):
            text = response_of(docstring)
            if text is None:
                continue
            used.update(_named_parameters(docstring, text))
            whole = _Foreign(docstring.qualified_name, docstring.package, text)
            self._responses[len(text)].append(whole)
            for match in _SENTENCE.finditer(text):
                sentence = whole._replace(text=match.group())
                self._sentences[match.start() == 0, len(match.group())].append(sentence)
        self._names: dict[int, list[str]] = defaultdict(list)
        for name, count in sorted(used.items()):
            # As often as texts name it: a rare name would stand out without reading the prompt.
            self._names[len(name)] += [name] * count

    def other(self, docstring: Docstring, chosen: str, rng: random.Random) -> str | None:
        return _pick_unlike(chosen, docstring, self._responses[len(chosen)], rng)

    def splice(self, docstring: Docstring, chosen: str, rng: random.Random) -> str | None:
        places = list(_SENTENCE.finditer(chosen))
        for place in rng.sample(places, len(places)):
            candidates = self._sentences[place.start() == 0, len(place.group())]
            foreign = _pick_unlike(place.group(), docstring, candidates, rng)
            if foreign is not None:
                return chosen[: place.start()] + foreign + chosen[place.end() :]
        return None

    def names(self, docstring: Docstring, chosen: str, rng: random.Random) -> str | None:
        taken = {*_parameters(docstring.signature), *re.findall(r"\w+", chosen)}
        renamed: dict[str, str] = {}
        for name in sorted(_named_parameters(docstring, chosen)):
            free = [other for other in self._names[len(name)] if other not in taken]
            if free:
                renamed[name] = rng.choice(free)
                taken.add(renamed[name])
        if not renamed:
            return None
        pattern = re.compile(rf"\b(?:{'|'.join(map(re.escape, renamed))})\b")
        return pattern.sub(lambda match: renamed[match.group()], chosen)


def _swap(docstring: Docstring, chosen: str, rng: random.Random) -> str | None:
    places = []
    position = 0
    while (match := _NEIGHBOURS.search(chosen, position)) is not None:
        position = match.end(1)
        first, second = match.groups()
        if (first in _FUNCTION_WORDS) != (second in _FUNCTION_WORDS):
            places.append(match)
    if not places:
        return None
    place = rng.choice(places)
    first, second = place.groups()
    return f"{chosen[: place.start()]}{second} {first}{chosen[place.end() :]}"


def _displaced(docstring: Docstring, chosen: str, rng: random.Random) -> str | None:
    places = list(_WORD.finditer(chosen))
    count = len(chosen.split()) // 4
    if count < 3 or len(places) < count:
        return None
    moved = sorted(rng.sample(places, count), key=lambda match: match.start())
    words = [match.group() for match in moved]
    order = rng.sample(words, count)
    # At least two thirds of the picked words must have changed, or the damage is too light.
    if 3 * sum(old != new for old, new in zip(words, order, strict=True)) < 2 * count:
        return None
    pieces: list[str] = []
    position = 0
    for match, word in zip(moved, order, strict=True):
        pieces += [chosen[position : match.start()], word]
        position = match.end()
    return "".join([*pieces, chosen[position:]])


def _parameters(signature: str) -> list[str]:
    try:
        tree = ast.parse(f"def f{signature.replace(', ...)', ')')}: 0")
    except SyntaxError:
        return []
    return [node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)]


def _named_parameters(docstring: Docstring, text: str) -> set[str]:
    """Parameters that the text names; not single letters, which may be articles."""
    own = {name for name in _parameters(docstring.signature) if len(name) > 1}
    return own & set(re.findall(r"\w+", text))


def _pick_unlike(
    text: str, docstring: Docstring, candidates: Sequence[_Foreign], rng: random.Random
) -> str | None:
    """Draws a candidate that says something else, from the docstring's package if there is one."""
    shuffled = rng.sample(candidates, len(candidates))
    shuffled.sort(key=lambda candidate: candidate.package != docstring.package)
    for candidate in shuffled:
        if candidate.owner != docstring.qualified_name and _overlap(text, candidate.text) < 0.5:
            return candidate.text
    return None


def _overlap(first: str, second: str) -> float:
    """Share of the words of the shorter text, longer than three letters, that are in the other."""
    one, two = (set(re.findall(r"[a-z]{4,}", text.lower())) for text in (first, second))
    return len(one & two) / max(1, min(len(one), len(two)))
