"""A judge that compares two responses in both orders: gram_jax beside transformers.

  python -m benchmarks.judge [--data=FOLDER] [--small]

Judge prompts of about 1,000 tokens of gram_jax's own template: a question of 256 tokens and two
responses of 280 on average, pieces of real text; 56M parameters, float32. Of each order the
difference of the two labels' logits is wanted. gram_jax computes what both orders have in common,
up to the first response, once. The peer computes each order in full: ``careful`` with
``logits_to_keep=1``, which is what the target is about, ``plain`` with the logits of all tokens.
Counted are the tokens of both judge prompts, without padding.
"""

from __future__ import annotations

from benchmarks import workloads
from benchmarks.answering import measure
from benchmarks.command import is_small, setting
from benchmarks.harness import say
from gram_jax import entry
from gram_jax.data.judge import JudgeTemplate, label_ids
from gram_jax.encoding import Encoder

TARGET = 1.5
COMPARISONS, QUESTION, RESPONSE = 5, 256, 280


def main(_: list[str]) -> None:
    """Measures, prints and writes."""
    count, question, response = (2, 32, 16) if is_small() else (COMPARISONS, QUESTION, RESPONSE)
    with setting("56M") as s:
        template = JudgeTemplate.load()
        encoder = Encoder(
            tokenizer=s.tokenizer,
            reading="judge",
            max_length=s.config.max_position,
            template=template,
        )
        asked = workloads.comparisons(s.data, encoder, count, question=question, response=response)
        mean = workloads.num_tokens(asked) / (2 * count)
        say(f"{count} comparisons, judge prompts of {mean:.0f} tokens on average")
        what = f"{count} comparisons in both orders, judge prompts of {mean:.0f} tokens on average"
        measure(
            "judge",
            s,
            asked,
            ("56M", what),
            variants=("careful", "plain"),
            goal=TARGET,
            reading="judge",
            labels=label_ids(template, s.tokenizer),
        )


if __name__ == "__main__":
    entry.run(main, one_process=True)
