"""Per family: its Hugging Face config, and the one table that maps its weights in both directions.

A Hugging Face checkpoint keeps one tensor per layer, with projections as [out, in]. Ours are
stacked along a layer axis and keep heads apart. What differs is written once, as the order of the
same dimension letters (see ``BLOCK_DIMS`` in decoder.py), so neither direction has code of its own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from gram_jax.config import ModelConfig, RopeScaling
from gram_jax.config_rules import validate
from gram_jax.errors import UserError
from gram_jax.models.decoder import BLOCK_DIMS, MODEL_DIMS, block_weights, shape_of

BLOCK_TENSORS = {
    "attention_norm": ("input_layernorm.weight", "d"),
    "q": ("self_attn.q_proj.weight", "HE D"),
    "k": ("self_attn.k_proj.weight", "KE D"),
    "v": ("self_attn.v_proj.weight", "KE D"),
    "q_bias": ("self_attn.q_proj.bias", "HE"),
    "k_bias": ("self_attn.k_proj.bias", "KE"),
    "v_bias": ("self_attn.v_proj.bias", "KE"),
    "q_norm": ("self_attn.q_norm.weight", "E"),
    "k_norm": ("self_attn.k_norm.weight", "E"),
    "o": ("self_attn.o_proj.weight", "D HE"),
    "o_bias": ("self_attn.o_proj.bias", "d"),
    "mlp_norm": ("post_attention_layernorm.weight", "d"),
    "gate": ("mlp.gate_proj.weight", "F D"),
    "up": ("mlp.up_proj.weight", "F D"),
    "down": ("mlp.down_proj.weight", "D F"),
    "gate_bias": ("mlp.gate_proj.bias", "F"),
    "up_bias": ("mlp.up_proj.bias", "F"),
    "down_bias": ("mlp.down_proj.bias", "d"),
}
"""Per weight of a block: the tensor's name after ``model.layers.N.``, and its layout: one group of
dimension letters per axis, so ``HE D`` is [H * E, D]."""

MODEL_TENSORS = {
    "embedding": ("model.embed_tokens.weight", "V D"),
    "norm": ("model.norm.weight", "d"),
    "unembedding": ("lm_head.weight", "V D"),
    "head": ("score.weight", "1 d"),
}
"""The weights outside the blocks; ``1`` is an axis of one, which ours lack. The four families share
all names; they differ in what exists."""

# What transformers takes for a field that config.json leaves out.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": None, "max_position_embeddings": 2048},
    "mistral": {
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    "qwen2": {"num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096},
    "qwen3": {
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
        "head_dim": 128,
    },
}
_CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
_LANGUAGE_MODEL, _CLASSIFIER = "ForCausalLM", "ForSequenceClassification"
_MAX_WINDOW_LAYERS = 28  # of both Qwen families


def tensor_name(weight: str, layer: int = 0) -> str:
    """The Hugging Face name of a weight; ``layer`` counts only for weights of a block."""
    if weight in MODEL_TENSORS:
        return MODEL_TENSORS[weight][0]
    return f"model.layers.{layer}.{BLOCK_TENSORS[weight][0]}"


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a checkpoint of this model, embedding first."""
    shapes = {tensor_name("embedding"): _tensor_shape("embedding", config)}
    for layer in range(config.num_layers):
        for weight in block_weights(config):
            shapes[tensor_name(weight, layer)] = _tensor_shape(weight, config)
    last = ["norm"]
    if not config.has_unembedding:
        last.append("head")
    elif not config.tie_embeddings:
        last.append("unembedding")
    for weight in last:
        shapes[tensor_name(weight)] = _tensor_shape(weight, config)
    return shapes


def tensor_part(
    weight: str, index: tuple[slice, ...], config: ModelConfig
) -> tuple[tuple[slice, ...], tuple[int, ...], tuple[int, ...]]:
    """How to read a part of one layer's weight from its tensor.

    Args:
      weight: name in the tables above.
      index: one slice per dimension of our layout (without the layer axis); E is never cut.
      config: the model.

    Returns:
      (slices, shape, order): ``tensor[slices].reshape(shape).transpose(order)`` is the part.
    """
    dims, layout = _dims(weight), _layout(weight)
    sizes = dict(zip(dims, shape_of(dims, config), strict=True))
    spans = {d: s.indices(sizes[d])[:2] for d, s in zip(dims, index, strict=True)}
    sizes, spans = {"1": 1, **sizes}, {"1": (0, 1), **spans}
    slices = []
    for group in layout.split():
        inner = math.prod(sizes[d] for d in group[1:])
        if any(spans[d] != (0, sizes[d]) for d in group[1:]):
            raise ValueError(f"{weight}: {group[1:]} is not the outer part of an axis: cannot cut")
        start, stop = spans[group[0]]
        slices.append(slice(start * inner, stop * inner))
    letters = _letters(layout)
    shape = tuple(spans[d][1] - spans[d][0] for d in letters)
    return tuple(slices), shape, tuple(letters.index(d) for d in dims)


def to_tensor(weight: str, array: np.ndarray, config: ModelConfig) -> np.ndarray:
    """One layer's weight as Hugging Face lays it out."""
    dims, letters = _dims(weight), _letters(_layout(weight))
    order = tuple(dims.index(d) for d in letters)
    return array.transpose(order).reshape(_tensor_shape(weight, config))


def model_config(values: Mapping[str, Any], where: str) -> ModelConfig:
    """The shape of the model that a config.json describes.

    Args:
      values: the content of config.json.
      where: the file, for messages.

    Raises:
      UserError: the model is of a kind that is not supported, or a field is missing or ill-typed.
    """
    family, is_classifier = _family(values, where)
    if is_classifier:
        _check_one_label(values, where)
    fields = _Fields({**_DEFAULTS[family], **values}, where)
    if values.get("hidden_act", "silu") != "silu":
        raise UserError(
            f"{where}: hidden_act is {values['hidden_act']!r}; only 'silu' is supported"
        )
    if values.get("quantization_config"):
        raise UserError(
            f"{where}: the weights are quantized (quantization_config); use a folder with"
            " float32, bfloat16 or float16 weights"
        )
    heads, layers = fields.integer("num_attention_heads"), fields.integer("num_hidden_layers")
    width = fields.integer("hidden_size")
    bias = family in ("llama", "qwen3") and fields.flag("attention_bias")
    max_position = fields.integer("max_position_embeddings")
    theta, scaling = _read_rope(values, max_position, where)
    config = ModelConfig(
        family=family,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=width,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=fields.integer("num_key_value_heads", heads),
        head_dim=fields.integer("head_dim", width // max(heads, 1)),
        intermediate_size=fields.integer("intermediate_size"),
        max_position=max_position,
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_embeddings=fields.flag("tie_word_embeddings"),
        has_unembedding=not is_classifier,
        qkv_bias=bias or family == "qwen2",
        output_bias=bias,
        mlp_bias=family == "llama" and fields.flag("mlp_bias"),
        qk_norm=family == "qwen3",
        windows=_read_windows(family, fields, layers),
        initializer_range=fields.number("initializer_range", 0.02),
    )
    validate(config, where)
    return config


def config_values(config: ModelConfig) -> dict[str, Any]:
    """The fields of a config.json that say the shape of this model, for transformers 4 and 5.

    Raises:
      UserError: the family's checkpoints cannot express the model.
    """
    kind = _LANGUAGE_MODEL if config.has_unembedding else _CLASSIFIER
    values: dict[str, Any] = {
        "architectures": [_CLASSES[config.family] + kind],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position,
        "initializer_range": config.initializer_range,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        **_rope_values(config),
        **_window_values(config),
    }
    if config.family in ("llama", "qwen3"):
        values["attention_bias"] = config.qkv_bias
    if config.family == "llama":
        values["mlp_bias"] = config.mlp_bias
    if not config.has_unembedding:
        values["id2label"], values["label2id"] = {"0": "reward"}, {"reward": 0}
    wanted, understood = _plain(config), _plain(model_config(values, "config.json"))
    lost = [
        f"model.{field.name}={getattr(wanted, field.name)!r}"
        for field in dataclasses.fields(ModelConfig)
        if getattr(wanted, field.name) != getattr(understood, field.name)
    ]
    if lost:
        raise UserError(f"a {config.family} checkpoint cannot express {', '.join(lost)}")
    return values


class _Fields:
    """Typed reading of a config.json; null counts as absent."""

    def __init__(self, values: Mapping[str, Any], where: str):
        self.values, self.where = values, where

    def integer(self, name: str, default: int | None = None) -> int:
        return int(self._get(name, default, (int,), "an integer"))

    def number(self, name: str, default: float | None = None) -> float:
        return float(self._get(name, default, (int, float), "a number"))

    def flag(self, name: str) -> bool:
        return bool(self._get(name, False, (bool,), "true or false"))

    def _get(self, name: str, default: Any, types: tuple[type, ...], wanted: str) -> Any:
        value = self.values.get(name)
        if value is None:
            value = default
        if value is None:
            raise UserError(f"{self.where}: field {name!r} is missing")
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise UserError(f"{self.where}: field {name!r} is {value!r}; it must be {wanted}")
        return value


def _dims(weight: str) -> str:
    return MODEL_DIMS[weight] if weight in MODEL_DIMS else BLOCK_DIMS[weight]


def _layout(weight: str) -> str:
    return (MODEL_TENSORS if weight in MODEL_TENSORS else BLOCK_TENSORS)[weight][1]


def _letters(layout: str) -> str:
    """The dimensions of a layout that ours has too."""
    return layout.replace(" ", "").replace("1", "")


def _tensor_shape(weight: str, config: ModelConfig) -> tuple[int, ...]:
    groups = _layout(weight).split()
    return tuple(math.prod(shape_of(_letters(group), config)) for group in groups)


def is_classifier(values: Mapping[str, Any]) -> bool:
    """Whether a config.json names a sequence classifier."""
    names = values.get("architectures") or []
    return any(str(name).endswith(_CLASSIFIER) for name in names)


def _family(values: Mapping[str, Any], where: str) -> tuple[str, bool]:
    """The family, and whether the model is a classifier; a language model if nothing says it."""
    family = values.get("model_type")
    architectures = values.get("architectures") or []
    kind = _CLASSIFIER if is_classifier(values) else _LANGUAGE_MODEL
    known = [name + kind for name in _CLASSES.values()]
    for name in architectures:
        if name not in known:
            raise UserError(
                f"{where}: architecture {name!r} is not supported; known: {', '.join(known)}"
            )
    if family not in _CLASSES:
        raise UserError(
            f"{where}: model_type {family!r} is not supported; known: {', '.join(_CLASSES)}"
        )
    if architectures and architectures != [_CLASSES[family] + kind]:
        raise UserError(
            f"{where}: model_type {family!r} and architectures {architectures} disagree"
        )
    return str(family), kind == _CLASSIFIER


def _check_one_label(values: Mapping[str, Any], where: str) -> None:
    """A reward is one number. As in transformers, id2label counts before num_labels."""
    labels, number = values.get("id2label"), values.get("num_labels")
    count = len(labels) if isinstance(labels, Mapping) else 2 if number is None else number
    if count != 1:
        raise UserError(
            f"{where}: a classifier with {count} labels (id2label, num_labels); a reward model has"
            " one number, num_labels=1"
        )


def _read_rope(
    values: Mapping[str, Any], max_position: int, where: str
) -> tuple[float, RopeScaling]:
    """Base and scaling from `rope_scaling` and `rope_theta`, or from `rope_parameters`.

    As in transformers, `rope_scaling` goes first where a folder has both spellings.
    """
    parameters = values.get("rope_parameters") or {}
    rope = values.get("rope_scaling") or parameters
    for spelled in (rope, parameters):
        if not isinstance(spelled, dict) or any(isinstance(v, dict) for v in spelled.values()):
            raise UserError(
                f"{where}: rope_parameters {spelled!r} are not one set for all layers, which is"
                " all that is supported"
            )
    kind = rope.get("rope_type") or rope.get("type") or "default"
    kinds = ("default", "linear", "llama3", "yarn")
    if kind not in kinds:
        raise UserError(f"{where}: rope type {kind!r} is not supported; known: {', '.join(kinds)}")
    merged = {
        "rope_theta": values.get("rope_theta") or parameters.get("rope_theta"),
        "partial_rotary_factor": values.get("partial_rotary_factor"),
        "original_max_position_embeddings": max_position,
        **{k: v for k, v in rope.items() if v is not None},
    }
    # As in transformers: beside the other fields it goes before the one among the rope fields.
    if values.get("original_max_position_embeddings") is not None:
        merged["original_max_position_embeddings"] = values["original_max_position_embeddings"]
    fields = _Fields(merged, f"{where}: rope")
    if fields.number("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(f"{where}: partial_rotary_factor other than 1 is not supported")
    theta = fields.number("rope_theta", 10000.0)
    original = fields.integer("original_max_position_embeddings")
    if kind == "default":
        return theta, RopeScaling()
    if kind == "linear":
        return theta, RopeScaling(kind=kind, factor=fields.number("factor"))
    if kind == "llama3":
        return theta, RopeScaling(
            kind=kind,
            factor=fields.number("factor"),
            low_freq_factor=fields.number("low_freq_factor"),
            high_freq_factor=fields.number("high_freq_factor"),
            original_max_position=original,
        )
    if rope.get("truncate") is False:
        raise UserError(f"{where}: yarn with truncate=false is not supported")
    factor = fields.number("factor", max_position / max(original, 1))
    attention_factor = fields.number("attention_factor", 0.0)
    if attention_factor == 0.0 and rope.get("mscale") and rope.get("mscale_all_dim"):
        over, under = fields.number("mscale"), fields.number("mscale_all_dim")
        attention_factor = _mscale(factor, over) / _mscale(factor, under)
    return theta, RopeScaling(
        kind=kind,
        factor=factor,
        original_max_position=original,
        beta_fast=fields.number("beta_fast", 32.0) or 32.0,
        beta_slow=fields.number("beta_slow", 1.0) or 1.0,
        attention_factor=attention_factor,
    )


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _rope_values(config: ModelConfig) -> dict[str, Any]:
    """Both spellings: with the new one alone, transformers 4 would silently use base 10000."""
    s, rope = config.rope_scaling, dict[str, Any]()
    if s.kind != "default":
        rope["factor"] = float(s.factor)
    if s.kind in ("llama3", "yarn"):
        rope["original_max_position_embeddings"] = s.original_max_position
    if s.kind == "llama3":
        rope["low_freq_factor"] = float(s.low_freq_factor)
        rope["high_freq_factor"] = float(s.high_freq_factor)
    if s.kind == "yarn":
        rope["beta_fast"], rope["beta_slow"] = float(s.beta_fast), float(s.beta_slow)
        if s.attention_factor:
            rope["attention_factor"] = float(s.attention_factor)
    rope["rope_type"] = s.kind
    theta = float(config.rope_theta)
    return {
        "rope_theta": theta,
        "rope_scaling": None if s.kind == "default" else rope,
        "rope_parameters": {**rope, "rope_theta": theta},
    }


def _read_windows(family: str, fields: _Fields, layers: int) -> tuple[int, ...]:
    """The window of each layer; () where all layers see everything."""
    values = fields.values
    if family == "llama" or values.get("sliding_window") is None:
        window = 0
    else:
        window = fields.integer("sliding_window")
    if family in ("llama", "mistral"):
        return (window,) * layers if window else ()
    if not fields.flag("use_sliding_window"):
        window = 0
    types = values.get("layer_types")
    if types is None:
        first = fields.integer("max_window_layers", _MAX_WINDOW_LAYERS)
        types = [
            "sliding_attention" if window and i >= first else "full_attention"
            for i in range(layers)
        ]
    if len(types) != layers:
        raise UserError(f"{fields.where}: layer_types has {len(types)} entries for {layers} layers")
    unknown = set(types) - {"full_attention", "sliding_attention"}
    if unknown:
        raise UserError(f"{fields.where}: layer_types {sorted(unknown)} are not supported")
    if "sliding_attention" in types and not window:
        raise UserError(
            f"{fields.where}: layer_types has 'sliding_attention', but sliding_window is null or"
            " use_sliding_window is false"
        )
    windows = tuple(window if kind == "sliding_attention" else 0 for kind in types)
    return windows if any(windows) else ()


def _window_values(config: ModelConfig) -> dict[str, Any]:
    windows = config.windows or (0,) * config.num_layers
    window = max(windows) or None
    if config.family == "llama":
        return {}
    if config.family == "mistral":
        return {"sliding_window": window}
    types = ["sliding_attention" if w else "full_attention" for w in windows]
    return {
        "use_sliding_window": window is not None,
        "sliding_window": window,
        # Read where layer_types is not: the leading layers that see everything.
        "max_window_layers": next((i for i, w in enumerate(windows) if w), config.num_layers),
        "layer_types": types,
    }


def _plain(config: ModelConfig) -> ModelConfig:
    """The same model, said in one way."""
    changes: dict[str, Any] = {}
    if not any(config.windows):
        changes["windows"] = ()
    if config.rope_scaling.kind == "default":
        changes["rope_scaling"] = RopeScaling()
    return dataclasses.replace(config, **changes)
