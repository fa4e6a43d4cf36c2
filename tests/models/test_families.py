"""Every family gives transformers' numbers, and its config goes round."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import peer_models
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gram_jax import hf
from gram_jax.config import ComputeConfig, ModelConfig, RopeScaling
from gram_jax.cutting import split_example
from gram_jax.errors import UserError
from gram_jax.models.decoder import BLOCK_DIMS, MODEL_DIMS, shape_of
from gram_jax.models.families import (
    BLOCK_TENSORS,
    MODEL_TENSORS,
    config_values,
    model_config,
    tensor_part,
    to_tensor,
)
from gram_jax.packing import pack
from gram_jax.readouts import likelihood, token_logprobs
from gram_jax.rows import Example, RowShape, build_row, check_batch, stack_rows

LENGTH, VOCAB = peer_models.LENGTH, peer_models.VOCAB
SHAPE = RowShape(tokens=LENGTH, targets=LENGTH, sequences=8)


def random_tokens(rng, size):
    return rng.integers(3, VOCAB, size).astype(np.int32)


@functools.cache
def rows():
    """Two plain causal rows, then rows in which several responses share their prompt."""
    rng = np.random.default_rng(0)
    texts = [random_tokens(rng, LENGTH + 1) for _ in range(2)]
    plain = [build_row(split_example(Example(t[:1], (t[1:],)), SHAPE), SHAPE) for t in texts]
    examples = [
        Example(
            random_tokens(rng, 9 + key),
            tuple(random_tokens(rng, n) for n in (5, 4 + key, 7)),
            key=key,
        )
        for key in range(3)
    ]
    packed = list(pack(examples, SHAPE))
    batch = stack_rows([row.batch for row in plain + packed])
    check_batch(batch, VOCAB)
    return texts, examples, packed, batch


@jax.jit
def run(model, batch):
    logits = jnp.einsum("btd,vd->btv", model(batch), model.unembedding_vd())
    logprob = token_logprobs(model, batch, model(batch)).logprob
    return logits, logprob, likelihood(logprob, batch.sequence_ids, SHAPE.sequences).score


def peer_logprobs(model, prompt, response):
    """Of each token of the response, after the prompt alone."""
    tokens = np.concatenate([prompt, response])
    logits = torch.tensor(peer_models.logits(model, tokens[None, :-1])[0])
    logprobs = torch.log_softmax(logits, -1).numpy()[len(prompt) - 1 :]
    return np.take_along_axis(logprobs, response[:, None].astype(np.int64), 1)[:, 0]


@pytest.mark.parametrize("name", peer_models.CASES)
def test_numbers_are_those_of_transformers(peer_model, name, record_property):
    peer, folder = peer_model(name)
    model, _ = hf.load(folder, ComputeConfig(dtype="float32"))
    texts, examples, packed, batch = rows()
    logits, logprobs, scores = (np.asarray(x) for x in run(model, batch))

    expected = peer_models.logits(peer, [text[:-1] for text in texts])
    difference = np.abs(logits[:2] - expected).max()
    record_property("max_abs_logit_difference", float(difference))
    print(f"{name}: max abs logit difference {difference:.2e} of {np.abs(expected).max():.1f}")
    assert difference < 2e-4

    for row, text in enumerate(texts):
        tokens = peer_logprobs(peer, text[:1], text[1:])
        np.testing.assert_allclose(logprobs[row], tokens, atol=2e-4)
        np.testing.assert_allclose(scores[row, 0], tokens.sum(), rtol=1e-4)
    compared = 0
    for row, packed_row in enumerate(packed, start=2):
        for sequence, (key, response) in enumerate(packed_row.origins):
            example = examples[key]
            alone = peer_logprobs(peer, example.prompt, example.responses[response])
            np.testing.assert_allclose(scores[row, sequence], alone.sum(), rtol=1e-4)
            compared += 1
    assert compared == 9


@pytest.mark.parametrize(
    "name", ["llama-llama3", "llama-linear", "llama-yarn", "mistral-window", "qwen2-windows"]
)
def test_the_feature_matters_in_the_model_that_tests_it(peer_model, name):
    """Otherwise parity would say nothing about rope scaling and windows."""
    peer, folder = peer_model(name)
    config = json.loads((folder / "config.json").read_text())
    theta = config["rope_parameters"]["rope_theta"]
    config["rope_parameters"] = {"rope_theta": theta, "rope_type": "default"}
    config |= {"use_sliding_window": False, "sliding_window": None}
    config.pop("layer_types", None)
    twin = type(peer)(type(peer.config)(**config)).eval()
    twin.load_state_dict(peer.state_dict())
    tokens = rows()[0][0][None, :-1]
    difference = np.abs(peer_models.logits(twin, tokens) - peer_models.logits(peer, tokens)).max()
    assert difference > 0.05


LLAMA_3_1_8B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}
QWEN2_5_YARN = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


CLASSIFIER = {"architectures": ["LlamaForSequenceClassification"]}


def test_known_models_have_their_known_sizes():
    llama = model_config(LLAMA_3_1_8B, "config.json")
    assert llama.num_parameters() == 8_030_261_248
    assert llama.head_dim == 128
    assert llama.rope_scaling.kind == "llama3"
    classifier = model_config(LLAMA_3_1_8B | CLASSIFIER | {"num_labels": 1}, "config.json")
    assert classifier.num_parameters() == llama.num_parameters() - 128256 * 4096
    qwen = model_config(QWEN2_5_YARN, "config.json")
    assert qwen.num_parameters() == 494_032_768
    assert qwen.qkv_bias and not qwen.output_bias and qwen.windows == ()
    assert qwen.rope_scaling.original_max_position == 32768


@pytest.mark.parametrize("values", [LLAMA_3_1_8B, QWEN2_5_YARN], ids=["llama", "qwen2"])
def test_both_spellings_of_rope_mean_the_same(values):
    rest = {k: v for k, v in values.items() if not k.startswith("rope_")}
    rope = values["rope_scaling"] | {"rope_theta": values["rope_theta"]}
    new = rest | {"rope_parameters": rope}
    assert model_config(new, "") == model_config(values, "")
    assert model_config(config_values(model_config(values, "")), "") == model_config(values, "")


def test_yarn_scale_from_mscale_is_that_of_transformers():
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "yarn", "factor": 8.0, "mscale": 0.7, "mscale_all_dim": 1.3}
    peer = LlamaConfig(**peer_models.BASE, rope_scaling=dict(rope))
    values = peer.to_dict() | {"architectures": ["LlamaForCausalLM"]}
    ours = model_config(values, "").rope_scaling
    assert ours.attention_factor == pytest.approx(ROPE_INIT_FUNCTIONS["yarn"](peer, None)[1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GemmaForCausalLM"]}, "'GemmaForCausalLM' is not supported; known: Ll"),
        ({"architectures": None, "model_type": "gemma"}, "'gemma' is not supported; known: llama"),
        ({"architectures": ["MistralForCausalLM"]}, "disagree"),
        ({"architectures": ["LlamaForTokenClassification"]}, "'LlamaForTokenClassification' is"),
        ({"architectures": ["GemmaForSequenceClassification"]}, "known: LlamaForSequenceClassific"),
        (CLASSIFIER, "a classifier with 2 labels .* num_labels=1"),
        (CLASSIFIER | {"num_labels": 3}, "a classifier with 3 labels"),
        (CLASSIFIER | {"id2label": {"0": "a", "1": "b"}, "num_labels": 1}, "with 2 labels"),
        (CLASSIFIER | {"num_labels": 1, "model_type": "qwen2"}, "disagree"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type 'dynamic' is not"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope type 'longrope' is not"),
        ({"rope_scaling": {"rope_type": "linear"}}, "field 'factor' is missing"),
        ({"rope_scaling": {"full_attention": {}}}, "not one set for all layers"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"quantization_config": {"bits": 4}}, "quantized"),
        ({"hidden_size": None}, "field 'hidden_size' is missing"),
        ({"hidden_size": "4096"}, "field 'hidden_size' is '4096'; it must be an integer"),
        ({"tie_word_embeddings": "no"}, "must be true or false"),
        ({"num_key_value_heads": 5}, "num_kv_heads must divide num_heads"),
    ],
)
def test_what_is_not_supported_is_named(changes, message):
    with pytest.raises(UserError, match=message):
        model_config(LLAMA_3_1_8B | changes, "somewhere/config.json")


def test_qwen_windows_need_a_size_and_known_layer_types():
    kinds = ["full_attention"] * 23
    for changes, message in (
        ({"layer_types": [*kinds, "sliding_attention"]}, "use_sliding_window is false"),
        ({"layer_types": kinds}, "23 entries for 24 layers"),
        ({"layer_types": [*kinds, "linear_attention"]}, "linear_attention"),
    ):
        with pytest.raises(UserError, match=message):
            model_config(QWEN2_5_YARN | changes, "config.json")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ModelConfig(family="llama", windows=(4,) * 8), "llama checkpoint cannot express.*windows"),
        (ModelConfig(family="qwen3", qk_norm=True, windows=(4, 8) * 4), "windows"),
        (ModelConfig(family="qwen2"), "qkv_bias=False"),
        (ModelConfig(family="mistral", qk_norm=True), "qk_norm=True"),
        (ModelConfig(family="llama", output_bias=True), "output_bias=True"),
    ],
)
def test_a_model_that_its_family_cannot_express_is_named(config, message):
    with pytest.raises(UserError, match=message):
        config_values(config)


@st.composite
def model_configs(draw):
    """Models that their family can express."""
    family = draw(st.sampled_from(["llama", "mistral", "qwen2", "qwen3"]))
    layers, heads = draw(st.integers(1, 4)), draw(st.sampled_from([1, 2, 3]))
    bias = family in ("llama", "qwen3") and draw(st.booleans())
    window = 0 if family == "llama" else draw(st.integers(0, 9))
    one = st.sampled_from([0, window])
    free = family.startswith("qwen")
    windows = tuple(draw(one) if free else window for _ in range(layers))
    scalings = (
        RopeScaling(),
        RopeScaling(kind="linear", factor=2.0),
        RopeScaling(kind="llama3", factor=8.0, original_max_position=draw(st.integers(1, 99))),
        RopeScaling(kind="yarn", factor=2.0, attention_factor=draw(st.sampled_from([0.0, 1.5]))),
    )
    return ModelConfig(
        family=family,
        vocab_size=draw(st.integers(1, 9)),
        hidden_size=draw(st.integers(1, 9)),
        num_layers=layers,
        num_heads=2 * heads,
        num_kv_heads=draw(st.sampled_from([heads, 2])),
        head_dim=2 * draw(st.integers(1, 3)),
        intermediate_size=draw(st.integers(1, 9)),
        rope_theta=draw(st.sampled_from([100.0, 1e6])),
        rope_scaling=draw(st.sampled_from(scalings)),
        tie_embeddings=draw(st.booleans()),
        has_unembedding=draw(st.booleans()),
        qkv_bias=bias or family == "qwen2",
        output_bias=bias,
        mlp_bias=family == "llama" and draw(st.booleans()),
        qk_norm=family == "qwen3",
        windows=windows if any(windows) else (),
    )


@settings(max_examples=60, deadline=None)
@given(model_configs())
def test_a_config_goes_round(config):
    values = json.loads(json.dumps(config_values(config)))
    assert model_config(values, "config.json") == config


@settings(max_examples=60, deadline=None)
@given(model_configs(), st.sampled_from(sorted({**BLOCK_TENSORS, **MODEL_TENSORS})), st.data())
def test_a_part_read_from_a_tensor_is_the_part_of_the_weight(config, weight, data):
    """The two directions of the table are inverse to each other, on any cut of the weight."""
    dims = {**BLOCK_DIMS, **MODEL_DIMS}[weight]
    shape = shape_of(dims, config)
    array = np.arange(np.prod(shape)).reshape(shape)
    index = []
    for dim, size in zip(dims, shape, strict=True):
        start = 0 if dim == "E" else data.draw(st.integers(0, size - 1))
        stop = size if dim == "E" else data.draw(st.integers(start + 1, size))
        index.append(slice(start, stop))
    slices, part_shape, order = tensor_part(weight, tuple(index), config)
    tensor = to_tensor(weight, array, config)
    part = tensor[slices].reshape(part_shape).transpose(order)
    np.testing.assert_array_equal(part, array[tuple(index)])
