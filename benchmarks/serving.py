"""Serving beside batch scoring: the same pairs by `Scorer` and by clients of a server.

  python -m benchmarks.serving [--data=FOLDER] [--clients=64] [--small]

Batch scoring is given all questions at once. The server gets one question a request, from clients
that each send the next one when the last one is answered; clients and server share the machine's
cores. Both sides must give the same numbers. Also printed: how long a request takes, among that
many clients and alone.
"""

from __future__ import annotations

import asyncio
import json
import statistics

from absl import flags

from benchmarks import workloads
from benchmarks.command import finish, is_small, setting
from benchmarks.harness import TOLERANCE, Worker, say
from benchmarks.http_client import Reply, load, row, server_flags, serving
from benchmarks.results import Case, Target, Timing, largest_difference, ratio
from gram_jax import entry
from gram_jax.encoding import Encoder
from gram_jax.errors import UserError
from gram_jax.report import Table

_CLIENTS = flags.DEFINE_integer("clients", 64, "That send requests at the same time.")
_TOKENS = flags.DEFINE_integer("tokens", 40_000, "Tokens to score in a repetition.")
_ALONE = flags.DEFINE_integer("alone", 16, "Requests that are also sent one after the other.")

SHARE = 0.8
"""Of the rate of batch scoring, that serving is to reach."""
_PATH = "/gram/v1/score"


def main(_: list[str]) -> None:
    """Measures, prints and writes."""
    tokens = 1200 if is_small() else _TOKENS.value
    with setting("56M") as s:
        encoder = Encoder(
            tokenizer=s.tokenizer, reading="likelihood", max_length=s.config.max_position
        )
        asked = workloads.separate_pairs(s.data, encoder, tokens, row())
        work = workloads.num_tokens(asked)
        say(f"{len(asked)} pairs, {work:,} tokens, {_CLIENTS.value} clients")
        workloads.save(questions := s.scratch / "questions.json", asked)
        bodies = [
            json.dumps({"prompt": one.prompt, "responses": one.responses}).encode() for one in asked
        ]
        batch = Timing(
            side="batch", seconds=[], work=work, unit="tokens", compile_seconds=0.0,
            warm_up_seconds=0.0, facts={},
        )  # fmt: skip
        served = Timing(
            side="served", seconds=[], work=work, unit="tokens", compile_seconds=0.0,
            warm_up_seconds=0.0, facts={},
        )  # fmt: skip
        crowd, difference = list[float](), 0.0
        model = {"model": str(s.model), "questions": str(questions)}
        with (
            Worker("ours:Scoring", **model, reading="likelihood") as worker,
            serving(s.model, *server_flags()) as server,
        ):
            worker.call("warm_up")
            for repetition in range(s.repetitions):
                answer = worker.call("run")
                before = server.metrics()
                replies, seconds = _timed(server.port, bodies, _CLIENTS.value)
                after = server.metrics()
                batch.seconds.append(answer.seconds)
                served.seconds.append(seconds)
                batch.facts.update(answer.facts)
                served.facts.update(_facts(before, after))
                crowd += [reply.seconds for reply in replies]
                difference = max(difference, _difference(answer.numbers, replies))
                say(f"  {repetition + 1}/{s.repetitions}: batch {answer.seconds:.2f} s,"
                    f" served {seconds:.2f} s")  # fmt: skip
            alone = [r.seconds for r in _timed(server.port, bodies[: _ALONE.value], 1)[0]]
        found = ratio(batch.seconds, served.seconds)
        target = Target(
            what=f"rate of batch scoring, {_CLIENTS.value} clients", goal=SHARE,
            reached=found.median, unit="%", low=found.low, high=found.high,
        )  # fmt: skip
        finish("serving", {}, [Case(
            name=f"{_CLIENTS.value} clients",
            what=f"{len(asked)} pairs of {work:,} tokens, one a request",
            timings=[batch, served], difference=difference, targets=[target],
        )])  # fmt: skip
        rows = [_row(f"{_CLIENTS.value}", crowd), _row("1", alone)]
        print(Table(["clients", "requests", "p50, s", "p99, s", "longest, s"], rows).text())


def _timed(port: int, bodies: list[bytes], clients: int) -> tuple[list[Reply], float]:
    async def run() -> tuple[list[Reply], float]:
        loop = asyncio.get_running_loop()
        started = loop.time()
        replies = await load(port, _PATH, bodies, clients)
        return replies, loop.time() - started

    return asyncio.run(run())


def _facts(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """What the server computed meanwhile."""
    tokens, places, batches = (
        after[name] - before[name]
        for name in ("gram_tokens_total", "gram_places_total", "gram_batches_total")
    )
    return {"places": places, "padding": 1 - tokens / places, "batches": batches}


def _difference(numbers: list[float], replies: list[Reply]) -> float:
    """The largest relative difference of a served score from the batch's.

    Raises:
      UserError: a request was refused, or the difference is too large.
    """
    refused = [reply for reply in replies if reply.status != 200]
    if refused:
        raise UserError(f"{len(refused)} requests were refused, the first with {refused[0]}")
    served = [x for reply in replies for x in reply.answer["results"][0]["rewards"]]
    difference = largest_difference(served, numbers)
    if difference > TOLERANCE:
        raise UserError(f"served scores differ from batch scores by {difference:.2g}")
    return difference


def _row(name: str, seconds: list[float]) -> tuple[str, int, str, str, str]:
    ordered = sorted(seconds)
    last = ordered[min(len(ordered) - 1, round(0.99 * len(ordered)))]
    middle = statistics.median(ordered)
    return name, len(ordered), f"{middle:.3f}", f"{last:.3f}", f"{ordered[-1]:.3f}"


if __name__ == "__main__":
    entry.run(main, one_process=True)
