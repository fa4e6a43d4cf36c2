"""The evaluation job: data files in, a folder of numbers, rows and a report out.

Everything is read and checked first. Questions are answered in pieces (see ``piecework``), by as
many processes as there are: what stands in a piece is the answers, and names in the place of texts.
Process 0 makes all numbers of them at the end.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from gram_jax.benchmarks import BENCHMARKS, Answer, Item, answer
from gram_jax.config import STALL_SECONDS
from gram_jax.distributed import main_first
from gram_jax.errors import DataError, UserError
from gram_jax.evaluation_input import (
    DataFile,
    EvaluationData,
    EvaluationInput,
    evaluation_input,
    named,
)
from gram_jax.evaluation_report import console, markdown, report
from gram_jax.evaluation_results import Facts, Results, result_rows, results_of, table_of
from gram_jax.pieces import Piece, SourceRow
from gram_jax.piecework import Made, Work, add, do_pieces
from gram_jax.ranking_job import Engine
from gram_jax.scorer import Question, QuestionError, Verdict
from gram_jax.shards import Manifest, Shards
from gram_jax.versions import versions

RESULTS, ROWS, REPORT, MARKDOWN = "results.json", "results.jsonl", "report.html", "results.md"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationJob:
    """What to evaluate on.

    Attributes:
      checkpoint: as the user named it, for the report.
      data: files; see `EvaluationData`.
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
    job: EvaluationJob,
    load: Callable[[], Engine],
    *,
    together: bool = False,
    stream: TextIO | None = None,
) -> str:
    """Evaluates, or goes on with it, writes the folder, and returns what a console shows.

    Args:
      job: what to do.
      load: gives the reward model; called after all data has been checked.
      together: the model is spread over several processes.
      stream: where progress goes; standard error by default.

    Raises:
      UserError: bad data (with file and line), bad settings, or a folder with results in it.
    """
    folder = Path(job.output)
    if main_first((folder / RESULTS).exists):
        raise UserError(f"{folder / RESULTS} exists already; delete it or choose another --output")
    if job.benchmark and job.benchmark not in BENCHMARKS:
        raise UserError(f"benchmark={job.benchmark!r} must be one of {', '.join(BENCHMARKS)}")
    data = EvaluationData(job.data, job.benchmark, chat=job.chat)
    digests = main_first(data.digests)  # now: in hours, a file may be another one
    engines: list[Engine] = []

    def check(row: SourceRow) -> Mapping[str, int]:
        return {"pair": len(data.item(row).pairs)}

    def begin() -> Work:
        engine = load()
        engines.append(engine)
        families = [family.name for family in data.families]
        return Work(
            settings={**engine.settings, "benchmarks": families, "chat": job.chat},
            batch_tokens=engine.batch_tokens,
            engine=engine.engine,
            unit="pair",
            counted="pair",
            run=lambda pieces, advance: _answer(data, engine, pieces, advance),
        )

    with Shards(folder / "answers") as shards:
        manifest, blocks = do_pieces(
            data.sources,
            shards,
            check,
            begin,
            doing="evaluation",
            stall_seconds=job.stall_seconds,
            together=together,
            stream=stream,
        )
        files = data.files(blocks, digests)
        return main_first(lambda: _finish(job, files, engines[0], shards, manifest))


def _answer(
    data: EvaluationData,
    engine: Engine,
    pieces: Iterator[tuple[Piece, list[SourceRow]]],
    advance: Callable[[int], None],
) -> Iterator[Made]:
    """The reward model's answers to the items of pieces."""
    for piece, rows in pieces:
        tokens, places = engine.packed.tokens, engine.engine.places
        items = [data.item(row) for row in rows]
        made: list[dict[str, Any]] = []
        questions = (Question(i.prompt, i.responses, (*i.pairs, *i.equals)) for i in items)
        try:
            for item, verdict in zip(items, engine.scorer.score(questions), strict=True):
                _check_finite(item, verdict)
                made.append(_row_of(item, verdict))
                advance(len(item.pairs))
        except QuestionError as error:
            item = items[error.question]
            at = {"prompt": 0, "response": 1 + error.index}
            field = item.fields[at[error.field]] if error.field else None
            raise DataError(error.reason, file=item.file, line=item.line, field=field) from None
        counts = {"tokens": engine.packed.tokens - tokens, "places": engine.engine.places - places}
        yield Made(piece, made, counts)


def _row_of(item: Item, verdict: Verdict) -> dict[str, Any]:
    """An item and what was said to it, as a row of a piece."""
    said = {
        name: value.tolist() if isinstance(value, np.ndarray) else value
        for name, value in verdict._asdict().items()
    }
    return {"item": named(item)._asdict(), "verdict": said}


def _answer_of(row: dict[str, Any], beta: float) -> Answer:
    """What `_row_of` was given, with names in the place of texts."""
    item, said = row["item"], row["verdict"]
    for field in ("pairs", "equals"):
        item[field] = tuple(map(tuple, item[field]))
    for field in ("rewards", "forward", "backward"):
        said[field] = None if said[field] is None else np.array(said[field], np.float64)
    said["num_tokens"] = np.array(said["num_tokens"], np.int64)
    return answer(Item(**item), Verdict(**said), beta)


def _finish(
    job: EvaluationJob, files: list[DataFile], engine: Engine, shards: Shards, manifest: Manifest
) -> str:
    """Makes the folder of the pieces, and returns what a console shows. For process 0."""
    counts: dict[str, float] = {}
    answers = [
        _answer_of(row, engine.scorer.beta)
        for rows in shards.merged(manifest, lambda more: add(counts, more))
        for row in rows
    ]
    given = evaluation_input([one.item for one in answers], files)
    table = table_of(given, answers)
    results = results_of(given, answers, table, seed=job.seed)
    facts = _facts(job, given, answers, engine, counts)
    folder = Path(job.output)
    _write(folder / ROWS, "".join(json.dumps(r) + "\n" for r in result_rows(given, answers)))
    _write(folder / MARKDOWN, markdown(facts, given, results))
    report(facts, given, results, table).save(folder / REPORT)
    # Where it stands, the folder is complete.
    _write(
        folder / RESULTS,
        json.dumps(_as_json(facts, given, results), indent=2, allow_nan=False) + "\n",
    )
    shards.remove()
    return console(facts, given, results)


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
    counts: Mapping[str, float],
) -> Facts:
    judge = engine.scorer.kind == "judge"
    responses = sum(len(item.responses) for item in given.items)
    compared = sum(len(item.pairs) + len(item.equals) for item in given.items)
    tokens, places = int(counts["tokens"]), counts["places"]
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
        tokens=tokens,
        padding=1 - tokens / places if places else None,
        seconds=counts["seconds"],
        compile_seconds=counts["compile_seconds"],
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
