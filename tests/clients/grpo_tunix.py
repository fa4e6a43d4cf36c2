"""Run where Tunix is, and PyTorch is not: a few steps of its GRPO, with our reward in the process.

Argument: a folder with reward/ (a Hugging Face folder), policy/ (a tokenizer) and cases.json, a
list of {"name", "settings", "rows"}. Prints as JSON what each case's reward function was asked and
answered, and how far the policy moved.
"""

import itertools
import json
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import tunix
from flax import nnx
from transformers import AutoTokenizer
from tunix.models.llama3.model import Llama3, ModelConfig

from gram_jax.clients import reward_function

STEPS, PROMPTS, GENERATIONS = 3, 2, 4
ROLES = (tunix.Role.ACTOR, tunix.Role.REFERENCE, tunix.Role.ROLLOUT)
folder = Path(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
sizes = ModelConfig(
    num_layers=2, vocab_size=len(tokenizer), embed_dim=32, hidden_dim=48, num_heads=4, head_dim=8,
    num_kv_heads=2, rope_theta=10_000, norm_eps=1e-5,
)  # fmt: skip


def policy():
    with jax.set_mesh(mesh):
        return Llama3(sizes, rngs=nnx.Rngs(params=0))


def batches(rows):
    """Columns of `PROMPTS` rows, again and again; a prompt is text, as Tunix's sampler wants it."""
    rows = itertools.cycle(rows)
    for _ in range(STEPS):
        some = list(itertools.islice(rows, PROMPTS))
        names = {"prompt": "prompts"}
        yield {names.get(name, name): np.array([row[name] for row in some]) for name in some[0]}


def train(case):
    reward = reward_function(folder / "reward", **case["settings"])
    calls = []

    def recorded(prompts, completions, **columns):
        rewards = reward(prompts=prompts, completions=completions, **columns)
        asked = {"prompts": list(prompts), "completions": list(completions)}
        if "reference" in columns:
            asked["reference"] = [str(text) for text in columns["reference"]]
        calls.append({**asked, "rewards": rewards})
        return rewards

    recorded.__name__ = reward.__name__
    actor, reference = policy(), policy()
    before = jax.tree.map(np.array, nnx.state(actor, nnx.Param))
    cluster = tunix.RLCluster(
        actor=actor,
        reference=reference,
        tokenizer=tokenizer,
        cluster_config=tunix.ClusterConfig(
            role_to_mesh=dict.fromkeys(ROLES, mesh),
            training_config=tunix.RLTrainingConfig(
                actor_optimizer=optax.sgd(1.0), max_steps=STEPS, eval_every_n_steps=100,
                mini_batch_size=PROMPTS, train_micro_batch_size=PROMPTS,
            ),
            rollout_config=tunix.RolloutConfig(
                max_tokens_to_generate=16, max_prompt_length=64, kv_cache_size=96,
            ),
        ),
    )  # fmt: skip
    settings = tunix.GRPOConfig(num_generations=GENERATIONS, beta=0.04)
    tunix.GRPOLearner(cluster, settings, reward_fns=recorded).train(batches(case["rows"]))
    after = jax.tree.map(np.array, nnx.state(actor, nnx.Param))
    moves = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), before, after)
    return {"name": recorded.__name__, "calls": calls, "moved": max(jax.tree.leaves(moves))}


auto = (jax.sharding.AxisType.Auto,) * 2
mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=auto)
found = {case["name"]: train(case) for case in json.loads((folder / "cases.json").read_text())}
print()
print(json.dumps({"version": tunix.__version__, "torch": "torch" in sys.modules, "found": found}))
