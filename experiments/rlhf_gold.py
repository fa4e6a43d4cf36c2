"""Gold: rules that judge a written docstring by the object's own, which no reward has seen.

`Chrf` is chrF (Popovic 2015), an F-score over the characters' n-grams that two texts share. As its
recall counts most, longer texts get more of it, whatever they say; so it is also computed at equal
length. `parameters_named` is the share of a signature's parameters that a text mentions.
"""

from __future__ import annotations

import ast
import re
from collections import Counter

ORDERS = 6
BETA = 2.0


class Chrf:
    """chrF against one reference text.

    With n-grams of characters, blanks left out, n = 1 .. 6: P_n is the share of the text's n-grams
    that the reference has, R_n the share of the reference's that the text has, each n-gram counted
    as often as it is in both. P and R are their means over the n for which both texts have n-grams,
    and chrF = (1 + b^2) P R / (b^2 P + R) with b = 2: recall counts twice as much.
    """

    def __init__(self, reference: str) -> None:
        self._characters = _characters(reference)
        self._reference = _ngrams(self._characters)

    def __call__(self, text: str) -> float:
        """In [0, 1]; 0 where nothing is shared, or one of the texts is blank."""
        return _score(_ngrams(_characters(text)), self._reference)

    def at_equal_length(self, text: str) -> float:
        """The same after both texts are cut to the characters of the shorter one.

        The beginning of the longer text stays: that of a response that goes on for longer than the
        reference, and that of the reference where a response says less.
        """
        own = _characters(text)
        length = min(len(own), len(self._characters))
        return _score(_ngrams(own[:length]), _ngrams(self._characters[:length]))


def _score(text: list[Counter[str]], reference: list[Counter[str]]) -> float:
    precision = recall = 0.0
    orders = 0
    for own, wanted in zip(text, reference, strict=True):
        if not own or not wanted:
            continue
        shared = sum((own & wanted).values())
        precision += shared / own.total()
        recall += shared / wanted.total()
        orders += 1
    if not precision or not recall:
        return 0.0
    precision, recall = precision / orders, recall / orders
    return (1 + BETA**2) * precision * recall / (BETA**2 * precision + recall)


def _characters(text: str) -> str:
    return "".join(text.split())


def _ngrams(characters: str) -> list[Counter[str]]:
    return [
        Counter(characters[i : i + n] for i in range(len(characters) - n + 1))
        for n in range(1, ORDERS + 1)
    ]


def parameters(prompt: str) -> list[str]:
    """Names of the parameters in a prompt, `module.name(first, second=0)`; [] if there are none."""
    _, bracket, rest = prompt.strip().partition("(")
    # A signature that was cut ends in an ellipsis, which is no parameter.
    signature = (bracket + rest).replace(", ...)", ")")
    try:
        tree = ast.parse(f"def f{signature}: 0")
    except SyntaxError:
        return []
    return [node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)]


def parameters_named(prompt: str, text: str) -> float | None:
    """Share of the prompt's parameters that the text has as words; None where it has none."""
    names = set(parameters(prompt))
    return len(names & set(re.findall(r"\w+", text))) / len(names) if names else None
