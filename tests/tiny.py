"""Small models and examples that several tests share; weights are filled in without compiling."""

import dataclasses

import jax
import numpy as np

from gram_jax.config import ComputeConfig, MeshConfig, ModelConfig
from gram_jax.data.rowset import MANIFEST, Manifest, Rows, RowSet, write_json, write_shard
from gram_jax.data.token_records import ExampleCounts
from gram_jax.mesh import make_mesh
from gram_jax.models.decoder import abstract_decoder, is_matrix, weight_dims, weight_name
from gram_jax.packing import PackCounts
from gram_jax.pair import Pair
from gram_jax.rows import Example

VOCAB = 64
COMPUTE = ComputeConfig(dtype="float32", unroll=1)


def config(**changes):
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "intermediate_size": 48,
        "max_position": 256,
    }
    return ModelConfig(**sizes | changes)


def decoder(model=None, compute=COMPUTE, mesh=None, seed=0):
    """A random decoder, the same numbers on every mesh; sharp enough for attention to matter."""
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        noise = rng.normal(size=leaf.shape).astype(np.float32)
        if is_matrix(weight_dims(path)):
            value = 0.25 * noise
        else:
            value = weight_name(path).endswith("norm") + 0.2 * noise
        return jax.device_put(value.astype(np.float32), leaf.sharding)

    return jax.tree_util.tree_map_with_path(
        fill, abstract_decoder(model or config(), compute, mesh)
    )


def mesh(data, fsdp, tensor, context=1):
    devices = jax.devices()[: data * fsdp * tensor * context]
    sizes = MeshConfig(data=data, fsdp=fsdp, tensor=tensor, context=context)
    return make_mesh(sizes, devices)


def ids(rng, low, high):
    """Random token ids, at least ``low`` and at most ``high`` of them."""
    return rng.integers(0, VOCAB, rng.integers(low, high + 1)).astype(np.int32)


def text_examples(seed, count, longest=40):
    rng = np.random.default_rng(seed)
    return [Example(ids(rng, 1, 1), (ids(rng, 1, longest),), key=key) for key in range(count)]


def preferences(seed, count, *, reference=False):
    """Examples of a prompt, two to four responses and pairs that name each of them."""
    rng = np.random.default_rng(seed)
    found = []
    for key in range(count):
        responses = tuple(ids(rng, 1, 12) for _ in range(rng.integers(2, 5)))
        pairs = tuple(
            Pair(
                i, i + 1, target=float(rng.choice([1.0, 0.0, 0.5, 0.8])), weight=0.5 + rng.random()
            )
            for i in range(len(responses) - 1)
        )
        numbers = tuple(map(float, -rng.random(len(responses)) * 30)) if reference else None
        found.append(Example(ids(rng, 1, 10), responses, pairs, numbers, key))
    return found


def judge_prompts(seed, count):
    """Judge prompts in both orders, some of them ties, that share a beginning."""
    rng = np.random.default_rng(seed)
    found = []
    for key in range(count):
        responses = tuple(ids(rng, 3, 12) for _ in range(2 * int(rng.integers(1, 3))))
        pairs = tuple(
            Pair(i, None, target=float(rng.choice([1.0, 0.0, 0.5])), weight=0.5)
            for i in range(len(responses))
        )
        found.append(Example(ids(rng, 2, 10), responses, pairs, key=key))
    return found


def row_set(folder, packed, shape, shards=2, key=None):
    """Packed rows written to a folder as a preparation would, in shards."""
    folder.mkdir(parents=True, exist_ok=True)
    reference = packed[0].batch.reference is not None
    names = [f"rows-{i:05}-of-{shards:05}.array_record" for i in range(shards)]
    cuts = np.array_split(np.arange(len(packed)), shards)
    parts = [
        write_shard(folder / name, [packed[i] for i in cut], shape, reference=reference)
        for name, cut in zip(names, cuts, strict=True)
    ]
    tokens = sum(part["tokens"] for part in parts)
    counts = PackCounts(rows=len(packed), tokens=tokens, places=len(packed) * shape.tokens)
    manifest = Manifest(
        id="0", key=key or {}, sources=[], shape=dataclasses.asdict(shape), reference=reference,
        shards=[{"file": n, "rows": p["rows"], "bytes": p["bytes"]}
                for n, p in zip(names, parts, strict=True)],
        read=dataclasses.asdict(ExampleCounts()), packed=dataclasses.asdict(counts),
        context=2 * sum(p["positions"] for p in parts) / tokens,
        targets=sum(p["targets"] for p in parts), seconds=0.0, versions={},
    )  # fmt: skip
    write_json(folder / MANIFEST, dataclasses.asdict(manifest))
    return RowSet(folder)


def rows(folder, packed, shape):
    """Packed rows as a stage reads them."""
    return Rows([row_set(folder, packed, shape)])
