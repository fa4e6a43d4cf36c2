"""Subset sums: which of many sizes together come nearest to a given size from below."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

_SIZES = 256
"""Sizes a subset sum chooses from: pairs of them have far more sums than a row has places."""


def closest(sizes: Sequence[int], counted: dict[int, int], room: int) -> list[int]:
    """Sizes, largest first, whose sum is the largest that is at most ``room``.

    ``sizes`` ascend, and size s may be taken ``counted[s]`` times. The sums found so far are the
    bits of one int, so that taking s shifts it by s. Of very many sizes an even selection is used.
    """
    usable = bisect.bisect_right(sizes, room)
    mask = (1 << (room + 1)) - 1
    sums = 1
    steps: list[tuple[int, int]] = []  # a size, and the sums before it was taken
    for i in range(usable - 1, -1, -(usable // _SIZES + 1)):
        size = sizes[i]
        for _ in range(min(counted[size], room // size)):
            more = (sums | sums << size) & mask
            if more == sums:
                break
            steps.append((size, sums))
            sums = more
        if sums >> room:
            break
    target = sums.bit_length() - 1
    taken = []
    for size, before in reversed(steps):
        if not before >> target & 1:
            taken.append(size)
            target -= size
    return sorted(taken, reverse=True)


def sums(sizes: Sequence[int], counted: dict[int, int], room: int) -> int:
    """All sums up to ``room`` of the same sizes: bit n of the result is 1 where n is one."""
    usable = bisect.bisect_right(sizes, room)
    mask = (1 << (room + 1)) - 1
    found = 1
    for i in range(usable - 1, -1, -(usable // _SIZES + 1)):
        size = sizes[i]
        for _ in range(min(counted[size], room // size)):
            more = (found | found << size) & mask
            if more == found:
                break
            found = more
    return found


def largest(found: int, room: int) -> int:
    """The largest of the sums that is at most ``room``."""
    return (found & ((2 << room) - 1)).bit_length() - 1
