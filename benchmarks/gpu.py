"""One step of the benchmarks of a GPU; benchmarks/gpu.sh runs them all.

  python -m benchmarks.gpu STEP [--results=FILE] [--dry]

equality        outputs and gradients of the `flash` kernels against the reference, compiled
pretrain_NAME   a train step of a Llama-3.2-1B shape, 4096 tokens a row, bfloat16 products:
                tokens/s and share of the peak, by attention backend or by the peer
score_flash     log-probs of documents of mixed lengths, non-padding tokens
shared_NAME     8 responses of 128 tokens to prompts of 256, by us or by the peer

The peer is transformers with torch.compile and PyTorch's attention, where PyTorch has CUDA.
Share of the peak: FLOPs of `ModelConfig.flops_per_token` (products only, causal attention counted
once; a train step is three forward passes) over seconds x 989 TFLOP/s, the dense bfloat16 peak of
an H100 or H200. Weights are random: speed does not depend on them. Times are medians of 5.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gram_jax.config import (
    ComputeConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    RopeScaling,
    TrainConfig,
)
from gram_jax.models.attention import FULL, attention, mask_bias, row_mask, window_mask
from gram_jax.models.attention_gpu import flash_attention, flash_view
from gram_jax.models.decoder import init_decoder
from gram_jax.packing import pack
from gram_jax.readouts import Readout
from gram_jax.rows import Batch, Example, RowShape, stack_rows
from gram_jax.scoring import score_rows
from gram_jax.training import init_state, make_optimizer, make_train_step, split_model

PEAK = 989e12
REPETITIONS = 5
MODEL = ModelConfig(
    vocab_size=128256,
    hidden_size=2048,
    num_layers=16,
    num_heads=32,
    num_kv_heads=8,
    head_dim=64,
    intermediate_size=8192,
    max_position=131072,
    rope_theta=500000.0,
    rope_scaling=RopeScaling(kind="llama3", factor=32.0),
    tie_embeddings=True,
)
TOY = dataclasses.replace(
    MODEL,
    vocab_size=512,
    hidden_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=128,
)


@dataclasses.dataclass(frozen=True)
class Size:
    """What is computed; the toy is for trying out whether the steps run."""

    model: ModelConfig
    rows: int
    tokens: int
    prompt: int
    response: int
    prompts: int


FULL_SIZE = Size(MODEL, rows=4, tokens=4096, prompt=256, response=128, prompts=32)
TOY_SIZE = Size(TOY, rows=2, tokens=256, prompt=32, response=16, prompts=2)
RESPONSES = 8


def main() -> None:
    """Runs one step and appends its result to the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("--results", type=Path, default=Path("runs/gpu/results.jsonl"))
    parser.add_argument("--dry", action="store_true", help="toy size on a CPU")
    flags = parser.parse_args()
    if not flags.dry and not flags.step.endswith("_peer") and jax.default_backend() != "gpu":
        raise SystemExit("no GPU is here; --dry tries the steps on a CPU")
    began = time.perf_counter()
    size = TOY_SIZE if flags.dry else FULL_SIZE
    found = {"step": flags.step, "dry": flags.dry, **STEPS[flags.step](size, flags.dry)}
    found["whole_seconds"] = round(time.perf_counter() - began, 1)
    flags.results.parent.mkdir(parents=True, exist_ok=True)
    with flags.results.open("a", encoding="utf-8") as file:
        file.write(json.dumps(found) + "\n")


def equality(size: Size, dry: bool) -> dict[str, Any]:
    """Largest difference of outputs and gradients from the float32 reference, over its largest."""
    batch = _shared_rows(size)
    row = tuple(jnp.asarray(x[:2]) for x in (batch.segment_ids, batch.branch_ids, batch.positions))
    live = (row[0] != 0)[:, :, None, None]
    worst: dict[str, float] = {}

    def gradients(attend: Any, q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array) -> Any:
        out, pull = jax.vjp(attend, q, k, v)
        found = (jnp.where(live, out, 0), *pull(jnp.where(live, g, 0).astype(out.dtype)))
        return [x.astype(jnp.float32) for x in found]

    def reference(window: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        mask = row_mask(row[0], row[1]) & window_mask(row[2], jnp.int32(window or FULL))
        return attention(q, k, v, mask_bias(mask))

    t = row[0].shape[1]
    for width, dtype, window in (
        (64, jnp.bfloat16, 0),
        (128, jnp.bfloat16, 0),
        (64, jnp.float32, 0),
        (64, jnp.bfloat16, size.prompt // 2),
    ):
        keys = jax.random.split(jax.random.key(width), 4)
        heads = (4, 2, 2, 4)
        arrays = [
            jax.random.normal(key, (2, t, n, width)).astype(dtype)
            for key, n in zip(keys, heads, strict=True)
        ]
        plain = [x.astype(jnp.float32) for x in arrays]
        with jax.default_matmul_precision("highest"):
            expected = jax.jit(functools.partial(gradients, functools.partial(reference, window)))(
                *plain
            )
        fast = functools.partial(_flash_of_row, row, window, dry)
        found = jax.jit(functools.partial(gradients, fast))(*arrays)
        for name, a, b in zip(("output", "dq", "dk", "dv"), found, expected, strict=True):
            key = f"{name} {width} {jnp.dtype(dtype).name} window {window}"
            worst[key] = float(abs(a - b).max() / abs(b).max())
    limits = {"float32": 1e-4, "bfloat16": 2e-2}
    good = all(value <= limits[key.split()[2]] for key, value in worst.items())
    if not good:
        raise SystemExit(f"the kernels differ from the reference: {worst}")
    return {"equal": good, "worst": {k: float(f"{v:.2e}") for k, v in worst.items()}}


def _flash_of_row(
    row: tuple[jax.Array, ...], window: int, dry: bool, q: jax.Array, k: jax.Array, v: jax.Array
) -> jax.Array:
    view = flash_view(row[0], row[1], row[2], window or None)
    return flash_attention(q, k, v, view, interpret=dry)


def pretrain(attention_name: str, size: Size, dry: bool) -> dict[str, Any]:
    """A step of stage 1 on rows of one document each."""
    config, batch = size.model, _text_rows(size)
    compute = _compute(attention_name, dry, remat="matmuls")
    tx = make_optimizer(OptimizerConfig(schedule="constant", warmup=0.0), steps=100)
    graph, trainable, frozen = split_model(init_decoder(config, compute, 0), TrainConfig())
    state = init_state(tx, trainable, frozen)
    step = make_train_step(graph, tx, ObjectiveConfig(name="next_token"), None)
    one_part = jax.tree.map(lambda x: jnp.asarray(x)[None], batch)
    losses = []

    def run() -> None:
        nonlocal state
        state, metrics = step(state, one_part)
        jax.block_until_ready(state)
        losses.append(float(metrics["loss"]))

    compiling, seconds = _timed(run)
    tokens = size.rows * size.tokens
    flops = 3 * config.flops_per_token(size.tokens) * tokens
    return {
        **_speed(tokens, seconds, flops),
        "compile_seconds": compiling,
        "loss": losses[-1],
        "attention": compute.attention,
    }


def score(size: Size, dry: bool) -> dict[str, Any]:
    """Log-probs of documents of mixed lengths, packed."""
    rng, longest = np.random.default_rng(0), size.tokens // 2
    lengths = np.clip(rng.lognormal(np.log(longest / 4), 0.8, 40 * size.rows), 8, longest)
    examples = [
        Example(_ids(rng, size.model, 1), (_ids(rng, size.model, int(n)),), key=key)
        for key, n in enumerate(lengths)
    ]
    tokens = size.tokens
    packed = [p.batch for p in pack(examples, RowShape(tokens, tokens, 128, 1))]
    batch = stack_rows(packed[: size.rows])
    real = int((batch.segment_ids != 0).sum())
    # A query sees the keys of its document up to itself: half its length, on average.
    context = 2 * float(batch.positions[batch.segment_ids != 0].mean())
    return _score(size, dry, batch, real, context, real)


def shared(size: Size, dry: bool) -> dict[str, Any]:
    """8 responses to each prompt; tokens counted as if each had its own prompt."""
    batch = _shared_rows(size)
    responses = int(batch.sequence_ids.max(axis=1).sum())
    computed = int((batch.segment_ids != 0).sum())
    counted = responses * (size.prompt + size.response)
    context = 2 * float(batch.positions[batch.segment_ids != 0].mean())
    return _score(size, dry, batch, computed, context, counted)


def _score(
    size: Size, dry: bool, batch: Batch, computed: int, context: float, counted: int
) -> dict[str, Any]:
    compute = _compute("flash", dry)
    model = jax.tree.map(
        lambda x: x.astype(jnp.float32 if dry else jnp.bfloat16),
        init_decoder(size.model, compute, 0),
    )

    readout = Readout("likelihood", int(batch.sequence_ids.max()))
    batch = jax.tree.map(jnp.asarray, batch)
    targets = float((batch.weights != 0).mean()) * batch.weights.size / computed
    compiling, seconds = _timed(lambda: jax.block_until_ready(score_rows(model, batch, readout)))
    flops = size.model.flops_per_token(round(context), targets_per_token=targets) * computed
    padding = 1 - computed / batch.tokens.size
    speed = _speed(counted, seconds, flops)
    return {**speed, "padding": round(padding, 3), "compile_seconds": compiling}


def pretrain_peer(size: Size, dry: bool) -> dict[str, Any]:
    """A step of transformers with torch.compile, fused AdamW and PyTorch's attention."""
    torch, model, device = _peer_model(size, dry)
    model.train()
    model.gradient_checkpointing_disable()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=not dry)
    forward = model if dry else torch.compile(model)
    ids = torch.randint(0, size.model.vocab_size, (size.rows, size.tokens + 1), device=device)

    def run() -> None:
        with torch.autocast(device, torch.bfloat16):
            logits = forward(ids[:, :-1], use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        _wait(torch, device)

    compiling, seconds = _timed(run)
    tokens = size.rows * size.tokens
    speed = _speed(tokens, seconds, 3 * size.model.flops_per_token(size.tokens) * tokens)
    return {**speed, "compile_seconds": compiling, "torch": torch.__version__}


def shared_peer(size: Size, dry: bool) -> dict[str, Any]:
    """Every response with its prompt in full, of equal lengths (so without padding), 32 at once."""
    torch, model, device = _peer_model(size, dry)
    model = model.eval().to(torch.bfloat16)
    forward = model if dry else torch.compile(model)
    length, at_once = size.prompt + size.response, 32 if not dry else 4
    count = size.prompts * RESPONSES
    ids = torch.randint(0, size.model.vocab_size, (count, length), device=device)

    def run() -> None:
        with torch.inference_mode():
            for part in ids.split(at_once):
                logits = forward(part, use_cache=False).logits[:, size.prompt - 1 : -1].float()
                targets = part[:, size.prompt :, None]
                (logits.gather(-1, targets)[..., 0] - logits.logsumexp(-1)).sum(1)
        _wait(torch, device)

    compiling, seconds = _timed(run)
    flops = size.model.flops_per_token(length) * count * length
    speed = _speed(count * length, seconds, flops)
    return {**speed, "compile_seconds": compiling, "torch": torch.__version__}


def _peer_model(size: Size, dry: bool) -> tuple[Any, Any, str]:
    import torch
    import transformers

    from gram_jax.models.families import config_values

    if not dry and not torch.cuda.is_available():
        raise SystemExit("PyTorch has no CUDA here: the peer is not measured")
    device = "cpu" if dry else "cuda"
    values = config_values(size.model)
    config = transformers.LlamaConfig(**values, attn_implementation="sdpa")
    with torch.device(device):
        return torch, transformers.LlamaForCausalLM(config), device


def _wait(torch: Any, device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _timed(run: Callable[[], Any]) -> tuple[float, list[float]]:
    """Seconds of the first run, compilation included, and of REPETITIONS after it and another."""
    took = []
    for _ in range(REPETITIONS + 2):
        began = time.perf_counter()
        run()
        took.append(time.perf_counter() - began)
    return round(took[0], 1), took[2:]


def _speed(tokens: int, seconds: list[float], flops: float) -> dict[str, Any]:
    median = statistics.median(seconds)
    return {
        "tokens": tokens,
        "tokens_per_second": round(tokens / median, 1),
        "share_of_peak": round(flops / median / PEAK, 4),
        "seconds": [round(s, 5) for s in seconds],
    }


def _compute(attention_name: str, dry: bool, remat: str = "none") -> ComputeConfig:
    """The settings; on a CPU the kernels of a GPU cannot be compiled, so another stands in."""
    if dry and attention_name == "flash":
        attention_name = "blocks"
    return ComputeConfig(attention=attention_name, remat=remat)


def _ids(rng: np.random.Generator, model: ModelConfig, count: int) -> Any:
    return rng.integers(0, model.vocab_size, count).astype(np.int32)


def _text_rows(size: Size) -> Batch:
    rng = np.random.default_rng(0)
    examples = [
        Example(_ids(rng, size.model, 1), (_ids(rng, size.model, size.tokens),), key=key)
        for key in range(size.rows)
    ]
    shape = RowShape(size.tokens, size.tokens)
    return stack_rows([p.batch for p in pack(examples, shape)])


def _shared_rows(size: Size) -> Batch:
    """Rows of prompts with 8 responses each."""
    rng = np.random.default_rng(0)
    examples = [
        Example(
            _ids(rng, size.model, size.prompt),
            tuple(_ids(rng, size.model, size.response) for _ in range(RESPONSES)),
            key=key,
        )
        for key in range(size.prompts)
    ]
    shape = RowShape(size.tokens, size.tokens, 128, 1)
    return stack_rows([p.batch for p in pack(examples, shape)])


STEPS: dict[str, Callable[[Size, bool], dict[str, Any]]] = {
    "equality": equality,
    "pretrain_flash": functools.partial(pretrain, "flash"),
    "pretrain_xla": functools.partial(pretrain, "xla"),
    "pretrain_peer": pretrain_peer,
    "score_flash": score,
    "shared_flash": shared,
    "shared_peer": shared_peer,
}


if __name__ == "__main__":
    main()
