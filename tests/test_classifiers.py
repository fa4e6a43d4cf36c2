"""Sequence classifiers, in and out: scores are transformers' own, whatever the padding is."""

import functools
import json
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import peer_models
import pytest
import tiny
import torch
import transformers
from peer_models import assert_same_tensors, tensors
from safetensors.numpy import load_file, save_file

from gram_jax import hf, hf_export
from gram_jax.checkpoints import load_model
from gram_jax.config import ComputeConfig
from gram_jax.data.judge import JudgeTemplate, Texts, label_ids, render_comparison
from gram_jax.data.tokenizer import Tokenizer
from gram_jax.errors import UserError
from gram_jax.model_card import export_checkpoint
from gram_jax.models.adapters import Adapters, attach
from gram_jax.models.classifiers import classifier, judge_classifier
from gram_jax.reward_model import check_reading, stored_settings
from gram_jax.scorer import Question, RewardSettings, Scorer

COMPUTE = ComputeConfig(dtype="float32")
FAMILIES = {
    "llama": ("Llama", {"attention_bias": True}),
    "mistral": ("Mistral", {"sliding_window": 7}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
}
# Of unlike lengths, so that batches are padded; the last one holds special tokens.
RESPONSES = ["w9", "w5 w6 w7 w8", "w12 w3 w3 w40 w41 w42 w43 w44 w45", "w80 w81 <s> w82 <pad> w83"]
PROMPT, END = "w20 w21 w22", 2


_WORDS = peer_models.tokenizer()
SEQUENCES = [_WORDS.encode_prompt(PROMPT) + _WORDS.encode_response(r) for r in RESPONSES]
LENGTHS = np.array([len(ids) for ids in SEQUENCES])


def padded(pad_id):
    """[B, T] ids, padded on the right, and where tokens are."""
    width = LENGTHS.max()
    tokens = np.array([ids + [pad_id] * (width - len(ids)) for ids in SEQUENCES])
    return tokens, np.arange(width) < LENGTHS[:, None]


def load_peer(folder, dtype=torch.float32):
    auto = transformers.AutoModelForSequenceClassification
    return auto.from_pretrained(folder, dtype=dtype).eval()


def peer_scores(model):
    """(of one padded batch, of each sequence by itself), [B] each, as transformers gives them."""
    tokens, here = padded(model.config.pad_token_id)
    with torch.inference_mode():
        together = model(torch.tensor(tokens), attention_mask=torch.tensor(here).long()).logits
        alone = [model(torch.tensor([ids])).logits[0, 0].item() for ids in SEQUENCES]
    assert together.shape == (len(SEQUENCES), 1)
    return together[:, 0].float().numpy(), np.array(alone)


def our_scores(loaded, **changes):
    settings = RewardSettings(reading="head", row_length=64, batch_rows=1, **changes)
    (verdict,) = Scorer(loaded, settings).score([Question(PROMPT, RESPONSES)])
    return verdict.rewards


def assert_close(ours, theirs, rtol=1e-5):
    assert np.ptp(theirs) > 0.1
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=rtol * max(1, np.abs(theirs).max()))


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """``published(family)``: a classifier made by transformers, and its folder."""
    root = tmp_path_factory.mktemp("published")

    @functools.cache
    def make(name):
        family, changes = FAMILIES[name]
        model = peer_models.build(
            family, {**changes, "num_labels": 1}, seed=len(name), kind="SequenceClassification"
        )
        model.save_pretrained(root / name)
        peer_models.tokenizer().save(root / name)
        return model, root / name

    return make


@pytest.mark.parametrize("name", FAMILIES)
def test_a_published_classifier_scores_as_in_transformers(published, name):
    peer, folder = published(name)
    loaded = load_model(folder, COMPUTE)
    assert stored_settings(folder).reading == "head" and stored_settings(folder).add_eos
    together, alone = peer_scores(peer)
    ours = our_scores(loaded)
    assert_close(ours, alone)
    assert_close(ours, together)


@pytest.fixture(scope="module")
def exported(published, tmp_path_factory):
    """The published classifiers, in and out again."""
    root = tmp_path_factory.mktemp("exported")
    for name in FAMILIES:
        export_checkpoint(published(name)[1], root / name)
    return root


@pytest.mark.parametrize("name", FAMILIES)
def test_import_and_export_give_the_same_folder(published, exported, name):
    peer, source = published(name)
    out = exported / name
    assert_same_tensors(out, source)
    before, after = (json.loads((f / "config.json").read_text()) for f in (source, out))
    assert {key: after[key] for key in before} == before
    assert "problem_type" not in after  # what servers do with a published model stays as it is
    assert after["id2label"] == {"0": "LABEL_0"}
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert not (out / "generation_config.json").exists()
    for one, other in zip(peer_scores(load_peer(out)), peer_scores(peer), strict=True):
        assert_close(one, other, 1e-6)


def exported_head(folder, tokenizer=None, info=None, **changes):
    """A language model with a head, as bradley_terry trains it, exported."""
    model = attach(tiny.decoder(tiny.config(vocab_size=96, **changes)), Adapters(head=True), seed=3)
    model.head[...] = 50 * model.head[...]  # as a trained one, which is not near 0
    arguments = {"card": "", "gram_config": {"reward": "head"}, "info": info}
    hf_export.export(model, folder, tokenizer=tokenizer or peer_models.tokenizer(), **arguments)
    return model


def without_padding(padding=None, template=None, bos="<s>"):
    """The word tokenizer with another padding token, as released ones have it."""
    names = {"bos_token": bos, "eos_token": "</s>", "pad_token": padding}
    names = {name: token for name, token in names.items() if token}
    return Tokenizer(_WORDS._content, names, template, "the test's tokenizer")


PADDING = {
    "its own": (without_padding("<pad>"), 0),
    "none": (without_padding(None), 1),
    "the end token": (without_padding("</s>"), 1),
    "the end token, no BOS": (without_padding("</s>", bos=None), 0),
}


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    """Exports of one head with the tokenizers of `PADDING`, by name."""
    root = tmp_path_factory.mktemp("heads")
    for name, (tokenizer, _) in PADDING.items():
        exported_head(root / name, tokenizer, tie_embeddings=name == "none")
    return root


@pytest.mark.parametrize("name", PADDING)
def test_a_head_is_read_at_the_end_token_by_transformers_too(heads, name):
    """Also where padding was the end token, at which transformers would never read."""
    folder, pad_id = heads / name, PADDING[name][1]
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert config["id2label"] == {"0": "reward"} and config["label2id"] == {"reward": 0}
    assert config["pad_token_id"] == pad_id and config["problem_type"] == "regression"
    assert Tokenizer.load(folder).pad_id == pad_id
    assert transformers.AutoTokenizer.from_pretrained(folder).pad_token_id == pad_id
    assert not (folder / "generation_config.json").exists()
    names = tensors(folder).keys()
    assert "score.weight" in names and "lm_head.weight" not in names
    peer = load_peer(folder)
    assert peer.config.num_labels == 1
    ours = our_scores(load_model(folder, COMPUTE))
    for theirs in peer_scores(peer):
        assert_close(ours, theirs)


def test_transformers_4_57_reads_what_is_exported(published, exported, heads, tmp_path):
    """A padded batch, and each sequence by itself."""
    root = tmp_path / "all"
    root.mkdir()
    saved = {}
    for folder in [*exported.iterdir(), *heads.iterdir()]:
        (root / folder.name).symlink_to(folder)
        saved[folder.name] = peer_scores(load_peer(folder))[1][:, None].astype(np.float32)
    np.savez(tmp_path / "scores.npz", tokens=padded(0)[0], lengths=LENGTHS, **saved)
    differences = peer_models.differences_457(tmp_path / "scores.npz", root)
    assert differences.keys() == FAMILIES.keys() | PADDING.keys()
    assert max(differences.values()) < 2e-5, differences


def test_a_tokenizer_whose_special_tokens_all_end_responses_is_refused(tmp_path):
    template = "{{ bos_token }}<s><pad>{{ messages[0].content }}"
    tokenizer = without_padding("</s>", template, bos=None)
    with pytest.raises(UserError, match="needs a padding token that ends no response"):
        exported_head(tmp_path / "out", tokenizer)


def test_a_published_classifier_that_pads_with_the_end_token_is_read_before_it(published, tmp_path):
    """So it was trained: transformers takes the end token of a sequence for padding."""
    source = published("llama")[1]
    folder = Path(shutil.copytree(source, tmp_path / "in"))
    without_padding("</s>").save(folder)
    peer_models.edit_json(folder / "config.json", pad_token_id=END)
    settings = stored_settings(folder)
    assert settings.reading == "head" and not settings.add_eos
    theirs = peer_scores(load_peer(folder))
    ours = our_scores(load_model(folder, COMPUTE), add_eos=settings.add_eos)
    assert_close(ours, theirs[0])
    assert_close(ours, theirs[1])
    assert np.abs(ours - our_scores(load_model(source, COMPUTE))).max() > 0.1
    out = export_checkpoint(folder, tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["pad_token_id"] == END
    assert stored_settings(out) == settings


def test_dtypes_stay_and_a_new_head_is_not_rounded(published, tmp_path):
    peer, _ = published("qwen3")
    twin = type(peer)(peer.config).to(torch.bfloat16)
    twin.load_state_dict(peer.state_dict())
    twin.save_pretrained(tmp_path / "in")
    peer_models.tokenizer().save(tmp_path / "in")
    out = export_checkpoint(tmp_path / "in", tmp_path / "out")
    assert_same_tensors(out, tmp_path / "in")
    info = hf.HfInfo(config={}, dtype="bfloat16")
    model = exported_head(tmp_path / "head", info=info)
    found = tensors(tmp_path / "head")
    np.testing.assert_array_equal(found.pop("score.weight"), np.asarray(model.head[...])[None])
    assert {tensor.dtype for tensor in found.values()} == {np.dtype(ml_dtypes.bfloat16)}
    assert load_peer(tmp_path / "head", "auto").score.weight.dtype == torch.bfloat16


TEMPLATE = """
labels = [" w11", " w12"]
prompt = "w30 {question} w31 {response_a} w32 {response_b} w33"
"""


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def judge(request, tmp_path_factory):
    """A language model's folder that says it is a judge, and transformers' model of it."""
    folder = tmp_path_factory.mktemp("judge") / "in"
    peer = peer_models.build(*FAMILIES[request.param], seed=7)
    peer.save_pretrained(folder)
    without_padding().save(folder)
    (folder.parent / "judge.toml").write_text(TEMPLATE)
    template = JudgeTemplate.load(folder.parent / "judge.toml")
    described = {"reward": "judge", "judge": {"template": template.to_dict()}}
    (folder / "gram_config.json").write_text(json.dumps(described))
    return folder, peer, template


def log_odds(folder):
    settings = stored_settings(folder)
    assert settings.reading == "judge"
    scorer = Scorer(load_model(folder, COMPUTE), settings)
    (verdict,) = scorer.score([Question(PROMPT, RESPONSES[:3], [(0, 1), (2, 1), (0, 2)])])
    return np.stack([verdict.forward, verdict.backward])


def test_a_judge_goes_out_as_a_language_model_or_as_a_classifier(judge, tmp_path):
    folder, peer, template = judge
    tokenizer = Tokenizer.load(folder)
    plain = export_checkpoint(folder, tmp_path / "plain")
    assert_same_tensors(plain, folder)
    described = json.loads((plain / "gram_config.json").read_text())
    assert described["reward"] == "judge"
    assert described["judge"]["template"] == template.to_dict()
    assert tuple(described["judge"]["labels"]) == label_ids(template, tokenizer) == (11, 12)
    out = export_checkpoint(plain, tmp_path / "out", classifier=True)
    assert json.loads((out / "gram_config.json").read_text()) == described
    assert "judge prompts" in " ".join((out / "README.md").read_text().split())
    score = tensors(out)["score.weight"]
    w = peer.get_output_embeddings().weight.detach().numpy()
    np.testing.assert_array_equal(score, w[11:12] - w[12:13])
    # z_A - z_B of the judge prompt, by both classes of transformers.
    text = render_comparison(template, Texts(PROMPT, *RESPONSES[:2]), tokenizer).text
    words = transformers.PreTrainedTokenizerFast.from_pretrained(out)
    ids = torch.tensor([words(text).input_ids])
    with torch.inference_mode():
        z = peer(ids).logits[0, -1].double()
        found = load_peer(out)(ids).logits[0, 0].item()
    assert found == pytest.approx((z[11] - z[12]).item(), rel=1e-5, abs=1e-5)
    ours = log_odds(out)
    assert ours[0, 0] == pytest.approx(found, rel=1e-5, abs=1e-5)
    np.testing.assert_allclose(ours, log_odds(folder), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(log_odds(plain), log_odds(folder), rtol=1e-6)
    again = export_checkpoint(out, tmp_path / "again", classifier=True)
    assert_same_tensors(again, out)


def test_a_bfloat16_judge_keeps_its_difference_exact_in_the_folder(judge, tmp_path):
    """Whoever reads the folder in bfloat16 rounds it, once."""
    folder, peer, _ = judge
    shutil.copytree(folder, tmp_path / "in")
    twin = type(peer)(peer.config).to(torch.bfloat16)
    twin.load_state_dict(peer.state_dict())
    twin.save_pretrained(tmp_path / "in")
    out = export_checkpoint(tmp_path / "in", tmp_path / "out", classifier=True)
    w = twin.get_output_embeddings().weight.detach()
    exact = (w[11].double() - w[12].double()).numpy()
    (score,) = tensors(out)["score.weight"]
    assert score.dtype == np.float32
    np.testing.assert_array_equal(score.astype(np.float64), exact)
    read = load_peer(out, "auto").score.weight[0].detach()
    assert read.dtype == torch.bfloat16
    assert 0 < np.abs(read.double().numpy() / exact - 1).max() <= 2**-8


def test_sharded_weights_come_in_and_go_out(published, tmp_path):
    mesh = tiny.mesh(2, 2, 2)
    source = published("llama")[1]
    model, info = hf.load(source, COMPUTE, mesh)
    assert model.head[...].sharding.mesh == mesh
    one, _ = hf.load(source, COMPUTE)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), b), model, one)
    hf_export.export(
        model, tmp_path / "out", tokenizer=peer_models.tokenizer(), info=info, card="",
        gram_config={},
    )  # fmt: skip
    assert_same_tensors(tmp_path / "out", source)
    spread, whole = (judge_classifier(tiny.decoder(mesh=m), (7, 11)) for m in (mesh, None))
    expected = tiny.decoder().unembedding[...]
    np.testing.assert_array_equal(np.asarray(whole.head[...]), expected[7] - expected[11])
    np.testing.assert_array_equal(np.asarray(spread.head[...]), np.asarray(whole.head[...]))
    assert spread.head[...].sharding.is_fully_replicated


def test_a_classifier_has_no_log_probs_and_says_so(published):
    folder = published("qwen2")[1]
    loaded = load_model(folder, COMPUTE)
    assert loaded.model.config.tie_embeddings and not loaded.model.config.has_unembedding
    with pytest.raises(UserError, match="sequence classifier, without an unembedding") as error:
        Scorer(loaded, RewardSettings(reading="likelihood"))
    assert "\n" not in str(error.value)
    for asked in ("likelihood", "judge"):
        with pytest.raises(UserError, match=f"--reward={asked}: .*the reward of a head"):
            check_reading(folder, "head", asked)
    check_reading(folder, "head", "head")


def test_only_a_judge_or_a_head_becomes_a_classifier(peer_model, tmp_path):
    with pytest.raises(UserError, match="--classifier: the reward of this model is a likelihood"):
        export_checkpoint(peer_model("llama")[1], tmp_path / "out", classifier=True)


def test_a_head_and_its_trunk_are_all_that_is_left():
    model = attach(tiny.decoder(), Adapters(head=True), seed=0)
    small = classifier(model)
    assert not hasattr(small, "unembedding") and hasattr(model, "unembedding")
    assert model.config.has_unembedding
    size = sum(leaf.size for leaf in jax.tree.leaves(small))
    assert size == small.config.num_parameters() + small.config.hidden_size


def test_tensors_that_do_not_fit_are_named(published, tmp_path):
    folder = Path(shutil.copytree(published("llama")[1], tmp_path / "in"))
    weights = folder / "model.safetensors"
    original = load_file(weights)
    two = np.zeros((2, 32), np.float32)
    for changes, words in (
        ({"score.bias": np.zeros(1, np.float32)}, "tensor score.bias: .* remove this tensor"),
        ({"score.weight": two}, r"tensor score.weight has shape \[2, 32\].* says \[1, 32\]"),
        ({"score.weight": None}, r"tensor score.weight of shape \[1, 32\] is in none of"),
        ({"lm_head.weight": two}, r"does not have: lm_head.weight \(model.safetensors\)"),
    ):
        found = {k: v for k, v in {**original, **changes}.items() if v is not None}
        save_file(found, weights, metadata={"format": "pt"})
        with pytest.raises(UserError, match=words):
            hf.load(folder, COMPUTE)
