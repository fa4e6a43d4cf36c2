"""Scoring several responses to each prompt: gram_jax beside transformers.

  python -m benchmarks.shared_prefix [--data=FOLDER] [--small]

8 responses of 128 tokens on average (64 to 192) to prompts of 256 tokens, pieces of real text,
56M parameters, float32. gram_jax computes a prompt once for its responses; the peer computes each
response with its prompt, as evaluation harnesses do. Counted are the tokens of prompt + response
over all responses, which is what the peer computes, without padding.
"""

from __future__ import annotations

from benchmarks import workloads
from benchmarks.answering import measure
from benchmarks.command import is_small, setting
from benchmarks.harness import say
from gram_jax import entry
from gram_jax.encoding import Encoder

TARGET = 5.0
PROMPTS, PROMPT, RESPONSES, RESPONSE = 2, 256, 8, 128


def main(_: list[str]) -> None:
    """Measures, prints and writes."""
    prompts, prompt, response = (2, 32, 16) if is_small() else (PROMPTS, PROMPT, RESPONSE)
    with setting("56M") as s:
        encoder = Encoder(
            tokenizer=s.tokenizer, reading="likelihood", max_length=s.config.max_position
        )
        asked = workloads.best_of(
            s.data, encoder, prompts, prompt=prompt, responses=RESPONSES, response=response
        )
        work = workloads.num_tokens(asked)
        say(f"{prompts} prompts, {work:,} tokens")
        what = (
            f"{prompts} prompts x {RESPONSES} responses, {work:,} tokens with each prompt"
            f" {RESPONSES} times"
        )
        variants = ("plain", "careful")
        measure("shared_prefix", s, asked, ("56M", what), variants=variants, goal=TARGET)


if __name__ == "__main__":
    entry.run(main, one_process=True)
