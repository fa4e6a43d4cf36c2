"""What a run of `experiments.rlhf` is made of: sizes, and where its files lie."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

REWARDS = {"likelihood": "smoothed_pairwise", "judge": "judge", "bradley_terry": "bradley_terry"}
"""By name of the reward, the objective of its stage 2."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How much of everything.

    Attributes:
      vocabulary, hidden, layers: shape of all models: rewards and policies.
      texts: to pretrain on, of those there are.
      pretrain_steps: of stage 1, of 2 rows of 256 tokens.
      pairs: of stage 2, each read once, in steps of 6 rows of 512 tokens.
      pairs_per_kind: of each kind of damage, in each of two held-out sets, to test rewards on.
      prompt_tokens, response_tokens: the longest prompts used, and where a response is cut off.
      steps, step_prompts, generations: of GRPO: steps, prompts of each, responses to each.
      learning_rate, kl_weight: of GRPO: AdamW's rate; beta, the weight of the KL in its loss.
      check_every: steps between checks of the policy on held-out prompts.
      check_prompts, check_samples: held-out prompts, half of them of packages never seen, and
        responses to each.
      best_prompts, best_samples: of best of N: prompts, the first of each half, and responses.
    """

    vocabulary: int = 2048
    hidden: int = 128
    layers: int = 4
    texts: int = 12_000
    pretrain_steps: int = 1200
    pairs: int = 3000
    pairs_per_kind: int = 60
    prompt_tokens: int = 48
    response_tokens: int = 64
    steps: int = 20
    step_prompts: int = 8
    generations: int = 8
    learning_rate: float = 1.5e-4
    kl_weight: float = 0.04
    check_every: int = 5
    check_prompts: int = 96
    check_samples: int = 2
    best_prompts: int = 48
    best_samples: int = 64

    @property
    def best_sizes(self) -> list[int]:
        """N = 1, 2, 4 and so on."""
        return [2**k for k in range(self.best_samples.bit_length())]


SMALL = Sizes(
    vocabulary=320,
    hidden=32,
    layers=1,
    texts=200,
    pretrain_steps=4,
    pairs=40,
    pairs_per_kind=4,
    response_tokens=12,
    steps=2,
    step_prompts=2,
    generations=2,
    learning_rate=0.03,
    check_every=1,
    check_prompts=4,
    check_samples=2,
    best_prompts=2,
    best_samples=4,
)
"""Only whether it runs."""


@dataclasses.dataclass(frozen=True, slots=True)
class Work:
    """Where models and texts lie, below one folder; results lie elsewhere."""

    root: Path

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def text(self) -> Path:
        return self.data / "stage_1.jsonl"

    @property
    def pairs(self) -> Path:
        return self.data / "stage_2.jsonl"

    @property
    def tokenizer(self) -> Path:
        return self.root / "tokenizer"

    @property
    def prompts(self) -> Path:
        return self.root / "prompts.json"

    def rows(self, name: str) -> Path:
        """Packed rows, the same for all seeds."""
        return self.root / "rows" / name

    def pretrained(self, seed: int) -> Path:
        return self.root / f"seed{seed}" / "pretrain"

    def policy(self, seed: int) -> Path:
        """The Hugging Face folder of the model that a policy starts as."""
        return self.root / f"seed{seed}" / "policy"

    def reward(self, seed: int, name: str) -> Path:
        return self.root / f"seed{seed}" / name

    def accuracy(self, seed: int, name: str) -> Path:
        """What a reward gets right of held-out pairs."""
        return self.root / f"seed{seed}" / f"{name}_accuracy.json"

    def start(self, seed: int) -> Path:
        """What the policy of a seed writes before it is trained."""
        return self.root / f"seed{seed}" / "start.json"


def policy_seed(seed: int, seeds: int) -> int:
    """Which pretrained model the policy of a seed starts as: never that of its rewards."""
    return (seed + 1) % max(seeds, 2)


_OF_GRPO = (
    "steps", "step_prompts", "generations", "learning_rate", "kl_weight", "check_every",
    "check_samples",
)  # fmt: skip
_OF_BEST = ("best_prompts", "best_samples")


def described(sizes: Sizes, seed: int, seeds: int, what: str) -> dict[str, Any]:
    """All that decides a result, to be compared with what a file says it was made with."""
    others = _OF_BEST if what in REWARDS else _OF_GRPO
    decisive = {k: v for k, v in dataclasses.asdict(sizes).items() if k not in others}
    return {"what": what, "seed": seed, "policy_seed": policy_seed(seed, seeds), **decisive}
