"""The evaluation job: data files in, a folder of numbers, rows and a report out.

Everything is read and checked first. Several processes answer all questions together in lock-step
and get the same numbers; process 0 alone writes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from gram_jax.benchmarks import BENCHMARKS, Answer, Item, answer
from gram_jax.config import STALL_SECONDS
from gram_jax.distributed import is_main
from gram_jax.errors import DataError, UserError
from gram_jax.evaluation_input import EvaluationInput, read_evaluation
from gram_jax.evaluation_report import console, markdown, report
from gram_jax.evaluation_results import Facts, Results, result_rows, results_of, table_of
from gram_jax.ranking_job import Engine
from gram_jax.reporting import Progress
from gram_jax.scorer import Question, QuestionError, Verdict
from gram_jax.scoring_state import check_alike
from gram_jax.versions import versions
from gram_jax.watchdog import watched

_SECONDS_BETWEEN_UPDATES = 0.2

RESULTS, ROWS, REPORT, MARKDOWN = "results.json", "results.jsonl", "report.html", "results.md"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationJob:
    """What to evaluate on.

    Attributes:
      checkpoint: as the user named it, for the report.
      data: files; see `read_evaluation`.
      output: the folder to write.
      benchmark: the name of one, or "" for what the records say.
      chat: prompts that are text become a user's message.
      seed: of the bootstrap.
      stall_seconds: see `watchdog.watched`.
    """

    checkpoint: str
    data: tuple[str, ...]
    output: str
    benchmark: str = ""
    chat: bool = False
    seed: int = 0
    stall_seconds: float = STALL_SECONDS


def run_evaluation(
    job: EvaluationJob, load: Callable[[], Engine], *, stream: TextIO | None = None
) -> str:
    """Evaluates, writes the folder, and returns what a console shows.

    Args:
      job: what to do.
      load: gives the reward model; called after all data has been checked.
      stream: where progress goes; standard error by default.

    Raises:
      UserError: bad data (with file and line), bad settings, or a folder with results in it.
    """
    folder = Path(job.output)
    if (folder / RESULTS).exists():
        raise UserError(f"{folder / RESULTS} exists already; delete it or choose another --output")
    if job.benchmark and job.benchmark not in BENCHMARKS:
        raise UserError(f"benchmark={job.benchmark!r} must be one of {', '.join(BENCHMARKS)}")
    given = read_evaluation(job.data, job.benchmark, chat=job.chat)
    check_alike(", ".join(job.data), _digest_of(given))
    engine = load()
    started = time.monotonic()
    with watched(job.stall_seconds, "evaluation"):
        answers = _answers(given, engine, stream)
    seconds = time.monotonic() - started - engine.engine.compile_seconds
    table = table_of(given, answers)
    results = results_of(given, answers, table, seed=job.seed)
    facts = _facts(job, given, answers, engine, seconds)
    text = console(facts, given, results)
    if is_main():
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / ROWS, "".join(json.dumps(r) + "\n" for r in result_rows(given, answers)))
        _write(folder / MARKDOWN, markdown(facts, given, results))
        report(facts, given, results, table).save(folder / REPORT)
        # Last: where it stands, the folder is complete.
        _write(
            folder / RESULTS,
            json.dumps(_as_json(facts, given, results), indent=2, allow_nan=False) + "\n",
        )
    return text


def _digest_of(given: EvaluationInput) -> str:
    return hashlib.sha256(json.dumps([given.keys, given.subsets]).encode()).hexdigest()


def _answers(given: EvaluationInput, engine: Engine, stream: TextIO | None) -> list[Answer]:
    """The reward model's answer to each item, in order."""
    total = given.pairs
    progress = Progress(
        total,
        unit="pair",
        log_every=max(total // 20, 1),
        stream=stream,
        enabled=None if is_main() else False,
    )
    started = shown = time.monotonic()
    made = 0
    answers: list[Answer] = []
    questions = (Question(i.prompt, i.responses, (*i.pairs, *i.equals)) for i in given.items)
    with progress:
        try:
            for item, verdict in zip(given.items, engine.scorer.score(questions), strict=True):
                _check_finite(item, verdict)
                answers.append(answer(item, verdict, engine.scorer.beta))
                made += len(item.pairs)
                now = time.monotonic()
                # Answers come in batches: one line for all that came at once.
                if now - shown > _SECONDS_BETWEEN_UPDATES or made == total:
                    shown = now
                    seconds = now - started - engine.engine.compile_seconds
                    progress.update(made, {"pairs/s": made / max(seconds, 1e-9)})
        except QuestionError as error:
            item = given.items[error.question]
            places = {"prompt": 0, "response": 1 + error.index}
            field = item.fields[places[error.field]] if error.field else None
            raise DataError(error.reason, file=item.file, line=item.line, field=field) from None
    return answers


def _check_finite(item: Item, verdict: Verdict) -> None:
    for numbers in (verdict.rewards, verdict.forward, verdict.backward):
        if numbers is not None and not np.isfinite(numbers).all():
            raise UserError(
                f"{item.file}:{item.line}: the model gives a reward that is not finite; its weights"
                " may be damaged, or too large for the compute dtype"
            )


def _facts(
    job: EvaluationJob,
    given: EvaluationInput,
    answers: Sequence[Answer],
    engine: Engine,
    seconds: float,
) -> Facts:
    judge = engine.scorer.kind == "judge"
    responses = sum(len(item.responses) for item in given.items)
    compared = sum(len(item.pairs) + len(item.equals) for item in given.items)
    places = engine.engine.places
    return Facts(
        checkpoint=job.checkpoint,
        kind=engine.scorer.kind,
        beta=engine.scorer.beta,
        settings=engine.settings,
        items=len(given.items),
        responses=responses,
        pairs=given.pairs,
        ties=sum(int((one.margin == 0).sum()) for one in answers),
        truncated=sum(one.verdict.truncated for one in answers),
        repeated=given.repeated,
        identical=given.identical,
        contrary=given.contrary,
        sequences=2 * compared if judge else responses,
        tokens=engine.packed.tokens,
        padding=1 - engine.packed.tokens / places if places else None,
        seconds=max(seconds, 0.0),
        compile_seconds=engine.engine.compile_seconds,
        seed=job.seed,
    )


def _as_json(facts: Facts, given: EvaluationInput, results: Results) -> dict[str, Any]:
    """The content of results.json."""
    reliability = results.reliability

    def listed(values: Any) -> list[float | None]:
        return [None if np.isnan(v) else float(v) for v in values]

    return {
        **dataclasses.asdict(facts),
        "pairs_per_second": facts.pairs / max(facts.seconds, 1e-9),
        "tokens_per_second": facts.tokens / max(facts.seconds, 1e-9),
        "data": [dataclasses.asdict(file) for file in given.files],
        "subsets": {name: dataclasses.asdict(s) for name, s in results.subsets.items()},
        "macro": results.macro._asdict() if results.macro else None,
        "official": [
            one._asdict() | {"sums": [s._asdict() for s in one.sums]} for one in results.official
        ],
        "reliability": {
            "edges": listed(reliability.edges),
            "confidence": listed(reliability.confidence),
            "accuracy": listed(reliability.accuracy),
            "count": reliability.count.tolist(),
            "ece": reliability.ece,
        },
        "versions": versions(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _write(path: Path, text: str) -> None:
    """Through a temporary file, so that a reader never sees half of it."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
