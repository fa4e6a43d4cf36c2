"""Scoring prompt-response pairs of mixed lengths: gram_jax beside transformers.

  python -m benchmarks.scoring [--data=FOLDER] [--shape=56M] [--small]

Real text, no prompt twice, so nothing can be shared; what differs is how lengths are handled and
what is computed of the vocabulary. gram_jax: `Scorer`, from texts to numbers. The peer: token ids
to numbers, sorted by length, padded, batches of the size that is quickest; ``plain`` takes the
logits of all tokens, ``careful`` those of the response. Counted are the tokens of the pairs,
without padding.
"""

from __future__ import annotations

from absl import flags

from benchmarks import workloads
from benchmarks.answering import measure
from benchmarks.command import is_small, setting
from benchmarks.harness import say
from gram_jax import entry
from gram_jax.encoding import Encoder

_SHAPE = flags.DEFINE_enum("shape", "56M", ["56M", "301M"], "The model.")
_TOKENS = flags.DEFINE_integer("tokens", 0, "Tokens to score; 0 = 4000 for 56M, 1200 for 301M.")

TARGET = 2.5
# The larger model takes so long that what no target is about is left out.
_VARIANTS = {"56M": ("plain", "careful"), "301M": ("plain",)}


def main(_: list[str]) -> None:
    """Measures, prints and writes."""
    shape = _SHAPE.value
    tokens = 600 if is_small() else _TOKENS.value or {"56M": 4000, "301M": 1200}[shape]
    with setting(shape) as s:
        encoder = Encoder(
            tokenizer=s.tokenizer, reading="likelihood", max_length=s.config.max_position
        )
        asked = workloads.separate_pairs(s.data, encoder, tokens)
        work = workloads.num_tokens(asked)
        say(f"{len(asked)} pairs, {work:,} tokens")
        case = shape, f"{len(asked)} pairs of {work:,} tokens, each prompt once"
        name = "scoring" if shape == "56M" else f"scoring_{shape}"
        measure(name, s, asked, case, variants=_VARIANTS[shape], goal=TARGET, half=shape == "56M")


if __name__ == "__main__":
    entry.run(main, one_process=True)
