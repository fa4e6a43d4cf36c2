"""A server under good, bad, slow and impatient clients for minutes: nothing wrong, nothing lost.

  python -m benchmarks.soak [--minutes=10] [--clients=16] [--shape=tiny] [--data=FOLDER]

The answer to every good request is compared with what batch scoring gives: no relative difference
may be above 1e-5. Bad requests must get the error that they deserve, with its field. Slow clients
let their bodies trickle and are answered; impatient ones go away before the answer. What the
server's memory does is printed as time goes by. Status 1: something was wrong or lost, or memory
grew.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random
import statistics
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from absl import flags

from benchmarks import workloads
from benchmarks.command import setting
from benchmarks.harness import say
from benchmarks.http_client import Connection, RunningServer, head, row, server_flags, serving
from gram_jax import entry
from gram_jax.checkpoints import load_model
from gram_jax.config import ComputeConfig
from gram_jax.encoding import Encoder
from gram_jax.ranking import rank
from gram_jax.report import Table
from gram_jax.scorer import Question, RewardSettings, Scorer

_MINUTES = flags.DEFINE_float("minutes", 10.0, "How long.")
_CLIENTS = flags.DEFINE_integer("clients", 16, "At once; a quarter is bad, slow or impatient.")
_SHAPE = flags.DEFINE_enum("shape", "tiny", ["tiny", "56M"], "The model.")
_TOKENS = flags.DEFINE_integer("tokens", 20_000, "Of the pairs that requests are made of.")

TOLERANCE = 1e-5
GROWTH = 0.05
"""Memory in the last quarter may be this much more than in the second one."""
_LINES = 20
"""Of the printed table."""


@dataclasses.dataclass(frozen=True, slots=True)
class Good:
    """A request, and the numbers that its answer must hold."""

    path: str
    body: bytes
    numbers: tuple[float, ...]

    def found(self, answer: Any) -> list[float]:
        """The numbers of an answer, in the order of the responses."""
        if self.path == "/get_reward":
            return list(answer["rewards"])
        if self.path == "/gram/v1/compare":
            return list(answer["rewards"])
        results = answer["results"]
        if self.path == "/gram/v1/score":
            return [number for result in results for number in result["rewards"]]
        name = "reward" if self.path == "/gram/v1/rank" else "relevance_score"
        return [r[name] for r in sorted(results, key=lambda r: r["index"])]


BAD = (
    ("/gram/v1/score", b"{", 400, None),
    ("/gram/v1/score", b'{"prompt": "x", "response": "\\ud800"}', 422, "response"),
    ("/gram/v1/score", b'{"prompt": NaN, "response": "y"}', 422, "prompt"),
    ("/gram/v1/score", b'{"items": [{"prompt": "x", "response": ""}]}', 422, "items[0].response"),
    ("/gram/v1/score", json.dumps({"prompt": "x", "response": "a b " * 20_000}).encode(), 422,
     "response"),
    ("/gram/v1/rank", b'{"prompt": "x", "responses": []}', 422, "responses"),
    ("/get_reward", b'{"query": [3]}', 422, "query[0]"),
    ("/rerank", b'{"query": "x", "documents": "y"}', 422, "documents"),
    ("/nowhere", b"{}", 404, None),
)  # fmt: skip
"""(path, body, status, field): what must be refused, and how."""


@dataclasses.dataclass(slots=True)
class Seen:
    """What has happened so far."""

    good: int = 0
    bad: int = 0
    slow: int = 0
    gone: int = 0
    wrong: int = 0
    lost: int = 0
    largest: float = 0.0
    faults: list[str] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)

    def fault(self, kind: str, what: str) -> None:
        """Counts something wrong or lost; the first few are told."""
        setattr(self, kind, getattr(self, kind) + 1)
        if len(self.faults) < 5:
            self.faults.append(f"{kind}: {what[:300]}")


def requests(scorer: Scorer, asked: Sequence[workloads.Asked]) -> list[Good]:
    """Requests of every kind, with what batch scoring gives for them."""
    prompts = [one.prompt for one in asked]
    others = [asked[(i + 1) % len(asked)].responses[0][:400] for i in range(len(asked))]
    questions = [
        Question(p, [one.responses[0], o]) for p, one, o in zip(prompts, asked, others, strict=True)
    ]
    rankings = rank(scorer, questions)
    made = []
    for question, ranked in zip(questions, rankings, strict=True):
        prompt = str(question.prompt)
        a, b = (str(response) for response in question.responses)
        numbers = tuple(reward for reward in ranked.ranking.rewards if reward is not None)
        both = {"prompt": prompt, "responses": [a, b]}
        bodies: dict[str, list[dict[str, Any]]] = {
            "/gram/v1/score": [both, {"items": [both]}, both | {"tokens": True}],
            "/gram/v1/rank": [both],
            "/gram/v1/compare": [{"prompt": prompt, "a": a, "b": b}],
            "/get_reward": [{"query": [prompt + a, prompt + b], "prompts": [prompt] * 2}],
            "/v1/rerank": [{"query": prompt, "documents": [a, b]}],
        }
        for path, each in bodies.items():
            made += [Good(path, json.dumps(body).encode(), numbers) for body in each]
    return made


async def _good(port: int, goods: Iterator[Good], seen: Seen, ends: float, slowly: float) -> None:
    """One client that is answered."""
    loop = asyncio.get_running_loop()
    while loop.time() < ends:
        try:
            async with await Connection.open(port) as connection:
                while loop.time() < ends:
                    one = next(goods)
                    reply = await connection.post(one.path, one.body, slowly=slowly)
                    if slowly:
                        seen.slow += 1
                    else:
                        seen.good += 1
                        seen.seconds.append(reply.seconds)
                    _check(one, reply.status, reply.answer, seen)
        except (ConnectionError, asyncio.IncompleteReadError) as error:
            seen.fault("lost", repr(error))


def _check(one: Good, status: int, answer: Any, seen: Seen) -> None:
    if status != 200:
        seen.fault("wrong", f"{one.path} {status} {answer}")
        return
    found = one.found(answer)
    for a, b in zip(found, one.numbers, strict=True):
        difference = abs(a - b) / max(1.0, abs(b))
        seen.largest = max(seen.largest, difference)
        if not difference <= TOLERANCE:
            seen.fault("wrong", f"{one.path} {a} instead of {b}")


async def _bad(port: int, seen: Seen, ends: float) -> None:
    """One client that must be refused."""
    loop = asyncio.get_running_loop()
    while loop.time() < ends:
        try:
            async with await Connection.open(port) as connection:
                for path, body, status, field in BAD:
                    reply = await connection.post(path, body)
                    seen.bad += 1
                    error = reply.answer.get("error", {})
                    if (reply.status, error.get("field")) != (status, field):
                        seen.fault("wrong", f"{path} {body[:60]!r}: {reply.status} {reply.answer}")
                    await asyncio.sleep(0.02)
        except (ConnectionError, asyncio.IncompleteReadError) as error:
            seen.fault("lost", repr(error))


async def _impatient(port: int, goods: Iterator[Good], seen: Seen, ends: float) -> None:
    """One client that goes away: in the middle of a body, or soon after it."""
    loop, dice = asyncio.get_running_loop(), random.Random(1)
    while loop.time() < ends:
        one = next(goods)
        async with await Connection.open(port) as connection:
            part = len(one.body) if dice.random() < 0.7 else len(one.body) // 2
            connection.writer.write(head(one.path, one.body) + one.body[:part])
            await connection.writer.drain()
            await asyncio.sleep(dice.random() * 0.05)
        seen.gone += 1


async def _soak(server: RunningServer, goods: list[Good], seen: Seen) -> list[tuple[float, float]]:
    """Runs all clients, and returns (seconds, MB that the server holds) over time."""
    port = server.port
    loop = asyncio.get_running_loop()
    started, seconds = loop.time(), 60 * _MINUTES.value
    ends = started + seconds
    order = random.Random(0)

    def endless() -> Iterator[Good]:
        while True:
            yield from order.sample(goods, len(goods))

    stream = endless()
    memory: list[tuple[float, float]] = []
    odd = max(_CLIENTS.value // 12, 1)
    async with asyncio.TaskGroup() as group:
        for i in range(_CLIENTS.value):
            if i < odd:
                group.create_task(_bad(port, seen, ends))
            elif i < 2 * odd:
                group.create_task(_impatient(port, stream, seen, ends))
            else:
                slowly = 2.0 if i < 3 * odd else 0.0
                group.create_task(_good(port, stream, seen, ends, slowly))
        before = 0
        while (left := ends - loop.time()) > 0:
            await asyncio.sleep(min(seconds / _LINES, left))
            at = loop.time() - started
            numbers = await asyncio.to_thread(server.metrics)
            memory.append((at, numbers["process_resident_memory_bytes"] / 1e6))
            say(f"  {at:5.0f} s: {seen.good - before} answered, {memory[-1][1]:.0f} MB,"
                f" wrong {seen.wrong}, lost {seen.lost}")  # fmt: skip
            before = seen.good
    return memory


def main(_: list[str]) -> None:
    """Soaks, prints, and exits with 1 if anything is amiss."""
    with setting(_SHAPE.value) as s:
        encoder = Encoder(
            tokenizer=s.tokenizer, reading="likelihood", max_length=s.config.max_position
        )
        asked = workloads.separate_pairs(s.data, encoder, _TOKENS.value, row())
        goods = requests(Scorer(load_model(s.model, ComputeConfig()), RewardSettings()), asked)
        say(f"{len(goods)} requests of {len(asked)} pairs, {_CLIENTS.value} clients")
        seen = Seen()
        with serving(s.model, *server_flags()) as server:
            memory = asyncio.run(_soak(server, goods, seen))
    for fault in seen.faults:
        say(fault)
    growth = _growth(memory)
    print(_report(seen, memory, growth))
    if seen.wrong or seen.lost or growth > GROWTH:
        sys.exit(1)


def _growth(memory: Sequence[tuple[float, float]]) -> float:
    """How much more memory is held in the last quarter than in the second one."""
    quarter = max(len(memory) // 4, 1)
    second = [mb for _, mb in memory[quarter : 2 * quarter]] or [mb for _, mb in memory]
    last = [mb for _, mb in memory[-quarter:]]
    return statistics.mean(last) / statistics.mean(second) - 1


def _report(seen: Seen, memory: Sequence[tuple[float, float]], growth: float) -> str:
    ordered = sorted(seen.seconds) or [0.0]
    last = ordered[min(len(ordered) - 1, round(0.99 * len(ordered)))]
    rows = [
        ("minutes", f"{_MINUTES.value:g}"),
        ("clients", f"{_CLIENTS.value}"),
        ("answered", f"{seen.good:,}"),
        ("slow bodies, answered", f"{seen.slow:,}"),
        ("bad, refused with their field", f"{seen.bad:,}"),
        ("went away", f"{seen.gone:,}"),
        ("wrong answers", f"{seen.wrong:,}"),
        ("lost requests", f"{seen.lost:,}"),
        ("largest relative difference", f"{seen.largest:.1e}"),
        ("p50, s", f"{statistics.median(ordered):.3f}"),
        ("p99, s", f"{last:.3f}"),
        ("memory, second quarter to last", f"{100 * growth:+.1f} %"),
    ]
    step = max(len(memory) // 5, 1)
    over_time = [(f"{at / 60:.1f}", f"{mb:.0f}") for at, mb in [*memory[::step], memory[-1]]]
    return "\n\n".join(
        [Table(["", "found"], rows).text(), Table(["minute", "server, MB"], over_time).text()]
    )


if __name__ == "__main__":
    entry.run(main, one_process=True)
