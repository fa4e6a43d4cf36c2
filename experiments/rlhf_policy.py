"""A policy in Tunix: loaded from a Hugging Face folder of ours, sampled, and measured.

Runs where Tunix is (`experiments.rlhf` starts it there).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from numpy.typing import NDArray
from transformers import AutoTokenizer
from tunix.generate.sampler import CacheConfig, Sampler
from tunix.models.llama3.model import Llama3, ModelConfig
from tunix.models.llama3.params import create_model_from_safe_tensors
from tunix.rl import common
from tunix.rl.rollout.vanilla_rollout import VanillaRollout

from experiments.rlhf_settings import Sizes
from gram_jax.checkpoints import load_model
from gram_jax.config import ComputeConfig
from gram_jax.evaluation import Floats
from gram_jax.rows import Batch

PARITY = 1e-4
"""Largest difference between our logits and Tunix's, float32."""
BATCH = 64
"""Responses that are written at once, whatever for: one shape, compiled once."""

Ints = NDArray[np.int32]


def make_mesh() -> Any:
    """One device, with the axes that Tunix's models name."""
    auto = (jax.sharding.AxisType.Auto,) * 2
    return jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=auto)


def load_policy(folder: Path, mesh: Any) -> Llama3:
    """The model of a folder that `gram_jax.export` wrote, by Tunix's own loader."""
    shape = load_model(folder, ComputeConfig()).model.config
    config = ModelConfig(
        num_layers=shape.num_layers,
        vocab_size=shape.vocab_size,
        embed_dim=shape.hidden_size,
        hidden_dim=shape.intermediate_size,
        num_heads=shape.num_heads,
        head_dim=shape.head_dim,
        num_kv_heads=shape.num_kv_heads,
        rope_theta=int(shape.rope_theta),
        norm_eps=shape.norm_eps,
    )
    return create_model_from_safe_tensors(str(folder), config, mesh)


def check_parity(folder: Path, policy: Llama3, texts: Sequence[str]) -> float:
    """The largest difference between our logits and Tunix's on some texts.

    Raises:
      RuntimeError: it is above `PARITY`: the two are not the same model.
    """
    ours = load_model(folder, ComputeConfig(dtype="float32"))
    worst = 0.0
    for text in texts:
        tokens = np.array([ours.tokenizer.encode_prompt(text)], np.int32)
        places = np.arange(tokens.shape[1], dtype=np.int32)[None]
        batch = Batch(
            tokens=tokens,
            positions=places,
            segment_ids=np.ones_like(tokens),
            branch_ids=np.zeros_like(tokens),
        )
        expected = jnp.einsum("btd,vd->btv", ours.model(batch), ours.model.unembedding_vd())
        causal = jnp.tril(jnp.ones((1, tokens.shape[1], tokens.shape[1]), bool))
        found, _ = policy(jnp.asarray(tokens), jnp.asarray(places), None, causal)
        worst = max(worst, float(jnp.abs(found - expected).max()))
    if not worst <= PARITY:
        raise RuntimeError(f"{folder}: Tunix's logits differ from ours by {worst:.2e}")
    return worst


@dataclasses.dataclass(frozen=True, slots=True)
class Written:
    """What a policy wrote, n responses.

    Attributes:
      texts: [n], without the end token.
      tokens: [n, P + C], prompts padded on the left, responses on the right.
      finished: [n], whether the response ended by itself.
    """

    texts: list[str]
    tokens: Ints
    finished: NDArray[np.bool_]


class Writer:
    """Samples of policies of one shape, at temperature 1, and their KL from one another."""

    def __init__(self, folder: Path, policy: Llama3, sizes: Sizes) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self._sizes = sizes
        config = policy.config
        self.sampler = Sampler(
            policy,
            self.tokenizer,
            CacheConfig(
                cache_size=sizes.prompt_tokens + sizes.response_tokens,
                num_layers=config.num_layers,
                num_kv_heads=config.num_kv_heads,
                head_dim=config.head_dim,
            ),
        )
        self._kl = jax.jit(self._kl_of_batch)

    def write(self, policy: Llama3, prompts: Sequence[str], seed: int) -> Written:
        """One response to each prompt; the same seed gives the same."""
        self.sampler.transformer_state = nnx.variables(policy)
        texts: list[str] = []
        tokens, ended = [], list[bool]()
        for number, start in enumerate(range(0, len(prompts), BATCH)):
            some = list(prompts[start : start + BATCH])
            output = self.sampler(
                some + some[:1] * (BATCH - len(some)),
                max_generation_steps=self._sizes.response_tokens,
                max_prompt_length=self._sizes.prompt_tokens,
                temperature=1.0,
                top_p=1.0,
                top_k=None,
                seed=jax.random.fold_in(jax.random.key(seed), number),
            )
            written = [self.with_end(ids) for ids in output.tokens[: len(some)]]
            after = np.full((len(some), self._sizes.response_tokens), self.tokenizer.pad_token_id)
            for row, ids in zip(after, written, strict=True):
                row[: len(ids)] = ids
            before = np.asarray(output.padded_prompt_tokens)[: len(some)]
            texts += output.text[: len(some)]
            tokens.append(np.concatenate([before, after], axis=1))
            ended += [ids[-1:] == [self.tokenizer.eos_token_id] for ids in written]
        return Written(texts, np.concatenate(tokens).astype(np.int32), np.array(ended))

    def with_end(self, ids: Sequence[int]) -> list[int]:
        """The tokens of a response with the end token, which Tunix's sampler leaves out.

        One that was cut off has none.
        """
        end = [self.tokenizer.eos_token_id] if len(ids) < self._sizes.response_tokens else []
        return [*map(int, ids), *end]

    def kl(self, policy: Llama3, start: Llama3, written: Written) -> Floats:
        """KL of the policy from the start over each response, [n], nats.

        At each token of a response that the policy wrote, the KL of the two distributions of the
        next token, summed over the response: its mean over responses is the KL of the policies,
        with less noise than that of the log-prob ratios (Rao-Blackwell).
        """
        graph, of_policy = nnx.split(policy)
        of_start = nnx.split(start)[1]
        found = []
        n = len(written.tokens)
        for begin in range(0, n, BATCH):
            part = written.tokens[begin : begin + BATCH]
            full = np.concatenate([part, np.repeat(part[:1], BATCH - len(part), axis=0)])
            found.append(np.asarray(self._kl(graph, of_policy, of_start, full))[: len(part)])
        return np.concatenate(found).astype(np.float64)

    def _kl_of_batch(self, graph: Any, policy: Any, start: Any, tokens_bt: jax.Array) -> jax.Array:
        there = tokens_bt != self.tokenizer.pad_token_id
        positions = common.build_positions_from_mask(there)
        mask = common.make_causal_attn_mask(there)
        logp, logq = (
            jax.nn.log_softmax(nnx.merge(graph, s)(tokens_bt, positions, None, mask)[0])
            for s in (policy, start)
        )
        kl_bt = (jnp.exp(logp) * (logp - logq)).sum(axis=-1)
        # The token after the last one of the prompt is the first one of the response.
        first = self._sizes.prompt_tokens
        return (kl_bt[:, first - 1 : -1] * there[:, first:]).sum(axis=1)


class Rollout(VanillaRollout):
    """Rollouts of GRPO by a `Writer`'s sampler, with the end token of each response.

    Tunix's own give responses without it, so that a policy would not learn when to stop.
    """

    def __init__(self, rollout_actor: Llama3, writer: Writer, **unused: Any) -> None:
        # One sampler for all runs: it is compiled once.
        self._sampler, self._writer, self._actor = writer.sampler, writer, rollout_actor

    def generate(self, prompts: list[str], rollout_config: Any, **more: Any) -> Any:
        """As Tunix's; the actor's weights are those of this moment."""
        self._sampler.transformer_state = nnx.variables(self._actor)
        output = super().generate(prompts, rollout_config, **more)
        tokens = [np.array(self._writer.with_end(ids)) for ids in output.tokens]
        return dataclasses.replace(output, tokens=tokens)

    def model(self) -> Llama3:
        """The actor itself: there are no weights to bring to another place."""
        return self._actor
