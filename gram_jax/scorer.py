"""What is asked about a prompt's responses, and what a reward model answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gram_jax.data.sources import Prompt, Response


class Question(NamedTuple):
    """A prompt and n responses to it.

    Attributes:
      pairs: the comparisons wanted, as places (i, j) in ``responses``; read by a judge only.
    """

    prompt: Prompt
    responses: Sequence[Response]
    pairs: Sequence[tuple[int, int]] = ()


class Verdict(NamedTuple):
    """The answer to a `Question`.

    Attributes:
      rewards: [n], the log-probs or the head's numbers; None of a judge.
      num_tokens: int [n], of each response, its end token included.
      forward: [pairs], z_A - z_B with i shown first; None unless of a judge.
      backward: [pairs], the same with j shown first.
      truncated: something was cut to fit.
    """

    rewards: NDArray[np.float64] | None
    num_tokens: NDArray[np.int64]
    forward: NDArray[np.float64] | None
    backward: NDArray[np.float64] | None
    truncated: bool
