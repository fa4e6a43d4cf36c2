"""What the benchmarks of scoring share: the same questions answered by both sides in turn."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks import needed, workloads
from benchmarks.command import Setting, finish
from benchmarks.harness import (
    BFLOAT16,
    OURS,
    Worker,
    compare,
    has_bfloat16,
    measure_peak,
    speed_target,
)
from benchmarks.results import Case


def measure(
    benchmark: str,
    setting: Setting,
    asked: list[workloads.Asked],
    case: tuple[str, str],
    *,
    variants: Sequence[str],
    goal: float,
    reading: str = "likelihood",
    labels: Sequence[int] = (),
    half: bool = True,
) -> None:
    """Measures, prints and writes.

    Args:
      benchmark: its name.
      setting: the model and its text.
      asked: the questions.
      case: name and description of what is measured.
      variants: of the peer; the first is the one that ``goal`` is about.
      goal: how many times as quick as the peer.
      reading: what gram_jax reads; with "judge", ``labels`` are the ids of the judge's labels.
      half: show the first variant in bfloat16, too, where the processor has instructions for it.
    """
    workloads.save(questions := setting.scratch / "questions.json", asked)
    both = {"model": str(setting.model), "questions": str(questions)}
    with (
        Worker("ours:Scoring", **both, reading=reading) as ours,
        Worker("peer:Scoring", **both, labels=list(labels), half=variants[0]) as peer,
    ):
        peak = measure_peak(ours, peer, setting.peak_size)
        if half and has_bfloat16(peak):
            variants = [*variants, BFLOAT16]
        timings, difference = compare(
            ours,
            {variant: (peer, variant) for variant in variants},
            repetitions=setting.repetitions,
            work=workloads.num_tokens(asked),
            unit="tokens",
            flops=_flops(setting, asked, variants, is_judge=bool(labels)),
            peak=peak,
        )
    name, what = case
    target = speed_target(goal, timings, variants[0])
    found = Case(name=name, what=what, timings=timings, difference=difference, targets=[target])
    finish(benchmark, peak, [found])


def _flops(
    setting: Setting, asked: list[workloads.Asked], variants: Sequence[str], *, is_judge: bool
) -> dict[str, float]:
    """What a run of each side needs. Both orders of a judge begin with the same tokens."""
    groups = [
        (len(one.sequences[0][0]) - 1, [len(rest) for _, rest in one.sequences]) for one in asked
    ]
    own: needed.Logits = "none" if is_judge else "responses"
    peers: dict[str, needed.Logits] = {"plain": "all", "careful": own}
    peers[BFLOAT16] = peers[variants[0]]
    return {
        OURS: needed.once_a_prompt(setting.config, groups, own),
        **{
            variant: needed.once_a_response(setting.config, groups, peers[variant])
            for variant in variants
        },
    }
