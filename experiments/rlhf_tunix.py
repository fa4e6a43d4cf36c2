"""The part of `experiments.rlhf` that needs Tunix; that command starts it, with its plan.

  python -m experiments.rlhf_tunix PLAN.json

The plan says where models lie and which results are to be made; each is written as soon as it is
there. Gold rules see what was written; rewards, loaded by the reward function that trainers call,
are in the same process.
"""

from __future__ import annotations

import gc
import itertools
import json
import logging
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tunix

from experiments.rlhf_best_of_n import best_of_n, rank_correlation
from experiments.rlhf_gold import Chrf, parameters_named
from experiments.rlhf_grpo import Asked, Checker, rewards, train
from experiments.rlhf_policy import Writer, check_parity, load_policy, make_mesh
from experiments.rlhf_results import BEST, Best, Run, write
from experiments.rlhf_settings import REWARDS, Sizes, Work
from experiments.stages import stage_facts
from gram_jax import distributed
from gram_jax.clients import reward_function
from gram_jax.errors import UserError
from gram_jax.evaluation import Floats
from gram_jax.versions import versions

_TRIES = 4
"""Samples of which the first that is not blank is a prompt's reference."""


class Prompts(NamedTuple):
    """Objects to write about.

    Attributes:
      training: prompts of GRPO.
      checks, truths, sets: held-out prompts, their own docstrings, and ``in`` or ``out``.
    """

    training: list[str]
    checks: list[str]
    truths: list[str]
    sets: list[str]


class Start(NamedTuple):
    """What a policy writes before it is trained.

    Attributes:
      training, checks: a reference for each prompt.
      best: [P][S], samples of the held-out prompts at the places ``best_places``.
      seconds: that it took.
    """

    training: list[str]
    checks: list[str]
    best: list[list[str]]
    best_places: list[int]
    seconds: float


def main(plan: Path) -> None:
    """Makes what the plan asks for."""
    values = json.loads(plan.read_text("utf-8"))
    sizes, work = Sizes(**values["sizes"]), Work(Path(values["work"]))
    prompts = _prompts(work, sizes.steps * sizes.step_prompts)
    by_seed: dict[int, list[dict[str, Any]]] = {}
    for each in values["pending"]:
        by_seed.setdefault(each["seed"], []).append(each)
    for seed, asked in by_seed.items():
        session = Session(
            sizes, work, prompts, seed, asked[0]["settings"]["policy_seed"], values["machine"]
        )
        for each in asked:
            path = Path(each["path"])
            print(f"seed {seed}, {each['what']}", flush=True)
            if each["what"] == BEST:
                write(path, session.best(each["settings"]))
            else:
                write(path, session.run(each["what"], each["settings"]))
            print(f"written {path}", flush=True)
            gc.collect()


def _prompts(work: Work, training: int) -> Prompts:
    values = json.loads(work.prompts.read_text("utf-8"))
    checks = values["checks"]
    if len(values["training"]) < training:
        raise UserError(
            f"{work.prompts} has {len(values['training'])} prompts to train on, and {training} are"
            " wanted; ask for fewer steps"
        )
    return Prompts(
        [row["prompt"] for row in values["training"][:training]],
        [row["prompt"] for row in checks],
        [row["truth"] for row in checks],
        [row["set"] for row in checks],
    )


class Session:
    """The policy of a seed before training, and what is made from it."""

    def __init__(
        self,
        sizes: Sizes,
        work: Work,
        prompts: Prompts,
        seed: int,
        policy_seed: int,
        machine: dict[str, Any],
    ) -> None:
        self._sizes, self._work, self._prompts, self._seed = sizes, work, prompts, seed
        self._mesh = make_mesh()
        self._folder = work.policy(policy_seed)
        self._policy = load_policy(self._folder, self._mesh)
        texts = [a + b for a, b in zip(prompts.checks[:4], prompts.truths[:4], strict=True)]
        self._parity = check_parity(self._folder, self._policy, texts)
        print(f"seed {seed}: Tunix's logits are ours to {self._parity:.1e}", flush=True)
        self._writer = Writer(self._folder, self._policy, sizes)
        self._start = self._written()
        self._facts = {
            "machine": machine,
            "versions": {**versions(), "tunix": tunix.__version__},
            "parity": self._parity,
            "policy": stage_facts(work.pretrained(policy_seed)),
        }

    def _written(self) -> Start:
        """Read, or written by the policy once."""
        path = self._work.start(self._seed)
        asked = {
            "samples": self._sizes.best_samples,
            "prompts": self._sizes.best_prompts,
            "tokens": self._sizes.response_tokens,
            "policy": self._folder.parent.name,
        }
        if path.is_file():
            values = json.loads(path.read_text("utf-8"))
            enough = len(values["training"]) >= len(self._prompts.training)
            if values.pop("asked") == asked and enough:
                return Start(**values)
        began = time.perf_counter()
        half = self._sizes.best_prompts // 2
        places = [
            place
            for name in ("in", "out")
            for place in [k for k, s in enumerate(self._prompts.sets) if s == name][:half]
        ]
        samples = self._sizes.best_samples
        some = [self._prompts.checks[place] for place in places for _ in range(samples)]
        texts = self._writer.write(self._policy, some, 1000 + self._seed).texts
        start = Start(
            self._references(self._prompts.training, 2000 + self._seed),
            self._references(self._prompts.checks, 3000 + self._seed),
            [texts[i : i + samples] for i in range(0, len(texts), samples)],
            places,
            time.perf_counter() - began,
        )
        text = json.dumps({"asked": asked, **start._asdict()}, ensure_ascii=False, indent=1)
        path.write_text(text + "\n", encoding="utf-8")
        return start

    def _references(self, prompts: Sequence[str], seed: int) -> list[str]:
        """For each prompt the first sample that is not blank; its name where all are."""
        found = [""] * len(prompts)
        for attempt in range(_TRIES):
            missing = [k for k, text in enumerate(found) if not text.strip()]
            if not missing:
                break
            some = [prompts[k] for k in missing]
            written = self._writer.write(self._policy, some, 10 * seed + attempt)
            for k, text in zip(missing, written.texts, strict=True):
                found[k] = text
        return [text if text.strip() else p for text, p in zip(found, prompts, strict=True)]

    def run(self, reward: str, settings: dict[str, Any]) -> Run:
        """Trains the policy against a reward."""
        sizes, work = self._sizes, self._work
        processor = time.process_time()
        checker = Checker(
            Asked(self._prompts.checks, self._start.checks), self._prompts.truths, self._writer,
            self._policy, sizes,
        )  # fmt: skip
        trained = train(
            load_policy(self._folder, self._mesh),
            load_policy(self._folder, self._mesh),
            Asked(self._prompts.training, self._start.training),
            _reward(work, self._seed, reward),
            checker,
            self._writer,
            self._mesh,
            sizes,
            self._seed,
        )
        seconds = {
            "stage_1": stage_facts(work.pretrained(self._seed))["wall_seconds"],
            "stage_2": stage_facts(work.reward(self._seed, reward))["wall_seconds"],
            "grpo": trained.grpo_seconds,
            "checks": trained.check_seconds,
            "processor": time.process_time() - processor,
        }
        facts = {
            **self._facts,
            "date": _now(),
            "seconds": seconds,
            "reward": stage_facts(work.reward(self._seed, reward)),
            "reward_accuracy": json.loads(work.accuracy(self._seed, reward).read_text("utf-8")),
        }
        return Run(
            settings=settings,
            facts=facts,
            prompts=self._prompts.checks,
            sets=self._prompts.sets,
            steps=trained.steps,
            checks=trained.checks,
        )

    def best(self, settings: dict[str, Any]) -> Best:
        """Best of N among what the policy wrote before training."""
        began, processor = time.perf_counter(), time.process_time()
        places, texts = self._start.best_places, self._start.best
        prompts = [self._prompts.checks[place] for place in places]
        rules = [Chrf(self._prompts.truths[place]) for place in places]
        golds = [[rule(text) for text in some] for rule, some in zip(rules, texts, strict=True)]
        equals = [
            [rule.at_equal_length(text) for text in some]
            for rule, some in zip(rules, texts, strict=True)
        ]
        named = [
            [parameters_named(prompt, text) for text in some]
            for prompt, some in zip(prompts, texts, strict=True)
        ]
        pickers: dict[str, list[list[float]]] = {
            "gold": golds,
            "longest": [[float(len(text)) for text in some] for some in texts],
        }
        references = [self._start.checks[place] for place in places]
        for name, reward in self._readings():
            pickers[name] = _scored(reward, prompts, texts, references)
        sizes = self._sizes.best_sizes

        def curves(rule: Sequence[Sequence[float | None]], name: str) -> list[Floats | None]:
            return [
                None if values[0] is None else best_of_n(picker, [v or 0.0 for v in values], sizes)
                for picker, values in zip(pickers[name], rule, strict=True)
            ]

        seconds = {
            "start": self._start.seconds,
            "best_of_n": time.perf_counter() - began,
            "processor": time.process_time() - processor,
        }
        return Best(
            settings=settings,
            facts={**self._facts, "date": _now(), "seconds": seconds},
            prompts=prompts,
            sets=[self._prompts.sets[place] for place in places],
            sizes=sizes,
            gold={name: _lists(curves(golds, name)) for name in pickers},
            equal={name: _lists(curves(equals, name)) for name in pickers},
            named={name: _lists(curves(named, name)) for name in pickers},
            correlation={name: _correlations(pickers[name], golds) for name in pickers},
            equal_correlation={name: _correlations(pickers[name], equals) for name in pickers},
            length_correlation={
                name: _correlations(pickers[name], pickers["longest"]) for name in pickers
            },
        )

    def _readings(self) -> list[tuple[str, Callable[..., list[float | None]]]]:
        """The rewards, and the likelihood as a sum, too."""
        found = [(name, _reward(self._work, self._seed, name)) for name in REWARDS]
        folder = self._work.reward(self._seed, "likelihood")
        return [*found, ("likelihood_sum", reward_function(folder, average="sum"))]


def _reward(work: Work, seed: int, name: str) -> Callable[..., list[float | None]]:
    """The reward as trainers call it.

    A likelihood is the mean per token: responses that a policy writes differ in length, unlike
    those of the pairs, and a sum prefers the shortest.
    """
    folder = work.reward(seed, name)
    if name == "likelihood":
        return reward_function(folder, average="mean")
    return reward_function(folder)


def _scored(
    reward: Callable[..., list[float | None]],
    prompts: Sequence[str],
    texts: Sequence[Sequence[str]],
    references: Sequence[str],
) -> list[list[float]]:
    counts = [len(some) for some in texts]
    flat = rewards(
        reward,
        [p for p, n in zip(prompts, counts, strict=True) for _ in range(n)],
        [text for some in texts for text in some],
        [r for r, n in zip(references, counts, strict=True) for _ in range(n)],
    )
    ends = np.cumsum([0, *counts])
    return [flat[a:b] for a, b in itertools.pairwise(ends)]


def _correlations(picker: list[list[float]], rule: list[list[float]]) -> list[float | None]:
    return [rank_correlation(a, b) for a, b in zip(picker, rule, strict=True)]


def _lists(curves: Sequence[Floats | None]) -> list[Any]:
    return [None if curve is None else curve.tolist() for curve in curves]


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.gmtime())


if __name__ == "__main__":
    logging.getLogger("jax._src.xla_bridge").setLevel(logging.WARNING)
    try:
        main(Path(sys.argv[1]))
    except UserError as error:
        distributed.fail(2, f"error: {error}")
