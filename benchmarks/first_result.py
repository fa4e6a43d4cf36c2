"""One side of `benchmarks.loading`: a process that starts, scores a few pairs and ends.

  python -m benchmarks.first_result SIDE STARTED MODEL INPUT OUTPUT

SIDE is ``gram_jax`` or ``transformers``, STARTED the time (of time.time) at which the process was
started. On standard output: a JSON object with ``numbers``, the log-probs in the order of the file,
and ``parts``, the seconds that each part took. Nothing is imported before it is timed.
"""

import json
import sys
import time
from pathlib import Path

_CLOCK = time.time


class Parts:
    """Seconds by part, one after the other, from the start of the process."""

    def __init__(self, started: float):
        self._last, self.seconds = started, dict[str, float]()

    def end(self, name: str) -> None:
        """What came since the last part belongs to this one."""
        now = _CLOCK()
        self.seconds[name], self._last = now - self._last, now


def gram_jax(parts: Parts, model: str, source: str, output: str) -> list[float]:
    """What `python -m gram_jax.score` does, on one device."""
    import jax

    import gram_jax.score  # noqa: F401
    from gram_jax import entry
    from gram_jax.checkpoints import LoadedModel, load_model
    from gram_jax.config import ComputeConfig
    from gram_jax.reward_model import stored_settings
    from gram_jax.scoring_job import ScoringJob, run_job

    parts.end("imports")
    entry.enable_compilation_cache()
    job = ScoringJob(input=source, output=output, reward=stored_settings(model))

    def load() -> LoadedModel:
        parts.end("input")
        loaded = load_model(model, ComputeConfig())
        jax.block_until_ready(loaded.model)
        parts.end("weights")
        return loaded

    result = run_job(job, load)
    parts.end("batch")
    parts.seconds["compile"] = result.summary.compile_seconds
    parts.seconds["batch"] -= result.summary.compile_seconds
    with Path(output).open(encoding="utf-8") as file:
        return [number for line in file for number in json.loads(line)["logprob"]]


def transformers(parts: Parts, model: str, source: str, _: str) -> list[float]:
    """The same pairs in padded batches of four rows."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parts.end("imports")
    with Path(source).open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    tokenizer = AutoTokenizer.from_pretrained(model)
    eos = [tokenizer.eos_token_id]
    pairs = [
        (
            tokenizer(row["prompt"]).input_ids,
            tokenizer(row[name], add_special_tokens=False).input_ids + eos,
        )
        for row in rows
        for name in ("chosen", "rejected")
    ]
    parts.end("input")
    decoder = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    parts.end("weights")
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]) + len(pairs[i][1]))
    numbers = [0.0] * len(pairs)
    for first in range(0, len(order), 4):
        chosen = order[first : first + 4]
        ids = [prompt + response for prompt, response in (pairs[i] for i in chosen)]
        longest = max(map(len, ids))
        tokens = torch.tensor([row + [0] * (longest - len(row)) for row in ids])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids])
        with torch.inference_mode():
            logits = decoder(tokens, attention_mask=mask).logits.log_softmax(-1)
        for k, i in enumerate(chosen):
            prompt, response = pairs[i]
            places = torch.arange(len(prompt) - 1, len(prompt) + len(response) - 1)
            numbers[i] = float(logits[k, places, torch.tensor(response)].sum())
    parts.end("batch")
    return numbers


def _main() -> None:
    side, started, *rest = sys.argv[1:]
    parts = Parts(float(started))
    numbers = {"gram_jax": gram_jax, "transformers": transformers}[side](parts, *rest)
    print(json.dumps({"numbers": numbers, "parts": parts.seconds}))


if __name__ == "__main__":
    _main()
