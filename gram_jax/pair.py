"""A comparison of two responses: what preference data says, and what a ranking loss is about."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True)
class Pair:
    """A comparison of responses ``a`` and ``b`` (their places in an example's ``responses``).

    ``target`` is the probability that a is better, ``weight`` scales its loss, ``margin``, in
    log-odds, is subtracted from beta times the difference of the scores. Without ``b``, a's score
    is compared with 0: the score of a judge prompt is itself a difference.
    """

    a: int
    b: int | None
    target: float = 1.0
    weight: float = 1.0
    margin: float = 0.0

    def members(self) -> tuple[int, ...]:
        """The responses that must lie in one row for it."""
        return (self.a,) if self.b is None else (self.a, self.b)
