"""How many operations a second the machine does at most: the yardstick of every speed.

A product of two float32 matrices of [2048, 2048], which is 2 x 2048^3 operations, three after
another, by the same library that computes the model. The median of several.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

SIZE, PRODUCTS, REPETITIONS = 2048, 3, 5


def measure(products: Callable[[], Any]) -> float:
    """FLOP/s of ``products``, which makes PRODUCTS of them and waits for the last."""
    products()
    seconds = []
    for _ in range(REPETITIONS):
        began = time.perf_counter()
        products()
        seconds.append(time.perf_counter() - began)
    return 2 * SIZE**3 * PRODUCTS / statistics.median(seconds)
