"""Packing: which examples share a row, and where an example too large for one row is cut.

Two things are computed in vain: padding, and tokens that stand in several rows because their
example was cut (the prompt, and responses with pairs on both sides of the cut). Two steps keep both
low. What must stay together is a unit: a pair, or a response that is in no pair.

Cutting. An example too large for a row is a graph of responses and the pairs that join them. A
row's worth of it is grown from its longest pair, one response after the other, by a narrow beam
search for the responses whose pairs are worth most; then the next row's worth, until the rest fits.
A pair is worth the tokens that it must pay for: a share of each of its responses, which a response
divides among its pairs that are still to be placed.

Filling. One piece opens a row, and a subset sum over the sizes of all others fills it. Where no sum
comes near, a unit of the right size is split off from the piece that loses least by it. Of the
pieces longest first, but those of one unit over half a row before all others: they cannot be cut
themselves, so they get the first choice of what fills their rows.
"""

from __future__ import annotations

import bisect
import dataclasses
import heapq
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from gram_jax.pair import Pair
from gram_jax.rows import Example, PackedRow, Part, RowShape, build_row

_SLACK = 0.01
"""Share of a row that may stay empty where filling it means cutting an example."""

_SPARE = 0.009
"""Share of all rows. When so much is empty, pieces beside which nothing fits are cut, whatever that
repeats: padding is to stay within 1 %, and the last row is seldom full."""

_SIZES = 256
"""Sizes a subset sum chooses from: pairs of them have far more sums than a row has places."""

_BEAM, _BRANCHES = 4, 3  # wider beams find rows that are 0.1 % better

_POWERS = (1.0, 0.5)
"""How a response with n pairs is shared among them: each gets 1 / n^power of it. Which is better
differs from example to example; trying both saves up to 1 % of the rows."""


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


class DoesNotFit(ValueError):
    """A response, or a pair of responses, is too long for a row of this shape."""


class _Unit(NamedTuple):
    """What must stay together: a pair, or a response that is in none or compared with nothing."""

    members: tuple[int, ...]
    pair: Pair | None


class _Piece:
    """Some units of an example. It is never changed, only replaced; ``number`` is the example's."""

    __slots__ = (
        "example", "gone", "number", "pairs", "responses", "shape", "targets", "tokens", "units",
    )  # fmt: skip

    def __init__(self, number: int, example: Example, units: Sequence[_Unit], shape: RowShape):
        self.number = number
        self.example = example
        self.units = units
        self.shape = shape
        self.responses = sorted({i for unit in units for i in unit.members})
        self.pairs = sum(unit.pair is not None for unit in units)
        self.targets = sum(shape.places(example.responses[i]) for i in self.responses)
        self.tokens = len(example.prompt) - 1 + self.targets
        self.gone = False  # from the pool: in a row, or replaced by smaller pieces

    def fits(self, shape: RowShape) -> bool:
        return (
            self.tokens <= shape.tokens
            and self.targets <= shape.branch_room
            and (shape.sequences == 0 or len(self.responses) <= shape.sequences)
            and self.pairs <= shape.pairs
        )

    def without(self, unit: _Unit) -> tuple[_Piece, _Piece]:
        """A piece of this unit, and one of all others."""
        rest = [other for other in self.units if other is not unit]
        return self.of((unit,)), self.of(rest)

    def of(self, units: Sequence[_Unit]) -> _Piece:
        """A piece of these units of the same example."""
        return _Piece(self.number, self.example, units, self.shape)

    def part(self) -> Part:
        pairs = tuple(unit.pair for unit in self.units if unit.pair is not None)
        return Part(self.example, tuple(self.responses), pairs, self.tokens, self.targets)


class _Row:
    """A row being filled; what is added must fit."""

    def __init__(self, shape: RowShape):
        self.shape = shape
        self.pieces: dict[int, _Piece] = {}  # by number of the example
        self.tokens = self.targets = self.sequences = self.pairs = 0

    def room(self) -> int:
        """Any piece of so many tokens fits, as far as tokens and targets are concerned."""
        return min(self.shape.tokens - self.tokens, self.shape.branch_room - self.targets)

    def takes(self, sequences: int, pairs: int) -> bool:
        limit = self.shape.sequences
        return (
            limit == 0 or self.sequences + sequences <= limit
        ) and self.pairs + pairs <= self.shape.pairs

    def add(self, piece: _Piece) -> None:
        """Adds a piece; with another one of the same example it shares prefix and responses."""
        old = self.pieces.pop(piece.number, None)
        if old is not None:
            self._count(old, -1)
            piece = piece.of([*old.units, *piece.units])
        self.pieces[piece.number] = piece
        self._count(piece, 1)

    def _count(self, piece: _Piece, sign: int) -> None:
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
      DoesNotFit: see :func:`split_example`.
    """
    pieces: list[_Piece] = []
    own = number = 0
    for number, example in enumerate(examples, start=1):
        own += example.num_tokens(shape)
        pieces.extend(_cut(number, example, shape))
    rows = _fill_rows(pieces, shape)
    if counts is not None:
        _count(rows, number, own, counts)
    for row in rows:
        yield build_row([piece.part() for piece in row.pieces.values()], shape)


def split_example(example: Example, shape: RowShape) -> list[Part]:
    """Cuts an example into parts that each fit one row; both ends of a pair stay together.

    Raises:
      DoesNotFit: one response with its prompt (or one pair) is over the shape's caps.
    """
    return [piece.part() for piece in _cut(0, example, shape)]


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


# Cutting.


def _cut(number: int, example: Example, shape: RowShape) -> list[_Piece]:
    """Pieces that each fit a row: few tokens in all, and all but the last as large as they get."""
    paired = {i for pair in example.pairs for i in pair.members()}
    units = [_Unit(pair.members(), pair) for pair in example.pairs]
    units += [_Unit((i,), None) for i in range(len(example.responses)) if i not in paired]
    whole = _Piece(number, example, units, shape)
    if whole.fits(shape):
        return [whole]
    for unit in units:
        alone = whole.of((unit,))
        if not alone.fits(shape):
            lengths = [len(example.responses[i]) for i in alone.responses]
            raise DoesNotFit(
                f"{alone.tokens} tokens (prompt {len(example.prompt)}, responses {lengths})"
                f" do not fit a row of {shape}"
            )
    cuts = [_cut_by(power, whole, shape) for power in (_POWERS if paired else _POWERS[:1])]
    return min(cuts, key=lambda pieces: sum(piece.tokens for piece in pieces))


def _cut_by(power: float, rest: _Piece, shape: RowShape) -> list[_Piece]:
    graph = _Graph(rest, shape, power)
    pieces = []
    while not rest.fits(shape):
        taken = graph.take(rest.units)
        units = [unit for i, unit in enumerate(rest.units) if i in taken]
        pieces.append(rest.of(units))
        units = [unit for i, unit in enumerate(rest.units) if i not in taken]
        rest = rest.of(units)
    return [*pieces, rest]


class _State(NamedTuple):
    """Responses of a row being grown, and what each next response would add to ``value``."""

    chosen: frozenset[int]
    targets: int
    pairs: int
    value: float
    gains: dict[int, float]


class _Graph:
    """The responses of an example and the pairs among them that are still to be placed."""

    def __init__(self, whole: _Piece, shape: RowShape, power: float):
        self._lengths = [shape.places(response) for response in whole.example.responses]
        self._room = min(shape.tokens - len(whole.example.prompt) + 1, shape.branch_room)
        self._max_sequences = shape.sequences or len(self._lengths)
        self._max_pairs = shape.pairs
        self._power = power
        self._near: list[dict[int, int]] = [{} for _ in self._lengths]  # how many pairs with whom
        for unit in whole.units:
            if len(unit.members) == 2:
                a, b = unit.members
                self._near[a][b] = self._near[b][a] = self._near[a].get(b, 0) + 1

    def take(self, units: Sequence[_Unit]) -> set[int]:
        """Which of the units make one row, by their places; their pairs leave the graph."""
        chosen = self._grow([unit.members for unit in units if len(unit.members) == 2])
        taken: set[int] = set()
        singles: dict[int, list[int]] = {}
        for i, unit in enumerate(units):
            if len(unit.members) == 1:
                singles.setdefault(self._lengths[unit.members[0]], []).append(i)
            elif len(taken) < self._max_pairs and chosen.issuperset(unit.members):
                taken.add(i)
                a, b = unit.members
                self._near[a][b] = self._near[b][a] = self._near[a][b] - 1
                if not self._near[a][b]:
                    del self._near[a][b], self._near[b][a]
        # What is in no pair with another is worth its length: the best fill what is left.
        counted = {size: len(places) for size, places in singles.items()}
        room = self._room - sum(self._lengths[i] for i in chosen)
        sizes = closest(sorted(counted), counted, room)
        most = self._max_sequences - len(chosen)
        if self._max_pairs and any(unit.pair is not None for unit in units):
            most = min(most, self._max_pairs - len(taken))
        taken.update(singles[size].pop() for size in sizes[:most])
        return taken

    def _grow(self, pairs: list[tuple[int, ...]]) -> frozenset[int]:
        """The responses whose pairs are worth most, of those that fit one row."""
        if not pairs:
            return frozenset()
        lengths = self._lengths
        shares = [
            length / max(len(near), 1) ** self._power
            for length, near in zip(lengths, self._near, strict=True)
        ]
        a, b = max(pairs, key=lambda pair: lengths[pair[0]] + lengths[pair[1]])
        best = self._with(self._with(_State(frozenset(), 0, 0, 0.0, {}), a, shares), b, shares)
        beam = [best]
        while beam:
            grown: dict[frozenset[int], _State] = {}
            for state in beam:
                room = self._room - state.targets if len(state.chosen) < self._max_sequences else 0
                fit = [(g / lengths[v], v) for v, g in state.gains.items() if lengths[v] <= room]
                for _, v in sorted(fit, reverse=True)[:_BRANCHES]:
                    if (chosen := state.chosen | {v}) not in grown:
                        grown[chosen] = self._with(state, v, shares)
            states = [state for state in grown.values() if state.pairs <= self._max_pairs]
            beam = sorted(states, key=lambda state: -state.value / state.targets)[:_BEAM]
            best = max(best, *beam, key=lambda state: state.value) if beam else best
        return best.chosen

    def _with(self, state: _State, v: int, shares: list[float]) -> _State:
        """The state with response v, and with all pairs between v and what was there."""
        gains = dict(state.gains)
        value = state.value + gains.pop(v, 0.0)
        pairs = state.pairs
        for u, times in self._near[v].items():
            if u in state.chosen:
                pairs += times
            else:
                gains[u] = gains.get(u, 0.0) + shares[u] + shares[v]
        return _State(state.chosen | {v}, state.targets + self._lengths[v], pairs, value, gains)


# Filling.


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


class _Pool:
    """The pieces that are in no row yet, by size, and the units to be split off from them."""

    def __init__(self, pieces: Sequence[_Piece], shape: RowShape):
        self.sizes: list[int] = []  # ascending
        self.counted: dict[int, int] = {}  # pieces of a size
        self.tokens = 0
        self._half = shape.tokens // 2
        # Pieces that are gone stay in these until they turn up. Heaps: the serial breaks ties.
        self._pieces: dict[int, list[_Piece]] = {}  # by size
        self._rigid: list[tuple[int, int, _Piece]] = []  # of one unit, over half a row; by -size
        self._splits: dict[int, list[tuple[int, int, _Piece, _Unit]]] = {}  # by size, then loss
        self._serial = 0
        for piece in pieces:
            self.add(piece)

    def add(self, piece: _Piece) -> None:
        size = piece.tokens
        if size not in self.counted:
            self.counted[size] = 0
            bisect.insort(self.sizes, size)
        self.counted[size] += 1
        self.tokens += size
        self._pieces.setdefault(size, []).append(piece)
        self._serial += 1
        if len(piece.units) > 1:
            for unit, tokens, loss in _losses(piece):
                self._serial += 1
                heap = self._splits.setdefault(tokens, [])
                heapq.heappush(heap, (loss, self._serial, piece, unit))
        elif size > self._half:
            heapq.heappush(self._rigid, (-size, self._serial, piece))

    def _remove(self, piece: _Piece) -> None:
        piece.gone = True
        size = piece.tokens
        self.tokens -= size
        self.counted[size] -= 1
        if not self.counted[size]:
            del self.counted[size], self.sizes[bisect.bisect_left(self.sizes, size)]

    def take_first(self) -> _Piece:
        """The piece that is hardest to place."""
        while self._rigid:
            _, _, piece = heapq.heappop(self._rigid)
            if not piece.gone:
                self._remove(piece)
                return piece
        piece = self._last(self.sizes[-1])
        self._remove(piece)
        return piece

    def _last(self, size: int) -> _Piece:
        pieces = self._pieces[size]
        while pieces[-1].gone:
            pieces.pop()
        return pieces[-1]

    def move(self, size: int, row: _Row) -> bool:
        """Moves a piece of this size to the row, unless it has too many sequences or pairs."""
        piece = self._last(size)
        if not row.takes(len(piece.responses), piece.pairs):
            return False
        self._remove(piece)
        row.add(piece)
        return True

    def split_into(self, row: _Row, most: int, enough: int, least: int) -> bool:
        """Splits a unit off into the row, if there is one of ``least`` to ``most`` tokens.

        Of units of ``enough`` tokens it takes the one that loses least; else the longest, if what
        it adds makes up for what it loses.
        """
        best: tuple[int, int, _Piece, _Unit] | None = None
        for size in range(most, least - 1, -1):
            if size < enough and best is not None:
                break
            heap = self._splits.get(size, [])
            while heap and heap[0][2].gone:
                heapq.heappop(heap)
            if not heap or (best is not None and heap[0][0] >= best[0]):
                continue
            if size >= enough or size - heap[0][0] >= least:
                best = heap[0]
        if best is None:
            return False
        _, _, piece, unit = best
        if not row.takes(len(unit.members), unit.pair is not None):
            return False
        self._remove(piece)
        alone, rest = piece.without(unit)
        self.add(rest)
        row.add(alone)
        return True


def _losses(piece: _Piece) -> Iterator[tuple[_Unit, int, int]]:
    """For each unit its tokens when it stands alone, and how many of them the rest repeats."""
    prefix = len(piece.example.prompt) - 1
    lengths = {i: piece.shape.places(piece.example.responses[i]) for i in piece.responses}
    uses = dict.fromkeys(piece.responses, 0)
    for unit in piece.units:
        for i in unit.members:
            uses[i] += 1
    for unit in piece.units:
        loss = prefix + sum(lengths[i] for i in unit.members if uses[i] > 1)
        yield unit, prefix + sum(lengths[i] for i in unit.members), loss


def _fill_rows(pieces: Sequence[_Piece], shape: RowShape) -> list[_Row]:
    """Puts every piece, or the units that it is cut into, in a row."""
    pool = _Pool(pieces, shape)
    slack = int(_SLACK * shape.tokens)
    # Places that may still be left empty; the last row may be as good as empty.
    spare = _SPARE * pool.tokens - shape.tokens
    rows = []
    while pool.sizes:
        row = _Row(shape)
        first = pool.take_first()
        row.add(first)
        _fill(row, pool, slack)
        empty = shape.tokens - row.tokens
        halves = None
        if spare < 0 and empty > slack and pool.tokens > shape.tokens:
            halves = _halves_of_lonely(first, row)
        if halves is not None:
            for piece in halves:
                pool.add(piece)
            continue
        spare -= empty
        rows.append(row)
    return rows


def _halves_of_lonely(first: _Piece, row: _Row) -> tuple[_Piece, _Piece] | None:
    """A piece cut in two at the least loss, if it is alone in the row for its length only."""
    if list(row.pieces.values()) != [first] or len(first.units) == 1:
        return None
    unit, _, _ = min(_losses(first), key=lambda found: found[2])
    if not row.takes(len(unit.members), unit.pair is not None):
        return None
    return first.without(unit)


def _fill(row: _Row, pool: _Pool, slack: int) -> None:
    """Adds to a row until nothing more fits."""
    while (room := row.room()) > 0:
        sizes = closest(pool.sizes, pool.counted, room)
        filled = sum(sizes)
        # If the rest fits in one more row, that row is there however full this one gets.
        worth_it = room - filled > slack and pool.tokens > row.shape.tokens
        if worth_it and pool.split_into(row, room, room - slack, filled + 1):
            continue
        moved = [pool.move(size, row) for size in sizes]
        if not any(moved):
            return
