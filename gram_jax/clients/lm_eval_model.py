"""A CHECKPOINT as a language model of lm-evaluation-harness, by the name ``gram_jax``.

Importing this module registers it; `gram_jax.clients.harness` is the harness's command with it.
Log-probs only: ``loglikelihood`` and ``loglikelihood_rolling``. Context and continuation are
tokenised together, as the harness asks of every model, and cut from the left.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from gram_jax.checkpoints import load_model
from gram_jax.config import ComputeConfig
from gram_jax.data.prompts import apply_chat_template
from gram_jax.encoding import BlockBuilder
from gram_jax.errors import UserError
from gram_jax.mesh import make_mesh, parse_mesh
from gram_jax.rows import IntArray
from gram_jax.scorer import RewardSettings, Scorer
from gram_jax.scoring import Running

_LENGTH = 8192
"""Most tokens of context and continuation where nothing else is said."""
_WINDOW_TOKENS = 1 << 20
"""Tokens that are packed together."""

_log = logging.getLogger(__name__)


@register_model("gram_jax")
class GramJaxLM(TemplateLM):  # type: ignore[misc]
    """Log-probs of a decoder of ours.

    Requests with the same context share its computation. How many are computed at once follows from
    their lengths, so the harness's ``batch_size`` is not used; its ``device`` neither: JAX finds
    the devices.
    """

    def __init__(
        self,
        checkpoint: str,
        max_length: int = 0,
        dtype: str = "auto",
        mesh: str = "",
        batch_size: Any = None,
        max_batch_size: Any = None,
        device: Any = None,
    ) -> None:
        """Loads the model.

        Args:
          checkpoint: a CHECKPOINT folder of a decoder.
          max_length: most tokens that the model reads at once. 0 = its positions, at most 8192.
          dtype: of matrix products: ``auto``, ``float32`` or ``bfloat16``.
          mesh: how devices share the work, as in the flag ``--mesh``.

        Raises:
          UserError: there is no such folder, or the model has no log-probs.
        """
        super().__init__()
        devices = make_mesh(parse_mesh(mesh)) if len(jax.devices()) > 1 or mesh else None
        loaded = load_model(checkpoint, ComputeConfig(dtype=dtype), devices)
        length = int(max_length) or min(loaded.model.config.max_position, _LENGTH)
        settings = RewardSettings(reading="likelihood", max_length=length)
        self._scorer = Scorer(loaded, settings, devices)
        self.tokenizer = loaded.tokenizer
        self.max_length = length
        self._name = f"{Path(checkpoint).name}-{loaded.tokenizer.fingerprint()[:12]}"

    @property
    def eot_token_id(self) -> int:
        return self._required(self.tokenizer.eos_id)

    @property
    def prefix_token_id(self) -> int:
        """Stands before a text without context."""
        bos = self.tokenizer.bos_id
        return self._required(self.tokenizer.eos_id if bos is None else bos)

    @property
    def tokenizer_name(self) -> str:
        """Names what the harness caches of this tokenizer."""
        return self._name

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Ids of a text, with what the tokenizer puts before texts unless it is there already."""
        if add_special_tokens is False:
            return self.tokenizer.encode_response(string, add_eos=False)
        return self.tokenizer.encode_prompt(string)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Chat messages as text, to be continued by the assistant.

        Raises:
          UserError: the template cannot do it, or the last message is to be continued.
        """
        if not add_generation_prompt:
            raise UserError(
                "a task with gen_prefix continues an assistant's message, which gram_jax does not"
                " do; leave --apply_chat_template out for it"
            )
        return apply_chat_template(chat_history, self.tokenizer, add_generation_prompt=True)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Log-prob of each text; a long one is read in windows that do not overlap."""
        windows: list[tuple[None, list[int], list[int]]] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            (text,) = request.args
            cut = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for window in cut:
                windows.append((None, *make_disjoint_window(window)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for number, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[number] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Always raises UserError: a reward model does not write."""
        raise UserError(
            "gram_jax gives log-probs and does not generate, so it cannot do tasks of the output"
            " type generate_until; export the model (python -m gram_jax.export) and use --model=hf"
        )

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """(sum of the continuation's log-probs, each is the likeliest token), one a request."""
        cut = 0
        sequences: list[tuple[IntArray, IntArray]] = []
        for text, context, continuation in requests:
            # The model never reads the last token.
            most = self.max_length + 1 - len(continuation)
            if not continuation or most < 1:
                what = "has no tokens of its own" if not continuation else "is too long"
                raise UserError(
                    f"the continuation {text[1] if text else ''!r} {what} ({len(continuation)}"
                    f" tokens, max_length={self.max_length})"
                )
            cut += len(context) > most
            sequences.append((_array(context[-most:]), _array(continuation)))
        if cut:
            _log.warning(
                "%d of %d contexts were cut from the left to %d tokens with their continuation",
                cut, len(requests), self.max_length,
            )  # fmt: skip
        found = list(self._read(sequences))
        for request, answer in zip(requests, found, strict=True):
            if request[0] is not None:
                self.cache_hook.add_partial("loglikelihood", request[0], answer)
        return found

    def _read(self, sequences: Iterable[tuple[IntArray, IntArray]]) -> Iterable[tuple[float, bool]]:
        builder, places, first = BlockBuilder(), list[tuple[int, int]](), True
        for prompt, continuation in sequences:
            places += builder.add([(prompt, continuation)])
            if builder.placed >= _WINDOW_TOKENS:
                yield from self._read_block(builder, places, first)
                builder, places, first = BlockBuilder(), [], False
        if places:
            yield from self._read_block(builder, places, first)

    def _read_block(
        self, builder: BlockBuilder, places: list[tuple[int, int]], first: bool
    ) -> Iterable[tuple[float, bool]]:
        running = Running(builder.examples(), self._scorer.shapes, first=first)
        for scores in self._scorer.run(running.batches, per_token=True):
            running.add(scores)
        for place in places:
            scored = running[place]
            assert scored.token_logprobs is not None
            yield float(np.sum(scored.token_logprobs, dtype=np.float64)), bool(scored.greedy)

    def _required(self, token_id: int | None) -> int:
        if token_id is None:
            raise UserError(
                "the tokenizer has neither BOS nor EOS, and the harness asks for one to begin texts"
            )
        return token_id


def _array(ids: Sequence[int]) -> IntArray:
    return np.asarray(ids, np.int32)
