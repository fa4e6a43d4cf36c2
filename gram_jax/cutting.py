"""Cutting: how an example that is too large for one row is divided among several.

What must stay together is a unit: a pair, or a response that is in no pair. Cut in two, an example
repeats its prompt, and each response with pairs on both sides of the cut; that is what cuts cost.

An example too large for a row is a graph of responses and the pairs that join them. A row's worth
of it is grown from its longest pair, one response after the other, by a narrow beam search for the
responses whose pairs are worth most; then the next row's worth, until the rest fits. A pair is
worth the tokens that it must pay for: a share of each of its responses, which a response divides
among its pairs that are still to be placed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from gram_jax.pair import Pair
from gram_jax.rows import Example, Part, RowShape
from gram_jax.subset_sum import closest

_BEAM, _BRANCHES = 4, 3  # wider beams find rows that are 0.1 % better

_POWERS = (1.0, 0.5)
"""How a response with n pairs is shared among them: each gets 1 / n^power of it. Which is better
differs from example to example; trying both saves up to 1 % of the rows."""

_RUN = 6
"""Units that may be cut off a piece in one; with more, rows come out no better."""


class DoesNotFit(ValueError):
    """A response, or a pair of responses, is too long for a row of this shape."""


class Unit(NamedTuple):
    """What must stay together: a pair, or a response that is in none or compared with nothing."""

    members: tuple[int, ...]
    pair: Pair | None


class Share(NamedTuple):
    """Units that may be cut off a piece; the rest then repeats ``repeats`` of their tokens."""

    units: tuple[Unit, ...]
    tokens: int
    repeats: int


class Piece:
    """Some units of an example. It is never changed, only replaced; ``number`` is the example's."""

    __slots__ = (
        "_shares", "example", "number", "pairs", "responses", "shape", "targets", "tokens", "units",
    )  # fmt: skip

    def __init__(self, number: int, example: Example, units: Sequence[Unit], shape: RowShape):
        self.number = number
        self.example = example
        self.units = units
        self.shape = shape
        self.responses = sorted({i for unit in units for i in unit.members})
        self.pairs = sum(unit.pair is not None for unit in units)
        self.targets = sum(shape.places(example.responses[i]) for i in self.responses)
        self.tokens = len(example.prompt) - 1 + self.targets
        self._shares: list[Share] | None = None

    def fits(self, shape: RowShape) -> bool:
        return (
            self.tokens <= shape.tokens
            and self.targets <= shape.branch_room
            and (shape.sequences == 0 or len(self.responses) <= shape.sequences)
            and self.pairs <= shape.pairs
        )

    def without(self, units: Sequence[Unit]) -> tuple[Piece, Piece]:
        """A piece of these units, and one of all others."""
        away = set(map(id, units))
        return self.of(units), self.of([unit for unit in self.units if id(unit) not in away])

    def of(self, units: Sequence[Unit]) -> Piece:
        """A piece of these units of the same example."""
        return Piece(self.number, self.example, units, self.shape)

    def shares(self) -> list[Share]:
        """What may be cut off: each unit, and a few together that repeat little; not all of it."""
        if self._shares is None:
            self._shares = list(self._find_shares()) if len(self.units) > 1 else []
        return self._shares

    def _find_shares(self) -> Iterator[Share]:
        prefix = self.tokens - self.targets
        places = {i: self.shape.places(self.example.responses[i]) for i in self.responses}
        left = dict.fromkeys(self.responses, 0)  # units of the rest that a response is in
        for unit in self.units:
            for i in unit.members:
                left[i] += 1
        for unit in self.units:
            shared = sum(places[i] for i in unit.members if left[i] > 1)
            yield Share((unit,), prefix + sum(places[i] for i in unit.members), prefix + shared)
        inside: set[int] = set()
        run: list[Unit] = []
        rest = list(self.units)
        tokens = repeats = prefix

        def added(unit: Unit) -> tuple[int, int]:
            """Repeated tokens, and tokens, that the run has more of with this unit."""
            shared = sum(places[i] for i in unit.members if left[i] > 1)
            known = sum(places[i] for i in unit.members if i in inside)
            return shared - known, sum(places[i] for i in unit.members) - known

        while len(rest) > 1 and len(run) < _RUN:
            unit = min(rest, key=added)
            more_repeats, more = added(unit)
            repeats, tokens = repeats + more_repeats, tokens + more
            rest.remove(unit)
            run.append(unit)
            inside.update(unit.members)
            for i in unit.members:
                left[i] -= 1
            if len(run) > 1:
                yield Share(tuple(run), tokens, repeats)

    def part(self) -> Part:
        pairs = tuple(unit.pair for unit in self.units if unit.pair is not None)
        return Part(self.example, tuple(self.responses), pairs, self.tokens, self.targets)


def split_example(example: Example, shape: RowShape) -> list[Part]:
    """Cuts an example into parts that each fit one row; both ends of a pair stay together.

    Raises:
      DoesNotFit: one response with its prompt (or one pair) is over the shape's caps.
    """
    return [piece.part() for piece in cut(0, example, shape)]


def cut(number: int, example: Example, shape: RowShape) -> list[Piece]:
    """Pieces that each fit a row: few tokens in all, and all but the last as large as they get."""
    paired = {i for pair in example.pairs for i in pair.members()}
    units = [Unit(pair.members(), pair) for pair in example.pairs]
    units += [Unit((i,), None) for i in range(len(example.responses)) if i not in paired]
    whole = Piece(number, example, units, shape)
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


def _cut_by(power: float, rest: Piece, shape: RowShape) -> list[Piece]:
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

    def __init__(self, whole: Piece, shape: RowShape, power: float):
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

    def take(self, units: Sequence[Unit]) -> set[int]:
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
