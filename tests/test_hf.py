"""Hugging Face folders come in exactly, go out unchanged, and say what is wrong with them."""

import functools
import json
import shutil
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import peer_models
import pytest
import torch
from peer_models import assert_same_tensors
from safetensors.numpy import load_file, save_file

from gram_jax import hf, hf_export
from gram_jax.config import ComputeConfig, MeshConfig, ModelConfig
from gram_jax.data.tokenizer import Tokenizer
from gram_jax.errors import UserError
from gram_jax.mesh import make_mesh, weight_spec
from gram_jax.models.decoder import abstract_decoder, weight_dims
from gram_jax.models.families import tensor_shapes

COMPUTE = ComputeConfig(dtype="float32")


def export(model, folder, info, **changes):
    arguments = {
        "tokenizer": peer_models.tokenizer(),
        "info": info,
        "card": "# A model\n",
        "gram_config": {"reward": "likelihood"},
    }
    hf_export.export(model, folder, **arguments | changes)
    return folder


@pytest.fixture(scope="module")
def exported(peer_model, tmp_path_factory):
    """``exported(name)``: that peer's folder, imported and exported again."""
    root = tmp_path_factory.mktemp("exported")

    @functools.cache
    def make(name):
        model, info = hf.load(peer_model(name)[1], COMPUTE)
        return export(model, root / name, info)

    return make


@pytest.fixture
def folder(peer_model, tmp_path):
    """A llama folder that a test may damage."""
    return Path(shutil.copytree(peer_model("llama")[1], tmp_path / "llama"))


@pytest.mark.parametrize("name", peer_models.CASES)
def test_import_and_export_give_the_same_folder(peer_model, exported, name):
    peer, source = peer_model(name)
    out = exported(name)
    assert_same_tensors(out, source)
    before, after = (json.loads((f / "config.json").read_text()) for f in (source, out))
    assert {key: after[key] for key in before} == before
    assert after["dtype"] == after["torch_dtype"] == "float32"
    for file in ("generation_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (out / file).read_bytes().strip() == (source / file).read_bytes().strip()
    assert (out / "README.md").read_text() == "# A model\n"
    assert json.loads((out / "gram_config.json").read_text()) == {"reward": "likelihood"}
    tokens = np.arange(3, 51)[None]
    again = peer_models.logits(peer_models.load(out), tokens)
    np.testing.assert_array_equal(again, peer_models.logits(peer, tokens))


def test_transformers_4_57_reads_what_is_exported(peer_model, exported, tmp_path):
    tokens = np.random.default_rng(1).integers(3, peer_models.VOCAB, (2, peer_models.LENGTH))
    saved = {name: peer_models.logits(peer_model(name)[0], tokens) for name in peer_models.CASES}
    root = {exported(name).parent for name in peer_models.CASES}
    np.savez(tmp_path / "logits.npz", tokens=tokens, **saved)
    differences = peer_models.differences_457(tmp_path / "logits.npz", root.pop())
    assert differences.keys() == peer_models.CASES.keys()
    assert max(differences.values()) < 2e-5, differences


@pytest.mark.parametrize("kind", ["bfloat16", "float16", "norms-float32"])
def test_each_tensor_goes_out_in_the_dtype_it_came_in(peer_model, tmp_path, kind):
    _, source = peer_model("qwen3-tied")
    peer = peer_models.load(source).to(torch.float16 if kind == "float16" else torch.bfloat16)
    if kind == "norms-float32":
        for name, weight in peer.named_parameters():
            if name.endswith("norm.weight"):
                weight.data = weight.data.float() + 1e-5
    peer.save_pretrained(tmp_path / "in")
    model, info = hf.load(tmp_path / "in", COMPUTE)
    assert {leaf.dtype for leaf in jax.tree.leaves(model)} == {np.dtype(np.float32)}
    assert info.dtype == ("float16" if kind == "float16" else "bfloat16")
    assert (info.exceptions != {}) == (kind == "norms-float32")
    info = hf.HfInfo.from_json(json.loads(json.dumps(info.to_json())))
    out = export(model, tmp_path / "out", info)
    assert_same_tensors(out, tmp_path / "in")
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == info.dtype


def test_weights_in_several_files_go_both_ways(peer_model, tmp_path):
    peer, whole = peer_model("llama")
    peer.save_pretrained(tmp_path / "in", max_shard_size="20KB")
    assert len(list((tmp_path / "in").glob("*.safetensors"))) > 2
    model, info = hf.load(tmp_path / "in", COMPUTE)
    out = export(model, tmp_path / "out", info, max_shard_bytes=20_000)
    assert_same_tensors(out, whole)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    theirs = json.loads((tmp_path / "in" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == theirs["metadata"]
    assert {path.name for path in out.glob("*.safetensors")} == set(index["weight_map"].values())
    assert max(path.stat().st_size for path in out.glob("*.safetensors")) < 25_000
    tokens = np.arange(3, 51)[None]
    again = peer_models.logits(peer_models.load(out), tokens)
    np.testing.assert_array_equal(again, peer_models.logits(peer, tokens))


def random_decoder(config):
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32),
        abstract_decoder(config, COMPUTE),
    )


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))


@pytest.mark.parametrize("name", ["llama-biases", "qwen3-tied"])
def test_weights_come_in_sharded_with_the_same_values(peer_model, mesh, tmp_path, name):
    _, source = peer_model(name)
    model, info = hf.load(source, COMPUTE, mesh)
    one, _ = hf.load(source, COMPUTE)
    paths = jax.tree_util.tree_flatten_with_path(model)[0]
    for (path, weight), other in zip(paths, jax.tree.leaves(one), strict=True):
        assert weight.sharding.mesh == mesh
        assert weight.sharding.spec == weight_spec(weight_dims(path)), path
        np.testing.assert_array_equal(np.asarray(weight), np.asarray(other))
    assert_same_tensors(export(model, tmp_path / "out", info), source)


def test_two_stacks_are_exported_as_one_model(peer_model, tmp_path):
    _, source = peer_model("qwen3-windows")
    model, info = hf.load(source, COMPUTE)
    assert_same_tensors(export(model.split_stacks(1), tmp_path / "out", info), source)


def test_each_device_reads_only_its_share(mesh, tmp_path, monkeypatch):
    """Host memory: what the shards take, and less than twice the largest tensor beside it."""
    config = ModelConfig(
        vocab_size=4096, hidden_size=256, num_layers=3, num_heads=8, num_kv_heads=4, head_dim=32,
        intermediate_size=512,
    )  # fmt: skip
    model = random_decoder(config)
    source = export(model, tmp_path / "in", None, max_shard_bytes=2**22)
    sizes = {name: 4 * int(np.prod(shape)) for name, shape in tensor_shapes(config).items()}
    total, largest = sum(sizes.values()), max(sizes.values())
    reads = []
    read = hf._Tensors.read

    def recorded(self, name, slices):
        part = read(self, name, slices)
        reads.append((name, part.nbytes))
        return part

    monkeypatch.setattr(hf._Tensors, "read", recorded)
    tracemalloc.start()
    model, _ = hf.load(source, COMPUTE, mesh)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 1.05 * total
    assert peak - kept < 2 * largest
    # Matrices are split over fsdp and tensor, and the replicas over data read nothing again.
    for name, size in reads:
        if sizes[name] >= 4 * 256 * 128:
            assert size == sizes[name] // 4, name
    assert sum(size for _, size in reads) <= 1.05 * total
    del model


def test_a_model_of_our_own_becomes_a_folder(tmp_path):
    config = ModelConfig(
        family="qwen3", vocab_size=100, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2,
        head_dim=8, intermediate_size=48, qk_norm=True, windows=(0, 8),
    )  # fmt: skip
    model = random_decoder(config)
    out = export(model, tmp_path / "out", None)
    again, info = hf.load(out, COMPUTE)
    assert again.config == config
    for one, other in zip(jax.tree.leaves(model), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
    assert info.config["eos_token_id"] == info.generation_config["eos_token_id"] == 2
    assert peer_models.load(out).config.sliding_window == 8
    assert Tokenizer.load(out).fingerprint() == peer_models.tokenizer().fingerprint()
    assert hf.is_hf_folder(out) and not hf.is_hf_folder(tmp_path)


def test_unknown_fields_of_the_config_survive(folder, tmp_path):
    peer_models.edit_json(folder / "config.json", my_field={"a": [1]}, eos_token_id=[2, 5])
    model, info = hf.load(folder, COMPUTE)
    out = export(model, tmp_path / "out", info)
    values = json.loads((out / "config.json").read_text())
    assert values["my_field"] == {"a": [1]}
    assert values["eos_token_id"] == [2, 5]


def test_a_folder_in_either_spelling_goes_out_in_both(folder, tmp_path):
    rope = {"rope_type": "linear", "factor": 2.0}
    old = {"rope_theta": 500.0, "rope_scaling": rope, "rope_parameters": None}
    new = {"rope_theta": None, "rope_scaling": None, "rope_parameters": rope | {"rope_theta": 500}}
    for number, spelling in enumerate((old, new)):
        peer_models.edit_json(folder / "config.json", **spelling)
        model, info = hf.load(folder, COMPUTE)
        out = export(model, tmp_path / str(number), info)
        values = json.loads((out / "config.json").read_text())
        assert values["rope_theta"] == 500
        assert values["rope_scaling"] == rope
        assert values["rope_parameters"] == rope | {"rope_theta": 500}


def rewrite(folder, **changes):
    """Changes tensors of model.safetensors; None removes."""
    found = load_file(folder / "model.safetensors") | changes
    found = {name: tensor for name, tensor in found.items() if tensor is not None}
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})


def assert_refused(folder, *words):
    with pytest.raises(UserError) as caught:
        hf.load(folder, COMPUTE)
    assert all(word in str(caught.value) for word in words), str(caught.value)


O_PROJ = "model.layers.1.self_attn.o_proj.weight"


def test_tensors_that_do_not_fit_the_config_are_named(folder):
    original = load_file(folder / "model.safetensors")
    cases = (
        ({O_PROJ: None}, (O_PROJ, "[32, 32]", "in none of model.safetensors")),
        ({O_PROJ: np.zeros((32, 16), np.float32)}, (O_PROJ, "[32, 16]", "says [32, 32]")),
        ({O_PROJ: np.zeros((32, 32), np.int8)}, (O_PROJ, "I8", "known: F32, BF16, F16")),
        ({"score.weight": np.zeros((1, 32), np.float32)}, ("score.weight (model.safetensors)",)),
    )
    for changes, words in cases:
        rewrite(folder, **changes)
        assert_refused(folder, str(folder), *words)
        save_file(original, folder / "model.safetensors", metadata={"format": "pt"})


def test_tensors_that_transformers_ignores_are_ignored(peer_model, tmp_path):
    folder = Path(shutil.copytree(peer_model("llama-tied")[1], tmp_path / "tied"))
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    rewrite(folder, **{"lm_head.weight": embedding}, **buffer)
    hf.load(folder, COMPUTE)
    rewrite(folder, **{"lm_head.weight": embedding + 1})
    assert_refused(folder, "lm_head.weight", "ties the embeddings, but the two tensors differ")


def test_damaged_files_are_named(peer_model, folder, tmp_path):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert_refused(folder, str(weights), "not a readable safetensors file")
    weights.unlink()
    assert_refused(folder, str(weights), "missing")
    (folder / "pytorch_model.bin").touch()
    assert_refused(folder, "PyTorch's format")
    (folder / "config.json").write_text("{")
    assert_refused(folder, "config.json", "not readable as JSON")
    (folder / "config.json").unlink()
    assert_refused(folder, "config.json", "missing; this is not a Hugging Face folder")

    sharded = tmp_path / "sharded"
    peer_model("llama")[0].save_pretrained(sharded, max_shard_size="20KB")
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    content = first.read_bytes()
    shutil.copy(second, first)
    assert_refused(sharded, first.name, "no tensor", "model.safetensors.index.json puts there")
    first.unlink()
    assert_refused(sharded, str(first), "which model.safetensors.index.json lists, is missing")
    first.write_bytes(content)
    hf.load(sharded, COMPUTE)


def test_a_mesh_that_does_not_divide_the_model_is_refused(peer_model):
    mesh = make_mesh(MeshConfig(data=1, fsdp=1, tensor=8))
    with pytest.raises(UserError, match=r"num_heads=4 does not divide by mesh axis tensor=8"):
        hf.load(peer_model("llama")[1], COMPUTE, mesh)


def test_an_export_is_whole_or_absent(peer_model, tmp_path):
    model, info = hf.load(peer_model("llama")[1], COMPUTE)
    model.norm[...] = model.norm[...].at[3].set(np.nan)
    with pytest.raises(UserError, match=r"model\.norm\.weight has values that are not finite"):
        export(model, tmp_path / "a" / "out", info)
    assert list((tmp_path / "a").iterdir()) == []


def test_an_export_does_not_touch_what_is_there(peer_model, tmp_path):
    model, info = hf.load(peer_model("llama")[1], COMPUTE)
    (tmp_path / "file").write_text("mine")
    for target in (tmp_path, tmp_path / "file"):
        with pytest.raises(UserError, match="exists and is not an empty folder"):
            export(model, target, info)
    (tmp_path / "empty").mkdir()
    export(model, tmp_path / "empty", info)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file"]


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(peer_model, tmp_path):
    model, info = hf.load(peer_model("llama")[1], COMPUTE)
    larger = peer_models.tokenizer(peer_models.VOCAB + 1)
    with pytest.raises(UserError, match=r"ids up to 96; the model's vocabulary ends at 95"):
        export(model, tmp_path / "out", info, tokenizer=larger)
