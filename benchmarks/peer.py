"""The peer's side: transformers and PyTorch, float32, as a good user would write it.

Scoring sorts by length and pads batches of a number of tokens on the right; the number is the one
that is quickest on this machine, found during the warm-up. ``plain`` takes the model's logits, as
evaluation harnesses and preference trainers do. ``careful`` unembeds only what is needed.
``bfloat16`` is one of them with weights and activations in it; training keeps its weights in
float32 (autocast).
"""

from __future__ import annotations

import contextlib
import copy
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn import functional

from benchmarks import peak, workloads
from benchmarks.harness import BFLOAT16

Found = tuple[list[float], dict[str, Any]]
Sequence = tuple[list[int], list[int]]

BATCH_TOKENS = (512, 1024, 2048)
"""Tokens of a batch, padding included, that are tried."""
_TRIAL_TOKENS = 2048


class _Peer:
    """What all of them share: the model, and the peak."""

    compile_seconds = 0.0

    def __init__(self, model: str):
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        transformers.utils.logging.disable_progress_bar()
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.float32, attn_implementation="sdpa"
        )

    def peak(self, size: int) -> Found:
        """Measures the peak with PyTorch, in float32 and in bfloat16.

        The latter on small matrices first: without instructions for it, it is a hundred times
        slower.
        """

        def measure(size: int, dtype: torch.dtype) -> float:
            left, right = torch.randn((2, size, size)).to(dtype)

            def products() -> None:
                x = left
                for _ in range(peak.PRODUCTS):
                    x = x @ right / size

            return peak.measure(products, size)

        plain, half = measure(size, torch.float32), measure(size // 8, torch.bfloat16)
        return [plain, measure(size, torch.bfloat16) if half > plain else half], {}


class Scoring(_Peer):
    """Log-probs of responses, or the two labels' logits after a judge prompt."""

    def __init__(self, *, model: str, questions: str, labels: list[int], half: str):
        """Args: labels: the judge's two; empty where responses are scored. half: the variant that
        is meant by ``bfloat16``."""
        super().__init__(model)
        self.model.eval()
        self._float32, self._bfloat16 = self.model, copy.deepcopy(self.model).to(torch.bfloat16)
        self._half = half
        self._labels = labels
        asked = workloads.load(Path(questions))
        # A judge's numbers stand as [forward, backward] of each question.
        self._sequences: list[Sequence] = [pair for one in asked for pair in one.sequences]
        self._budget: dict[str, int] = {}

    def warm_up(self, variant: str) -> Found:
        """Finds the quickest size of a batch, on some of the sequences."""
        lengths = sorted(range(len(self._sequences)), key=lambda i: self._length(i))
        # Evenly spread over the lengths, so that a trial is like the whole.
        total = sum(map(self._length, lengths))
        some = lengths[:: max(total // _TRIAL_TOKENS, 1)]
        seconds: dict[int, float] = {}
        self._score(variant, some[-1:], BATCH_TOKENS[0])
        for budget in BATCH_TOKENS:
            began = time.perf_counter()
            self._score(variant, some, budget)
            seconds[budget] = time.perf_counter() - began
            if seconds[budget] > 1.15 * min(seconds.values()):
                break  # larger ones are slower still
        self._budget[variant] = min(seconds, key=lambda budget: seconds[budget])
        return [], {"tried": {str(k): round(v, 3) for k, v in seconds.items()}}

    def run(self, variant: str) -> Found:
        """Scores all sequences."""
        budget = self._budget[variant]
        numbers, places = self._score(variant, range(len(self._sequences)), budget)
        tokens = sum(self._length(i) for i in numbers)
        facts = {"places": places, "padding": 1 - tokens / places, "batch_tokens": budget}
        return [numbers[i] for i in range(len(self._sequences))], facts

    def _length(self, i: int) -> int:
        prompt, response = self._sequences[i]
        return len(prompt) + len(response)

    def _score(self, variant: str, which: Any, budget: int) -> tuple[dict[int, float], int]:
        self.model = self._float32
        if variant == BFLOAT16:
            self.model, variant = self._bfloat16, self._half
        score = {
            ("plain", False): self._plain,
            ("careful", False): self._careful,
            ("plain", True): self._judge_plain,
            ("careful", True): self._judge_careful,
        }[variant, bool(self._labels)]
        numbers: dict[int, float] = {}
        places = 0
        with torch.inference_mode():
            for batch in self._batches(which, budget):
                sequences = [self._sequences[i] for i in batch]
                ids, attention = _padded(sequences)
                places += ids.numel()
                numbers.update(zip(batch, score(sequences, ids, attention).tolist(), strict=True))
        return numbers, places

    def _batches(self, which: Any, budget: int) -> Iterator[list[int]]:
        batch: list[int] = []
        for i in sorted(which, key=self._length, reverse=True):
            if batch and (len(batch) + 1) * self._length(batch[0]) > budget:
                yield batch
                batch = []
            batch.append(i)
        yield batch

    def _plain(self, sequences: list[Sequence], ids: Any, attention: Any) -> Any:
        logits = self.model(ids, attention_mask=attention, use_cache=False).logits[:, :-1]
        return (_token_logprobs(logits, ids[:, 1:]) * _is_response(sequences, ids)).sum(1)

    def _careful(self, sequences: list[Sequence], ids: Any, attention: Any) -> Any:
        hidden = self.model.model(ids, attention_mask=attention, use_cache=False).last_hidden_state
        there = _is_response(sequences, ids)
        logits = self.model.lm_head(hidden[:, :-1][there])
        logprobs = torch.zeros(there.shape)
        logprobs[there] = _token_logprobs(logits[None], ids[:, 1:][there][None])[0]
        return logprobs.sum(1)

    def _judge_plain(self, sequences: list[Sequence], ids: Any, attention: Any) -> Any:
        logits = self.model(ids, attention_mask=attention, use_cache=False).logits
        last = logits[torch.arange(len(ids)), attention.sum(1) - 1]
        return last[:, self._labels[0]] - last[:, self._labels[1]]

    def _judge_careful(self, sequences: list[Sequence], ids: Any, attention: Any) -> Any:
        # Padded on the left, the last token of each is in the last column.
        shift = [int(n) for n in ids.shape[1] - attention.sum(1)]
        ids = torch.stack([row.roll(n) for row, n in zip(ids, shift, strict=True)])
        attention = torch.stack([row.roll(n) for row, n in zip(attention, shift, strict=True)])
        positions = (attention.cumsum(1) - 1).clamp(min=0)
        logits = self.model(
            ids,
            attention_mask=attention,
            position_ids=positions,
            logits_to_keep=1,
            use_cache=False,
        ).logits[:, -1]
        return logits[:, self._labels[0]] - logits[:, self._labels[1]]


class Training(_Peer):
    """AdamW steps on one batch; a text alone, or pairs with both sequences in full, padded."""

    def __init__(
        self,
        *,
        model: str,
        sequences: list[list[Any]],
        learning_rate: float,
        weight_decay: float,
        betas: tuple[float, float],
        eps: float,
        clip: float,
        objective: dict[str, Any],
    ):
        super().__init__(model)
        self.model.train()
        self._objective, self._clip = objective, clip
        # Chosen ones first, then rejected ones, concatenated in one batch.
        self._sequences: list[Sequence] = [
            (one[0], one[k]) for k in range(1, len(sequences[0])) for one in sequences
        ]
        self._ids, self._attention = _padded(self._sequences)
        matrices = [p for p in self.model.parameters() if p.ndim > 1]
        others = [p for p in self.model.parameters() if p.ndim == 1]
        self._optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=learning_rate,
            betas=betas,
            eps=eps,
            fused=True,
        )
        tokens = int(self._attention.sum())
        self._facts = {
            "places": self._ids.numel(),
            "padding": 1 - tokens / self._ids.numel(),
        }

    def warm_up(self, variant: str) -> Found:
        """Takes the first step: its loss and gradient norm."""
        loss = self._backward(variant)
        # PyTorch's own norm of a large float32 tensor is wrong in the fourth digit on a CPU.
        squares = [p.grad.double().square().sum() for p in self.model.parameters()]
        norm = float(torch.stack(squares).sum().sqrt())
        self._update()
        return [loss, norm], self._facts

    def run(self, variant: str) -> Found:
        """Takes a step: its loss."""
        loss = self._backward(variant)
        self._update()
        return [loss], self._facts

    def _backward(self, variant: str) -> float:
        is_text = self._objective["name"] == "next_token"
        half = torch.autocast("cpu", torch.bfloat16) if variant == BFLOAT16 else None
        with half or contextlib.nullcontext():
            loss = self._text_loss() if is_text else self._pair_loss()
        self._optimizer.zero_grad()
        loss.backward()
        return float(loss.detach())

    def _update(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._clip)
        self._optimizer.step()

    def _text_loss(self) -> Any:
        logits = self.model(self._ids[:, :-1], use_cache=False).logits
        return functional.cross_entropy(logits.flatten(0, 1), self._ids[:, 1:].flatten())

    def _pair_loss(self) -> Any:
        """-t log sig(D) - (1 - t) log sig(-D) with D = b (s_chosen - s_rejected)."""
        logits = self.model(self._ids, attention_mask=self._attention, use_cache=False).logits
        logprobs = _token_logprobs(logits[:, :-1], self._ids[:, 1:])
        scores = (logprobs * _is_response(self._sequences, self._ids)).sum(1)
        chosen, rejected = scores.chunk(2)
        difference = self._objective["beta"] * (chosen - rejected)
        t = 1 - self._objective["label_smoothing"]
        right, wrong = functional.logsigmoid(difference), functional.logsigmoid(-difference)
        return -(t * right + (1 - t) * wrong).mean()


def _token_logprobs(logits: Any, targets: Any) -> Any:
    """Log-probs [B, T] of the targets, a sequence at a time, so that no second [B, T, V] exists."""
    return torch.stack(
        [
            row.gather(-1, target[:, None])[:, 0] - row.logsumexp(-1)
            for row, target in zip(map(torch.Tensor.float, logits), targets, strict=True)
        ]
    )


def _padded(sequences: list[Sequence]) -> tuple[Any, Any]:
    """Ids and attention mask [B, T], padded on the right."""
    length = max(len(prompt) + len(response) for prompt, response in sequences)
    ids = torch.zeros((len(sequences), length), dtype=torch.long)
    attention = torch.zeros_like(ids)
    for i, (prompt, response) in enumerate(sequences):
        n = len(prompt) + len(response)
        ids[i, :n] = torch.tensor(prompt + response)
        attention[i, :n] = 1
    return ids, attention


def _is_response(sequences: list[Sequence], ids: Any) -> Any:
    """Which of ``ids[:, 1:]`` are tokens of the response, bool [B, T - 1]."""
    there = torch.zeros((ids.shape[0], ids.shape[1] - 1), dtype=torch.bool)
    for i, (prompt, response) in enumerate(sequences):
        there[i, len(prompt) - 1 : len(prompt) + len(response) - 1] = True
    return there
