"""Requests that wait together are computed together, in the rows of batch scoring.

One thread owns the device. It takes from the requests that wait what one batch holds, a unit from
each in turn, so that a large request does not keep small ones waiting; packs it as batch scoring
does, and runs the same compiled function on the same few shapes. A batch that is not full gets the
smallest shape that holds it. All shapes are compiled before the first request is taken.

What a request asks for is tokenised before it comes here (see `gram_jax.serving.engine`).
"""

from __future__ import annotations

import collections
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from gram_jax import watchdog
from gram_jax.encoding import BlockBuilder, Encoded
from gram_jax.packing import PackCounts, pack
from gram_jax.rows import Example
from gram_jax.scorer import Scorer
from gram_jax.scoring import BatchShape, RowBatch, Running, Scored

_UNITS = 4
"""Units of a large question that fill a batch: what other requests wait for, at most."""
_PASSED_OVER = 64
"""Units that do not fit a batch, after which the search for one that does ends."""
_IDLE_SECONDS = 1.0


class Unit(NamedTuple):
    """Some of a question's sequences, which are computed together.

    Attributes:
      question: its place in the request.
      sequences: places of the sequences in the question.
      tokens: places that they take, about.
    """

    question: int
    sequences: range
    tokens: int


class Work:
    """A request's questions, on their way through the device.

    Attributes:
      scores: [questions][sequences], filled in as they come.
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
        self.scores: list[list[Scored | None]] = [[None] * len(e.sequences) for e in encoded]
        self.units = collections.deque(
            unit for place, e in enumerate(encoded) for unit in _units(place, e, usual)
        )
        self.missing = len(self.units)


def _units(place: int, encoded: Encoded, usual: BatchShape) -> Iterator[Unit]:
    """A question's sequences in order, the prompt of neighbours counted once."""
    most = min(usual.row.tokens, usual.places // _UNITS)
    first = tokens = 0
    before = b""
    for at, (prompt, rest) in enumerate(encoded.sequences):
        own, key = usual.row.places(rest), prompt.tobytes()
        size = own + (0 if key == before else len(prompt) - 1)
        if at > first and tokens + size > most:
            yield Unit(place, range(first, at), tokens)
            first, tokens, size = at, 0, own + len(prompt) - 1
        tokens, before = tokens + size, key
    if encoded.sequences:
        yield Unit(place, range(first, len(encoded.sequences)), tokens)


class Batcher:
    """What waits, and the thread that computes it.

    Attributes:
      ready: all shapes are compiled.
      failure: why the thread has ended, if it was not asked to.
      waiting_tokens: places that wait to be computed.
      packed: what packing did, over all batches that were computed.
      dropped: requests that nobody waited for any more.
    """

    def __init__(self, scorer: Scorer, ended: Callable[[], None]) -> None:
        """``ended`` is called by the thread when it ends."""
        self.scorer = scorer
        self.ready = False
        self.failure: BaseException | None = None
        self.waiting_tokens = self.dropped = 0
        self.packed = PackCounts()
        self._turns: collections.deque[Work] = collections.deque()
        self._taken: list[Work] = []  # with units on the device
        self._changed = threading.Condition()
        self._stopping = False
        self._speed = 0.0  # places a second, of late
        self._ended = ended
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
            self.waiting_tokens -= sum(unit.tokens for unit in work.units)
            work.units.clear()

    def seconds_waiting(self) -> float:
        """In how many seconds what waits now will be done, about; 1 if nothing was computed yet."""
        return self.waiting_tokens / self._speed if self._speed else 1.0

    def stop(self) -> None:
        """Asks the thread to end when nothing waits any more."""
        with self._changed:
            self._stopping = True
            self._changed.notify()

    def join(self) -> None:
        """Waits for the thread."""
        self._thread.join()

    def _run(self) -> None:
        try:
            self._compile()
            self.ready = True
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
        finally:
            self._ended()

    def _compile(self) -> None:
        """Runs every kind of batch once."""
        for batch in trial_batches(self.scorer.shapes):
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
        places = self.scorer.shapes[-1].places

        def batches() -> Iterator[RowBatch]:
            while units := self._take():
                groups.append(_Group(units, self.scorer.shapes))
                yield from groups[-1].running.batches
                if self.waiting_tokens < places:
                    return  # what comes until this batch is done goes into the next one

        for scores in self.scorer.run(batches(), per_token=self._per_token):
            groups[0].running.add(scores)
            if not groups[0].running.missing:
                computed += groups[0].running.packed.tokens
                self._deliver(groups.popleft())
        speed = computed / max(time.monotonic() - started, 1e-9)
        self._speed = 0.8 * self._speed + 0.2 * speed if self._speed else speed

    def _take(self) -> list[tuple[Work, Unit]]:
        """The units of the next batch: one of each request in turn, until no more fit."""
        room = self.scorer.shapes[-1].places
        found: list[tuple[Work, Unit]] = []
        with self._changed:
            passed: list[Work] = []
            while self._turns and room > 0 and len(passed) < _PASSED_OVER:
                work = self._turns.popleft()
                if not work.units:  # dropped
                    continue
                unit = work.units[0]
                if found and unit.tokens > room:
                    passed.append(work)
                    continue
                work.units.popleft()
                room -= unit.tokens
                self.waiting_tokens -= unit.tokens
                found.append((work, unit))
                self._taken.append(work)
                if work.units:
                    self._turns.append(work)
            self._turns.extendleft(reversed(passed))
        return found

    def _deliver(self, group: _Group) -> None:
        group.fill()
        self.packed.add(group.running.packed)
        for work, _ in group.units:
            self._taken.remove(work)
            work.missing -= 1
            if not work.missing and not work.dropped:
                work.done(None)


class _Group:
    """Units that are packed together."""

    def __init__(self, units: list[tuple[Work, Unit]], shapes: Sequence[BatchShape]) -> None:
        self.units = units
        builder = BlockBuilder()
        self._places = [
            builder.add([work.encoded[unit.question].sequences[i] for i in unit.sequences])
            for work, unit in units
        ]
        self.running = Running(builder.examples(), shapes, first=True, short_end=True)

    def fill(self) -> None:
        """Writes the scores where they are waited for."""
        for (work, unit), places in zip(self.units, self._places, strict=True):
            for i, place in zip(unit.sequences, places, strict=True):
                work.scores[unit.question][i] = self.running[place]


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
