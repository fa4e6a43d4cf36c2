"""Requests that wait together are computed together, in the rows of batch scoring.

One thread owns the device. It takes from the requests that wait what one batch holds, a unit from
each in turn, so that a large request does not keep small ones waiting; packs it as batch scoring
does, and runs the same compiled function on the same few shapes. Where less waits than fills the
usual shape, it fills the largest one that it can: two small batches cost no more than one that is
twice as large and half empty, and the first is done sooner. All shapes are compiled before the
first request is taken.

What a request asks for is tokenised before it comes here (see `gram_jax.serving.engine`).
"""

from __future__ import annotations

import collections
import itertools
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from gram_jax import watchdog
from gram_jax.encoding import BlockBuilder, Encoded
from gram_jax.packing import PackCounts, pack
from gram_jax.rows import Example, IntArray
from gram_jax.scorer import Scorer
from gram_jax.scoring import BatchShape, RowBatch, Running, Scored, doubling

_UNITS = 2
"""Units of a large question that fill a batch: what other requests wait for, at most."""
_PASSED_OVER = 64
"""Units that do not fit a batch, after which the search for one that does ends."""
_IDLE_SECONDS = 1.0


class Unit(NamedTuple):
    """Some of a question's sequences, which are computed together.

    Attributes:
      sequences: their places among those of the request.
      tokens: places of a row that they take, about.
      alone: with nothing else in the batch.
    """

    sequences: range
    tokens: int
    alone: bool = False


class Work:
    """A request's questions, on their way through the device.

    Equal sequences are computed once, so that equal responses have the same score to the bit.

    Attributes:
      sequences: all different ones.
      units: what is still to be computed.
      missing: how many units have no scores yet.
      dropped: nobody waits for it any more; what is left of it is not computed.
    """

    def __init__(
        self,
        encoded: Sequence[Encoded],
        usual: BatchShape,
        done: Callable[[BaseException | None], None],
    ) -> None:
        """``done`` is called once, by the device thread: with None, or why there are no scores."""
        self.encoded, self.done, self.dropped = encoded, done, False
        self.sequences: list[tuple[IntArray, IntArray]] = []
        self.units: collections.deque[Unit] = collections.deque()
        known: dict[tuple[bytes, bytes], int] = {}
        self._places: list[list[int]] = []
        for one in encoded:
            first = len(self.sequences)
            self._places.append(list(self._place(one.sequences, known)))
            self.units += _units(self.sequences[first:], first, usual)
        self.missing = len(self.units)
        self._scores: list[Scored | None] = [None] * len(self.sequences)

    def _place(
        self,
        sequences: Sequence[tuple[IntArray, IntArray]],
        known: dict[tuple[bytes, bytes], int],
    ) -> Iterator[int]:
        for sequence, prompt in zip(sequences, _prompts(sequences), strict=True):
            place = known.setdefault((prompt, sequence[1].tobytes()), len(self.sequences))
            if place == len(self.sequences):
                self.sequences.append(sequence)
            yield place

    def fill(self, unit: Unit, scores: Sequence[Scored]) -> None:
        """Takes the scores of a unit's sequences."""
        self._scores[unit.sequences.start : unit.sequences.stop] = scores
        self.missing -= 1

    def scores(self, question: int) -> list[Scored]:
        """The scores of a question's sequences, once none is missing."""
        found = [self._scores[place] for place in self._places[question]]
        return [score for score in found if score is not None]


def _prompts(sequences: Sequence[tuple[IntArray, IntArray]]) -> Iterator[bytes]:
    """Each sequence's prompt as bytes, made once where neighbours are given the same array.

    A body of one long prompt with many short responses is small; its prompts, copied, are not.
    """
    last: IntArray | None = None
    key = b""
    for prompt, _ in sequences:
        if prompt is not last:
            last, key = prompt, prompt.tobytes()
        yield key


def _units(
    sequences: Sequence[tuple[IntArray, IntArray]], start: int, usual: BatchShape
) -> Iterator[Unit]:
    """A question's sequences in order, the prompt of neighbours counted once."""
    most = min(usual.row.tokens, usual.places // _UNITS)
    first = tokens = 0
    before = b""
    for at, ((prompt, rest), key) in enumerate(zip(sequences, _prompts(sequences), strict=True)):
        own = usual.row.places(rest)
        size = own + (0 if key == before else len(prompt) - 1)
        if at > first and tokens + size > most:
            yield Unit(range(start + first, start + at), tokens)
            first, tokens, size = at, 0, own + len(prompt) - 1
        tokens, before = tokens + size, key
    if sequences:
        yield Unit(range(start + first, start + len(sequences)), tokens)


class Batcher:
    """What waits, and the thread that computes it.

    Attributes:
      ready: all shapes are compiled.
      failure: why the thread has ended, if it was not asked to.
      waiting_tokens: places that wait to be computed.
      packed: what packing did, over all batches that were computed.
      dropped: requests that nobody waited for any more.
    """

    # Those in `_turns` are those with units, so that what is dropped takes no memory.

    def __init__(self, scorer: Scorer) -> None:
        self.scorer, self._shapes = scorer, doubling(scorer.shapes)
        self.ready = False
        self.failure: BaseException | None = None
        self.waiting_tokens = self.dropped = 0
        self.packed = PackCounts()
        self._turns: collections.deque[Work] = collections.deque()
        self._taken: list[Work] = []  # with units on the device
        self._changed = threading.Condition()
        self._stopping = False
        self._speed = 0.0  # places a second, of late
        self._thread = threading.Thread(target=self._run, name="device", daemon=True)

    def start(self) -> None:
        """Begins to compile."""
        self._thread.start()

    def add(self, work: Work) -> None:
        """Takes a request that has something to compute."""
        with self._changed:
            if self.failure is None:
                self._turns.append(work)
                self.waiting_tokens += sum(unit.tokens for unit in work.units)
                self._changed.notify()
                return
        work.done(self.failure)

    def drop(self, work: Work) -> None:
        """Forgets a request; what of it is not on the device yet is never computed."""
        with self._changed:
            work.dropped = True
            self.dropped += 1
            if work.units and self.failure is None:  # it has its turn
                self.waiting_tokens -= sum(unit.tokens for unit in work.units)
                work.units.clear()
                self._turns.remove(work)

    def seconds_waiting(self) -> float:
        """In how many seconds what waits now will be done, about; 1 if nothing was computed yet."""
        return self.waiting_tokens / self._speed if self._speed else 1.0

    def stop(self) -> None:
        """Asks the thread to end when nothing waits any more."""
        with self._changed:
            self._stopping = True
            self._changed.notify()

    def join(self, seconds: float | None = None) -> bool:
        """Waits for the thread, at most so long; whether it has ended."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._compile()
            self.ready = not self._stopping
            while self._wait():
                self._compute()
        except BaseException as error:
            with self._changed:
                self.failure = error
                left = {id(work): work for work in (*self._taken, *self._turns)}
                self._turns.clear()
            for work in left.values():
                if not work.dropped:
                    work.done(error)

    def _compile(self) -> None:
        """Runs every kind of batch once."""
        for batch in trial_batches(self._shapes):
            if self._stopping:
                return
            watchdog.progress()
            for _ in self.scorer.run([batch], per_token=self._per_token):
                pass

    @property
    def _per_token(self) -> bool:
        # The log-probs are computed in any case, so that one compiled function serves all.
        return self.scorer.kind == "likelihood"

    def _wait(self) -> bool:
        """Waits until something waits; False if the thread is to end."""
        with self._changed:
            while not self._turns:
                if self._stopping:
                    return False
                watchdog.progress()  # that nobody asks is no fault
                self._changed.wait(_IDLE_SECONDS)
        return True

    def _compute(self) -> None:
        """Computes what waits; the next batch is packed meanwhile if there is enough for one."""
        groups: collections.deque[_Group] = collections.deque()
        started, computed = time.monotonic(), 0
        places = self._shapes[-1].places

        def batches() -> Iterator[RowBatch]:
            while units := self._take():
                groups.append(_Group(units, self._shapes))
                yield from groups[-1].running.batches
                if self.waiting_tokens < places:
                    return  # what comes until this batch is done goes into the next one

        for scores in self.scorer.run(batches(), per_token=self._per_token):
            groups[0].running.add(scores)
            if not groups[0].running.missing:
                computed += groups[0].running.packed.tokens
                self._deliver(groups.popleft())
        if not computed:  # it was dropped before it was taken
            return
        speed = computed / max(time.monotonic() - started, 1e-9)
        self._speed = 0.8 * self._speed + 0.2 * speed if self._speed else speed

    def _take(self) -> list[tuple[Work, Unit]]:
        """The units of the next batch: one of each request in turn, until no more fit."""
        found: list[tuple[Work, Unit]] = []
        with self._changed:
            sizes = [shape.places for shape in self._shapes]
            room = max((s for s in sizes if s <= self.waiting_tokens), default=sizes[0])
            passed: list[Work] = []
            while self._turns and room > 0 and len(passed) < _PASSED_OVER:
                work = self._turns.popleft()
                unit = work.units[0]
                if found and (unit.alone or unit.tokens > room):
                    passed.append(work)
                    continue
                work.units.popleft()
                room -= room if unit.alone else unit.tokens
                self.waiting_tokens -= unit.tokens
                found.append((work, unit))
                self._taken.append(work)
                if work.units:
                    self._turns.append(work)
            self._turns.extendleft(reversed(passed))
        return found

    def _deliver(self, group: _Group) -> None:
        self.packed.add(group.running.packed)
        for work, unit, scores in group.scores():
            self._taken.remove(work)
            if len(group.units) > 1 and not all(math.isfinite(s.score) for s in scores):
                # Attention takes nothing from neighbours, but nothing of NaN is NaN.
                self._again(work, unit._replace(alone=True))
                continue
            work.fill(unit, scores)
            if not work.missing and not work.dropped:
                work.done(None)

    def _again(self, work: Work, unit: Unit) -> None:
        with self._changed:
            if work.dropped:
                return
            if not work.units:  # else it has its turn
                self._turns.appendleft(work)
            work.units.appendleft(unit)
            self.waiting_tokens += unit.tokens


class _Group:
    """Units that are packed together."""

    def __init__(self, units: list[tuple[Work, Unit]], shapes: Sequence[BatchShape]) -> None:
        self.units = units
        builder = BlockBuilder()
        self._places = [
            builder.add([work.sequences[i] for i in unit.sequences]) for work, unit in units
        ]
        self.running = Running(builder.examples(), shapes, first=True, short_end=True)

    def scores(self) -> Iterator[tuple[Work, Unit, list[Scored]]]:
        """Each unit with the scores of its sequences, once all are there."""
        for (work, unit), places in zip(self.units, self._places, strict=True):
            yield work, unit, [self.running[place] for place in places]


def trial_batches(shapes: Sequence[BatchShape]) -> Iterator[RowBatch]:
    """One batch of every kind that `score_batches` may be given: each shape, and where there are
    target slots, each number of them."""
    for shape in shapes:
        row = shape.row
        parts = (4, 2, 1) if row.targets else (1,)
        for part in parts:
            responses = _responses(max(row.branch_room // part, 1), row.readouts)
            example = Example(np.zeros(1, np.int32), responses)
            (packed,) = pack([example], row)
            yield RowBatch([packed], shape)


def _responses(places: int, readouts: bool) -> tuple[np.ndarray, ...]:
    """Responses of at most eight tokens that take so many places."""
    ends = [*range(0, places, 8), places]
    sizes = [b - a - readouts for a, b in itertools.pairwise(ends)]
    return tuple(np.zeros(size, np.int32) for size in sizes if size > 0)
