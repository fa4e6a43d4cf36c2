"""Packing: which examples share a row, so that little is padding and little is computed twice.

Where a piece of an example (gram_jax.cutting) is cut in two so that it fills a row, tokens are
repeated. So cuts have a price: a repeated token costs a share of what an empty place costs. The
fewest rows come of a high price, the least padding of a low one. Where a high one leaves more than
1 % of padding, the rows that are not full are taken apart and filled again at lower ones, in search
of the highest that leaves no more.

One piece opens a row, and a subset sum over the sizes of all others fills it. Where that leaves
something empty, it is seen which cut would leave least, its price included: of a piece that is in
no row yet, or of the one that opened the row, so that something else fits beside it.
Rows are opened by the longest pieces first, but by those of one unit over half a row before all
others: they cannot be cut themselves, so they get the first choice of what fills their rows.
"""

from __future__ import annotations

import bisect
import dataclasses
import heapq
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from gram_jax.cutting import Piece, Share, cut
from gram_jax.rows import Example, PackedRow, RowShape, build_row
from gram_jax.subset_sum import closest, largest, sums

_PADDING = 0.01
"""Share of all places that may be padding; or one row, as the last one is seldom full."""

_PRICES = tuple(0.7 * 0.92**step for step in range(14))
"""Of a repeated token, where an empty place costs 1. Above the first, rows are not fewer; below the
last, they are not fuller."""

_ROUNDS = 3
"""How often rows are taken apart at one price; more often helps no more."""


@dataclasses.dataclass(slots=True)
class PackCounts:
    """What packing did. ``padding`` is a share of all places."""

    examples: int = 0
    spilled: int = 0  # examples that went on in another row, their prefix repeated
    repeated_tokens: int = 0  # prefix and response tokens computed more than once for it
    rows: int = 0
    tokens: int = 0
    places: int = 0
    sequences: int = 0
    pairs: int = 0

    def add(self, other: PackCounts) -> None:
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))

    @property
    def padding(self) -> float:
        return 1 - self.tokens / self.places if self.places else 0.0


class _Row:
    """A row being filled; what is added must fit."""

    def __init__(self, shape: RowShape):
        self.shape = shape
        self.pieces: dict[int, Piece] = {}  # by number of the example
        self.tokens = self.targets = self.sequences = self.pairs = 0

    def room(self) -> int:
        """Any piece of so many tokens fits, as far as tokens and targets are concerned."""
        return min(self.shape.tokens - self.tokens, self.shape.branch_room - self.targets)

    def takes(self, sequences: int, pairs: int) -> bool:
        limit = self.shape.sequences
        return (
            limit == 0 or self.sequences + sequences <= limit
        ) and self.pairs + pairs <= self.shape.pairs

    def add(self, piece: Piece) -> None:
        """Adds a piece; with another one of the same example it shares prefix and responses."""
        old = self.pieces.pop(piece.number, None)
        if old is not None:
            self._count(old, -1)
            piece = piece.of([*old.units, *piece.units])
        self.pieces[piece.number] = piece
        self._count(piece, 1)

    def replace(self, piece: Piece) -> None:
        """Puts a piece in the place of another one of the same example."""
        self._count(self.pieces[piece.number], -1)
        self.pieces[piece.number] = piece
        self._count(piece, 1)

    def _count(self, piece: Piece, sign: int) -> None:
        self.tokens += sign * piece.tokens
        self.targets += sign * piece.targets
        self.sequences += sign * len(piece.responses)
        self.pairs += sign * piece.pairs


def pack(
    examples: Iterable[Example], shape: RowShape, *, counts: PackCounts | None = None
) -> Iterator[PackedRow]:
    """Packs all of the examples into rows; the more there are at once, the fuller the rows.

    The rows depend on the examples and their order, and on nothing else. They come in an order of
    their own. ``counts``, if given, is complete when the first row is there.

    Raises:
      DoesNotFit: see `gram_jax.cutting.split_example`.
    """
    pieces: list[Piece] = []
    own = number = 0
    for number, example in enumerate(examples, start=1):
        own += example.num_tokens(shape)
        pieces.extend(cut(number, example, shape))
    rows = _fill_rows(pieces, shape)
    if counts is not None:
        _count(rows, number, own, counts)
    for row in rows:
        yield build_row([piece.part() for piece in row.pieces.values()], shape)


def _count(rows: Sequence[_Row], examples: int, own: int, counts: PackCounts) -> None:
    """Adds up the rows; uncut, the examples would have taken ``own`` tokens."""
    rows_of = [0] * (examples + 1)
    for row in rows:
        counts.repeated_tokens += row.tokens
        counts.tokens += row.tokens
        counts.sequences += row.sequences
        counts.pairs += row.pairs
        counts.places += row.shape.tokens
        for number in row.pieces:
            rows_of[number] += 1
    counts.repeated_tokens -= own
    counts.examples += examples
    counts.spilled += sum(n > 1 for n in rows_of)
    counts.rows += len(rows)


class _Found(NamedTuple):
    """A share of a piece in the pool; they sort by what it repeats, then by age."""

    repeats: int
    serial: int
    piece: Piece
    share: Share


class _Pool:
    """The pieces that are in no row yet, by size, and the shares to be cut off from them."""

    def __init__(self, pieces: Iterable[Piece], shape: RowShape):
        self.sizes: list[int] = []  # ascending
        self.counted: dict[int, int] = {}  # pieces of a size
        self.tokens = 0
        self._half = shape.tokens // 2
        self._here: set[Piece] = set()
        # Pieces that are gone stay in these until they turn up. Heaps: the serial breaks ties.
        self._pieces: dict[int, list[Piece]] = {}  # by size
        self._rigid: list[tuple[int, int, Piece]] = []  # of one unit, over half a row; by -size
        self._shares: dict[int, list[_Found]] = {}  # by size
        self._serial = 0
        for piece in pieces:
            self.add(piece)

    def add(self, piece: Piece) -> None:
        size = piece.tokens
        if size not in self.counted:
            self.counted[size] = 0
            bisect.insort(self.sizes, size)
        self.counted[size] += 1
        self.tokens += size
        self._here.add(piece)
        self._pieces.setdefault(size, []).append(piece)
        self._serial += 1
        if len(piece.units) == 1 and size > self._half:
            heapq.heappush(self._rigid, (-size, self._serial, piece))
        for share in piece.shares():
            self._serial += 1
            found = _Found(share.repeats, self._serial, piece, share)
            heapq.heappush(self._shares.setdefault(share.tokens, []), found)

    def remove(self, piece: Piece) -> None:
        size = piece.tokens
        self._here.remove(piece)
        self.tokens -= size
        self.counted[size] -= 1
        if not self.counted[size]:
            del self.counted[size], self.sizes[bisect.bisect_left(self.sizes, size)]

    def take_first(self) -> Piece:
        """The piece that is hardest to place."""
        while self._rigid:
            _, _, piece = heapq.heappop(self._rigid)
            if piece in self._here:
                self.remove(piece)
                return piece
        piece = self._last(self.sizes[-1])
        self.remove(piece)
        return piece

    def _last(self, size: int) -> Piece:
        pieces = self._pieces[size]
        while pieces[-1] not in self._here:
            pieces.pop()
        return pieces[-1]

    def move(self, size: int, row: _Row) -> bool:
        """Moves a piece of this size to the row, unless it has too many sequences or pairs."""
        piece = self._last(size)
        if not row.takes(len(piece.responses), piece.pairs):
            return False
        self.remove(piece)
        row.add(piece)
        return True

    def shares(self, room: int) -> Iterator[_Found]:
        """Of each size up to ``room`` the share that repeats least."""
        for size in [size for size in self._shares if size <= room]:
            heap = self._shares[size]
            while heap and heap[0].piece not in self._here:
                heapq.heappop(heap)
            if heap:
                yield heap[0]
            else:
                del self._shares[size]


def _fill_rows(pieces: Sequence[Piece], shape: RowShape) -> list[_Row]:
    """Puts every piece, or what it is cut into, in a row; at most 1 % of the places stay empty.

    Where no price leaves so few, it is the lowest or the highest, whichever leaves fewer.
    """
    first = _fill_at(_PRICES[0], pieces, shape)
    if _is_full(first):
        return first
    best = min(first, _refill(first, _PRICES[-1], shape), key=_empty)
    if not _is_full(best):
        return best
    too_high, low = 0, len(_PRICES) - 1
    while low - too_high > 1:
        middle = (too_high + low) // 2
        rows = _refill(first, _PRICES[middle], shape)
        if _is_full(rows):
            low, best = middle, min(rows, best, key=len)
        else:
            too_high = middle
    return best


def _refill(rows: list[_Row], price: float, shape: RowShape) -> list[_Row]:
    """Takes apart the rows that are not full, and fills them again at another price."""
    for _ in range(_ROUNDS):
        full = [row for row in rows if _is_full([row], 0)]
        left = [row for row in rows if not _is_full([row], 0)]
        pieces = [piece for row in left for piece in row.pieces.values()]
        rows = full + _fill_at(price, pieces, shape)
        if _is_full(rows):
            break
    return rows


def _is_full(rows: Sequence[_Row], spare_rows: int = 1) -> bool:
    """Whether little enough is empty; ``spare_rows`` are as good as empty whatever is done."""
    tokens = rows[0].shape.tokens if rows else 0
    return _empty(rows) <= max(_PADDING * len(rows), spare_rows) * tokens


def _empty(rows: Sequence[_Row]) -> int:
    """Places in rows that could hold a token and hold none."""
    return sum(row.room() for row in rows)


def _fill_at(price: float, pieces: Iterable[Piece], shape: RowShape) -> list[_Row]:
    pool = _Pool(pieces, shape)
    rows = []
    while pool.sizes:
        first = pool.take_first()
        row = _Row(shape)
        row.add(first)
        _fill(row, first, pool, price)
        if pool.tokens > shape.tokens and (halves := _halves_of_lonely(row, first, price)):
            for piece in halves:
                pool.add(piece)
            continue
        rows.append(row)
    return rows


def _halves_of_lonely(row: _Row, first: Piece, price: float) -> tuple[Piece, Piece] | None:
    """The piece that is alone in a row cut in two, if that costs less than what is empty there.

    It fills no row now, but leaves smaller pieces, of which rows are filled later.
    """
    if list(row.pieces.values()) != [first] or len(first.units) == 1:
        return None
    cheapest = min(first.shares(), key=lambda share: share.repeats)
    away, kept = first.without(cheapest.units)
    # Where a row has no place for more sequences or pairs, smaller pieces would not fill it either.
    if price * cheapest.repeats >= row.room() or not row.takes(len(away.responses), away.pairs):
        return None
    return away, kept


def _fill(row: _Row, first: Piece, pool: _Pool, price: float) -> None:
    """Adds to a row that ``first`` has opened until nothing more fits."""
    while (room := row.room()) > 0:
        sizes = closest(pool.sizes, pool.counted, room)
        empty = room - sum(sizes)
        # If the rest fits in one more row, that row is there however full this one gets.
        if empty and pool.tokens > row.shape.tokens:
            alone = list(row.pieces.values()) == [first]
            if _cut(row, first.shares() if alone else [], pool, empty, price):
                continue
        moved = [pool.move(size, row) for size in sizes]
        if not any(moved):
            return


def _cut(row: _Row, own: Sequence[Share], pool: _Pool, empty: int, price: float) -> bool:
    """Makes the cut that costs least, if that is less than the ``empty`` places without any.

    Either one of the ``own`` shares of the piece that is alone in the row leaves it, to make room
    for what fills it better; or a share of another piece comes into the row.
    """
    room = row.room()
    most = room + max((share.tokens - share.repeats for share in own), default=0)
    found = sums(pool.sizes, pool.counted, most)
    least: float = empty
    leaves: Share | None = None
    comes: _Found | None = None
    for share in own:
        paid = price * share.repeats
        if paid < least:
            wider = room + share.tokens - share.repeats
            if (cost := wider - largest(found, wider) + paid) < least:
                least, leaves = cost, share
    for other in pool.shares(room):
        paid = price * other.repeats
        if paid < least:
            rest = room - other.share.tokens
            if (cost := rest - largest(found, rest) + paid) < least:
                least, comes = cost, other
    if comes is not None:
        alone, others = comes.piece.without(comes.share.units)
        if row.takes(len(alone.responses), alone.pairs):
            pool.remove(comes.piece)
            pool.add(others)
            row.add(alone)
            return True
    if leaves is None:
        return False
    (first,) = row.pieces.values()
    away, kept = first.without(leaves.units)
    row.replace(kept)
    pool.add(away)
    return True
