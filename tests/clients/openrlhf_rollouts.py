"""Run where OpenRLHF is: rewards of rollouts, asked for by its own code.

Arguments: a folder with policy/ and rollouts.json {"prompts", "labels"}; the addresses of reward
servers. OpenRLHF generates by vLLM, which needs a GPU; here transformers samples in its place, and
all else is OpenRLHF's. Prints as JSON the query and the reward of each rollout.
"""

import asyncio
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from openrlhf.utils.agent import SingleTurnAgentExecutor
from transformers import AutoModelForCausalLM, AutoTokenizer

torch.set_num_threads(1)
folder, *urls = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(Path(folder) / "policy", dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(Path(folder) / "policy")
given = json.loads((Path(folder) / "rollouts.json").read_text())


class Sampler:
    """What the executor calls of vLLM."""

    async def generate(self, prompt_token_ids, sampling_params, multi_modal_data=None):
        prompt = torch.tensor([prompt_token_ids])
        with torch.inference_mode():
            written = model.generate(
                prompt, attention_mask=torch.ones_like(prompt), do_sample=True,
                max_new_tokens=sampling_params.max_tokens, pad_token_id=tokenizer.eos_token_id,
            )  # fmt: skip
        ids = written[0, prompt.shape[1] :].tolist()
        one = SimpleNamespace(
            token_ids=ids, text=tokenizer.decode(ids), logprobs=None,
            finish_reason="stop" if ids[-1] == tokenizer.eos_token_id else "length",
        )  # fmt: skip
        return SimpleNamespace(outputs=[one])


async def roll_out():
    executor = SingleTurnAgentExecutor([f"{url}/get_reward" for url in urls])
    sampling = SimpleNamespace(max_tokens=12, logprobs=None)
    calls = [
        executor.execute(prompt, label, sampling, 256, tokenizer, Sampler())
        for prompt, label in zip(given["prompts"], given["labels"], strict=True)
    ]
    return await asyncio.gather(*calls)


torch.manual_seed(0)
found = asyncio.run(roll_out())
queries = [tokenizer.decode(one["observation_tokens"]) for one in found]
print()
print(json.dumps([
    {"query": query, "reward": one["reward"], "scores": one["scores"], "logs": one["extra_logs"]}
    for query, one in zip(queries, found, strict=True)
]))  # fmt: skip
