"""Run where TRL is: a few steps of GRPO by TRL's GRPOTrainer for each case, with our reward.

Argument: a folder with policy/ (a Hugging Face folder) and cases.json, a list of {"name", "source",
"settings", "rows"}, where rows have a prompt and further columns. Prints as JSON what each case's
reward function was asked and answered, and what the trainer logged.
"""

import json
import sys
from pathlib import Path

import torch
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from gram_jax.clients import reward_function

torch.set_num_threads(1)
folder = Path(sys.argv[1])


def train(case):
    reward = reward_function(case["source"], **case["settings"])
    calls = []

    def recorded(prompts, completions, **columns):
        rewards = reward(prompts=prompts, completions=completions, **columns)
        asked = {"prompts": prompts, "completions": completions}
        asked |= {k: v for k, v in columns.items() if k == "reference"}
        calls.append({**asked, "rewards": rewards})
        return rewards

    recorded.__name__ = reward.__name__
    trainer = trl.GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(folder / "policy"),
        reward_funcs=recorded,
        train_dataset=Dataset.from_list(case["rows"]),
        args=trl.GRPOConfig(
            output_dir=str(folder / case["name"]), max_steps=3, per_device_train_batch_size=8,
            num_generations=4, max_completion_length=16, learning_rate=1e-3, use_cpu=True,
            bf16=False, gradient_checkpointing=False, report_to="none", save_strategy="no",
            logging_steps=1, disable_tqdm=True, seed=1,
        ),
    )  # fmt: skip
    before = torch.cat([p.detach().flatten().clone() for p in trainer.model.parameters()])
    trainer.train()
    after = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    steps = [entry for entry in trainer.state.log_history if "reward" in entry]
    moved = float((after - before).abs().max())
    return {"name": recorded.__name__, "calls": calls, "steps": steps, "moved": moved}


found = {case["name"]: train(case) for case in json.loads((folder / "cases.json").read_text())}
print()
print(json.dumps({"version": trl.__version__, "found": found}))
