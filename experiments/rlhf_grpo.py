"""One policy trained by Tunix's GRPO against one reward, and checked on held-out prompts meanwhile.

Runs where Tunix is (`experiments.rlhf` starts it there).
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import optax
import tunix
from tunix.models.llama3.model import Llama3

from experiments.rlhf_gold import Chrf, parameters_named
from experiments.rlhf_policy import Rollout, Writer
from experiments.rlhf_results import Check
from experiments.rlhf_settings import Sizes

ROLES = (tunix.Role.ACTOR, tunix.Role.REFERENCE, tunix.Role.ROLLOUT)
_SHOWN = 6
"""Prompts whose first response is kept."""

RewardOf = Callable[..., list[float | None]]


@dataclasses.dataclass(frozen=True, slots=True)
class Asked:
    """Objects to write about, with what the judge compares with.

    Attributes:
      prompts, references: [n], texts; a reference is what the policy wrote before training.
    """

    prompts: list[str]
    references: list[str]


class Checker:
    """Checks of policies on the held-out prompts, each with the same random numbers."""

    def __init__(
        self, asked: Asked, truths: Sequence[str], writer: Writer, start: Llama3, sizes: Sizes
    ) -> None:
        self._asked, self._writer, self._start, self._sizes = asked, writer, start, sizes
        self._gold = [Chrf(truth) for truth in truths]

    def check(self, policy: Llama3, step: int, reward: RewardOf, seed: int) -> Check:
        """What the policy writes, and what the reward and the gold rules say of it."""
        samples = self._sizes.check_samples
        prompts = [prompt for prompt in self._asked.prompts for _ in range(samples)]
        references = [text for text in self._asked.references for _ in range(samples)]
        written = self._writer.write(policy, prompts, seed)
        proxy = rewards(reward, prompts, written.texts, references)
        kl = self._writer.kl(policy, self._start, written)

        def by_prompt(values: Sequence[Any]) -> list[list[Any]]:
            return [list(values[i : i + samples]) for i in range(0, len(values), samples)]

        texts = by_prompt(written.texts)
        named = [
            [parameters_named(prompt, text) for text in some]
            for prompt, some in zip(self._asked.prompts, texts, strict=True)
        ]
        return Check(
            step=step,
            kl=kl.reshape(-1, samples).mean(axis=1).tolist(),
            gold=[[g(text) for text in some] for g, some in zip(self._gold, texts, strict=True)],
            equal=[
                [g.at_equal_length(text) for text in some]
                for g, some in zip(self._gold, texts, strict=True)
            ],
            named=[None if each[0] is None else [float(v or 0.0) for v in each] for each in named],
            proxy=by_prompt(proxy),
            characters=[[len(text) for text in some] for some in texts],
            finished=by_prompt(written.finished.astype(int).tolist()),
            texts=[some[0] for some in texts[:_SHOWN]],
        )


def rewards(
    reward: RewardOf, prompts: Sequence[str], texts: Sequence[str], references: Sequence[str]
) -> list[float]:
    """Rewards of texts; 0 for those of a prompt whose texts are all blank."""
    found = reward(prompts=list(prompts), completions=list(texts), reference=list(references))
    return [0.0 if value is None else float(value) for value in found]


@dataclasses.dataclass
class Trained:
    """What came out of a run of GRPO; seconds of training and of the checks."""

    checks: list[Check]
    steps: list[dict[str, float]]
    grpo_seconds: float
    check_seconds: float


def train(
    actor: Llama3,
    reference: Llama3,
    asked: Asked,
    reward: RewardOf,
    checker: Checker,
    writer: Writer,
    mesh: Any,
    sizes: Sizes,
    seed: int,
) -> Trained:
    """Trains ``actor`` in place, one step after the other, with a check every so many steps.

    Args:
      asked: the prompts to train on, ``sizes.step_prompts`` a step.
      reference: another copy of the actor, for the KL in the loss.
    """
    done = Trained([], [], 0.0, 0.0)

    def recorded(prompts: Any, completions: Any, **columns: Any) -> list[float]:
        found = rewards(reward, list(prompts), list(completions), list(columns["reference"]))
        done.steps.append({"mean": float(np.mean(found)), "sd": float(np.std(found))})
        return found

    rollout = tunix.RolloutConfig(
        max_tokens_to_generate=sizes.response_tokens,
        max_prompt_length=sizes.prompt_tokens,
        kv_cache_size=sizes.prompt_tokens + sizes.response_tokens,
        temperature=1.0,
        top_p=1.0,
        top_k=None,
    )
    cluster = tunix.RLCluster(
        actor=actor,
        reference=reference,
        tokenizer=writer.tokenizer,
        cluster_config=tunix.ClusterConfig(
            role_to_mesh=dict.fromkeys(ROLES, mesh),
            training_config=tunix.RLTrainingConfig(
                actor_optimizer=optax.adamw(sizes.learning_rate, b2=0.98, weight_decay=0.0),
                max_steps=sizes.steps,
                eval_every_n_steps=10 * sizes.steps,
                mini_batch_size=sizes.step_prompts,
                train_micro_batch_size=sizes.step_prompts,
            ),
            rollout_engine=functools.partial(Rollout, writer=writer),
            rollout_config=rollout,
        ),
    )

    def check(step: int) -> None:
        began = time.perf_counter()
        policy = cluster.actor_trainer.model
        done.checks.append(checker.check(policy, step, reward, seed))
        done.check_seconds += time.perf_counter() - began
        last = done.checks[-1]
        print(
            f"  step {step}: KL {np.mean(last.kl):.2f}, reward {np.mean(last.proxy):.3f},"
            f" chrF {np.mean(last.gold):.4f}, {np.mean(last.characters):.0f} characters",
            flush=True,
        )

    def batches() -> Iterator[dict[str, Any]]:
        """The columns of each step. Tunix asks for the next once it has trained on the last."""
        for step in range(sizes.steps):
            if cluster.actor_trainer.train_steps != step:
                raise RuntimeError(
                    f"asked for step {step + 1} after {cluster.actor_trainer.train_steps} steps"
                )
            if step % sizes.check_every == 0:
                check(step)
            # Left alone, every step would be sampled with the same random numbers.
            rollout.seed = jax.random.fold_in(jax.random.key(seed), step)
            some = slice(step * sizes.step_prompts, (step + 1) * sizes.step_prompts)
            yield {
                "prompts": np.array(asked.prompts[some]),
                "reference": np.array(asked.references[some]),
            }

    began = time.perf_counter()
    settings = tunix.GRPOConfig(num_generations=sizes.generations, beta=sizes.kl_weight)
    tunix.GRPOLearner(cluster, settings, reward_fns=recorded).train(batches())
    if cluster.actor_trainer.train_steps != sizes.steps:
        raise RuntimeError(f"{cluster.actor_trainer.train_steps} steps of {sizes.steps} were made")
    done.grpo_seconds = time.perf_counter() - began - done.check_seconds
    check(sizes.steps)
    return done
