"""The decoder: embed, blocks, norm. One NNX module for Llama, Mistral, Qwen2 and Qwen3.

Modules are plain pytrees: ``jax.jit``, ``jax.grad``, ``jax.lax.scan`` and ``jax.tree.map`` take
them as they are. The blocks of a model are stacked along a leading layer axis and scanned. A model
whose first blocks are frozen holds two stacks (see `Decoder.split_stacks`), because part of
a stacked array cannot be frozen.

Letters: B rows, T tokens, D model, H heads, K key-value heads, E head width, F feed-forward,
V vocabulary, L layers, R rank of LoRA's matrices.
"""

from __future__ import annotations

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gram_jax.config import ComputeConfig, ModelConfig
from gram_jax.errors import UserError
from gram_jax.mesh import gathered, named, out_spec, target_platform, weight_spec
from gram_jax.models.attention import FULL, rope_tables, rotate
from gram_jax.models.backends import Attend, attention_of, backend
from gram_jax.models.products import product
from gram_jax.rows import Batch
from gram_jax.stripes import striped

BLOCK_DIMS = {
    "attention_norm": "d",
    "q": "DHE",
    "k": "DKE",
    "v": "DKE",
    "q_bias": "HE",
    "k_bias": "KE",
    "v_bias": "KE",
    "q_norm": "E",
    "k_norm": "E",
    "o": "HED",
    "o_bias": "d",
    "mlp_norm": "d",
    "gate": "DF",
    "up": "DF",
    "down": "FD",
    "gate_bias": "F",
    "up_bias": "F",
    "down_bias": "d",
    "q_lora_a": "DR",
    "q_lora_b": "RHE",
    "k_lora_a": "DR",
    "k_lora_b": "RKE",
    "v_lora_a": "DR",
    "v_lora_b": "RKE",
    "o_lora_a": "HER",
    "o_lora_b": "RD",
    "gate_lora_a": "DR",
    "gate_lora_b": "RF",
    "up_lora_a": "DR",
    "up_lora_b": "RF",
    "down_lora_a": "FR",
    "down_lora_b": "RD",
}
"""Dimensions of each weight of one block: its shape, its sharding and its kind at once. Those of
LoRA are added beside the others (gram_jax/models/adapters.py)."""

MODEL_DIMS = {"embedding": "VD", "norm": "d", "unembedding": "VD", "head": "d"}
"""Dimensions of the weights outside the blocks; ``head`` turns a hidden state into a reward."""


def block_weights(config: ModelConfig) -> list[str]:
    """Names of the weights that a block of this model has."""
    absent = {
        **dict.fromkeys(("q_bias", "k_bias", "v_bias"), not config.qkv_bias),
        **dict.fromkeys(("q_norm", "k_norm"), not config.qk_norm),
        **dict.fromkeys(("gate_bias", "up_bias", "down_bias"), not config.mlp_bias),
        "o_bias": not config.output_bias,
    }
    return [name for name in BLOCK_DIMS if not absent.get(name) and not is_lora(name)]


def is_lora(name: str) -> bool:
    """Whether a weight of this name is one of LoRA's two matrices beside a projection."""
    return name.endswith(("_lora_a", "_lora_b"))


def shape_of(dims: str, config: ModelConfig, rank: int = 0) -> tuple[int, ...]:
    """The shape of a weight with these dimensions; ``rank`` is that of LoRA's matrices."""
    sizes = {
        "D": config.hidden_size,
        "d": config.hidden_size,
        "H": config.num_heads,
        "K": config.num_kv_heads,
        "E": config.head_dim,
        "F": config.intermediate_size,
        "V": config.vocab_size,
        "L": config.num_layers,
        "R": rank,
    }
    return tuple(sizes[dim] for dim in dims)


def is_matrix(dims: str) -> bool:
    """Whether weight decay applies: projections and embeddings, not norms and biases."""
    return "D" in dims or "R" in dims


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """x over its root mean square in float32, scaled; in the dtype of x."""
    x32 = x.astype(jnp.float32)
    scaled = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (weight.astype(jnp.float32) * scaled).astype(x.dtype)


class Block(nnx.Module):
    """One layer: attention and a gated feed-forward, each after a norm and added to its input."""

    lora_scale = 1.0  # alpha / rank, where there are LoRA's weights

    def __init__(self, config: ModelConfig, key: jax.Array):
        self.config = config
        names = block_weights(config)
        for name, subkey in zip(names, jax.random.split(key, len(names)), strict=True):
            setattr(self, name, nnx.Param(_initial(name, BLOCK_DIMS[name], config, subkey)))

    def __call__(
        self, x_btd: jax.Array, cos: jax.Array, sin: jax.Array, attend: Attend, dtype: Any
    ) -> jax.Array:
        c = self.config

        def use(name: str) -> jax.Array:
            return gathered(getattr(self, name)[...], BLOCK_DIMS[name]).astype(dtype)

        def project(x: jax.Array, name: str, inputs: str, outputs: str) -> jax.Array:
            """x W; with LoRA, x W + (alpha / r) (x A) B, so that W + A B never exists."""
            y = product(x, use(name), f"{inputs},{BLOCK_DIMS[name]}->{outputs}")
            a, b = f"{name}_lora_a", f"{name}_lora_b"
            if not hasattr(self, a):
                return y
            low = product(x, use(a), f"{inputs},{BLOCK_DIMS[a]}->BTR")
            return y + self.lora_scale * product(low, use(b), f"BTR,{BLOCK_DIMS[b]}->{outputs}")

        h = rms_norm(x_btd, use("attention_norm"), c.norm_eps)
        q = project(h, "q", "BTD", "BTHE")
        k = project(h, "k", "BTD", "BTKE")
        v = project(h, "v", "BTD", "BTKE")
        if c.qkv_bias:
            q, k, v = q + use("q_bias"), k + use("k_bias"), v + use("v_bias")
        if c.qk_norm:
            q = rms_norm(q, use("q_norm"), c.norm_eps)
            k = rms_norm(k, use("k_norm"), c.norm_eps)
        mixed = attend(rotate(q, cos, sin), rotate(k, cos, sin), v)
        out = project(mixed, "o", "BTHE", "BTD")
        x_btd = x_btd + (out + use("o_bias") if c.output_bias else out)

        h = rms_norm(x_btd, use("mlp_norm"), c.norm_eps)
        gate = project(h, "gate", "BTD", "BTF")
        up = project(h, "up", "BTD", "BTF")
        if c.mlp_bias:
            gate, up = gate + use("gate_bias"), up + use("up_bias")
        down = project(jax.nn.silu(gate) * up, "down", "BTF", "BTD")
        return x_btd + (down + use("down_bias") if c.mlp_bias else down)


def _initial(name: str, dims: str, config: ModelConfig, key: jax.Array) -> jax.Array:
    """Normal matrices, norms of one, biases of zero; float32."""
    shape = shape_of(dims, config)
    if is_matrix(dims):
        return config.initializer_range * jax.random.normal(key, shape, jnp.float32)
    return jnp.ones(shape) if name.endswith("norm") else jnp.zeros(shape)


class Decoder(nnx.Module):
    """Hidden states of rows. The unembedding is applied elsewhere, at target positions only."""

    def __init__(self, config: ModelConfig, compute: ComputeConfig, key: jax.Array):
        embed_key, unembed_key, blocks_key = jax.random.split(key, 3)
        self.config = config
        self.compute = compute
        self.embedding = nnx.Param(_initial("embedding", "VD", config, embed_key))
        keys = jax.random.split(blocks_key, config.num_layers)
        self.stacks = nnx.List([jax.vmap(lambda k: Block(config, k))(keys)])
        self.norm = nnx.Param(jnp.ones(config.hidden_size))
        if config.has_unembedding and not config.tie_embeddings:
            self.unembedding = nnx.Param(_initial("unembedding", "VD", config, unembed_key))

    def unembedding_vd(self) -> jax.Array:
        """The [V, D] matrix whose rows turn a hidden state into logits.

        Raises:
          UserError: this is a classifier, which has none.
        """
        if not self.config.has_unembedding:
            raise UserError(
                "this model is a sequence classifier, without an unembedding: tokens have no"
                " log-probs; use its reward head (bradley_terry without chosen_ce, --reward=head)"
            )
        return (self.embedding if self.config.tie_embeddings else self.unembedding)[...]

    def __call__(self, batch: Batch) -> jax.Array:
        """Final, normalised hidden states [B, T, D] in the compute dtype. Ignores target fields.

        On a mesh with ``context`` they are in stripes; ``stripes.at_places`` takes them by place.
        """
        dtype = compute_dtype(self.compute)
        cos, sin = rope_tables(self.config, striped(batch.positions))
        attend_within = attention_of(batch, backend(self.compute.attention))
        attend_all = None if self.config.windows else attend_within(None)
        table = gathered(self.embedding[...], "VD")
        tokens = striped(batch.tokens)
        x_btd = table.at[tokens].get(out_sharding=out_spec("BTD")).astype(dtype)

        def body(x: jax.Array, layer: tuple[Block, jax.Array]) -> tuple[jax.Array, None]:
            block, window = layer
            return block(x, cos, sin, attend_all or attend_within(window), dtype), None

        body = _remat(body, self.compute.remat)
        windows = np.array(self.config.windows or (0,) * self.config.num_layers, np.int32)
        windows = np.where(windows == 0, FULL, windows)
        start = 0
        for stack in self.stacks:
            depth = stack.attention_norm[...].shape[0]
            layer_windows = jnp.asarray(windows[start : start + depth])
            unroll = min(self.compute.unroll or _default_unroll(depth), depth)
            x_btd, _ = jax.lax.scan(body, x_btd, (stack, layer_windows), unroll=unroll)
            start += depth
        return rms_norm(x_btd, self.norm[...], self.config.norm_eps)

    def split_stacks(self, trainable: int) -> Decoder:
        """The same model with its last ``trainable`` blocks in a stack of their own."""
        (stack,) = self.stacks
        cut = self.config.num_layers - trainable
        if not 0 < cut < self.config.num_layers:
            raise ValueError(f"cannot split {self.config.num_layers} blocks at {cut}")
        ends = (slice(cut), slice(cut, None))
        return self._with_stacks([jax.tree.map(lambda w, e=e: _layers(w, e), stack) for e in ends])

    def joined_stacks(self) -> Decoder:
        """The same model with all blocks in one stack."""
        if len(self.stacks) == 1:
            return self
        whole = jax.tree.map(lambda *parts: jnp.concatenate(parts), *self.stacks)
        return self._with_stacks([whole])

    def _with_stacks(self, stacks: list[Block]) -> Decoder:
        graph, state = nnx.split(self)
        twin = cast(Decoder, nnx.merge(graph, state))
        twin.stacks = nnx.List(stacks)
        return twin


def _layers(weight: Any, part: slice) -> Any:
    """Some layers of a stacked weight, or of its description (which keeps its sharding)."""
    if not isinstance(weight, jax.ShapeDtypeStruct):
        return weight[part]
    shape = (len(range(*part.indices(weight.shape[0]))), *weight.shape[1:])
    return jax.ShapeDtypeStruct(shape, weight.dtype, sharding=weight.sharding)


def compute_dtype(compute: ComputeConfig) -> Any:
    if compute.dtype == "auto":
        return jnp.float32 if target_platform() == "cpu" else jnp.bfloat16
    return jnp.dtype(compute.dtype)


def _default_unroll(depth: int) -> int:
    # Measured: on CPU unrolled layers are faster than a loop; elsewhere a loop compiles faster.
    return depth if target_platform() == "cpu" else 1


def _remat(body: Any, kind: str) -> Any:
    if kind == "none":
        return body
    policy = None
    if kind == "matmuls":
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return jax.checkpoint(body, policy=policy, prevent_cse=False)


def weight_dims(path: tuple[Any, ...]) -> str:
    """The dimensions of the weight at a pytree path of a Decoder, ``L`` first inside the blocks."""
    name = weight_name(path)
    return MODEL_DIMS[name] if name in MODEL_DIMS else "L" + BLOCK_DIMS[name]


def weight_name(path: tuple[Any, ...]) -> str:
    """The weight's own name at a pytree path such as ``.stacks[0].q.value``."""
    names = [str(getattr(k, "name", getattr(k, "key", ""))) for k in path]
    return next(n for n in reversed(names) if n in MODEL_DIMS or n in BLOCK_DIMS)


def shardings(model: Any, mesh: jax.sharding.Mesh) -> Any:
    """A pytree like ``model`` whose leaves are the shardings of its weights."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: named(mesh, weight_spec(weight_dims(path))), model
    )


def abstract_decoder(
    config: ModelConfig, compute: ComputeConfig, mesh: jax.sharding.Mesh | None = None
) -> Decoder:
    """A Decoder of shapes, dtypes and shardings, without arrays."""
    model = jax.eval_shape(lambda: Decoder(config, compute, jax.random.key(0)))
    if mesh is None:
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        placed = jax.tree.map(lambda _: device, model)
    else:
        placed = shardings(model, mesh)
    return cast(
        Decoder,
        jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), model, placed
        ),
    )


def init_decoder(
    config: ModelConfig, compute: ComputeConfig, seed: int, mesh: jax.sharding.Mesh | None = None
) -> Decoder:
    """A random decoder, created directly in its shards; the same numbers on every mesh."""
    if mesh is None:
        return cast(Decoder, jax.jit(lambda: Decoder(config, compute, jax.random.key(seed)))())
    out = shardings(abstract_decoder(config, compute), mesh)
    make = jax.jit(lambda: Decoder(config, compute, jax.random.key(seed)), out_shardings=out)
    return cast(Decoder, make())
