"""Token ids are those of transformers, folders go round unchanged, and no token comes twice."""

import json
import os

import numpy as np
import peer_tokenizers
import pytest

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from gram_jax.data.builtin import reference_topics
from gram_jax.data.tokenizer import BOS, EOS, PAD, Tokenizer
from gram_jax.errors import UserError

TEXTS = ["def f(x):\n    return  x\n", "naïve café \U0001f642 日本語\u2028", " a", "a", "<|eos|> b"]


@pytest.fixture(scope="module")
def corpus():
    return [topic.text for topic in reference_topics()][:20]


@pytest.fixture(scope="module")
def trained(corpus):
    return Tokenizer.train(corpus, 600, chat_template="{{ messages[0].content }}")


@pytest.fixture
def folder(trained, tmp_path):
    trained.save(tmp_path)
    return tmp_path


def edit(path, **changes):
    config = json.loads(path.read_text())
    config.update(changes)
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def peer(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def test_training_twice_gives_the_same_tokenizer(corpus, trained):
    again = Tokenizer.train(corpus, 600, chat_template=trained.chat_template)
    assert again.fingerprint() == trained.fingerprint()
    assert trained.vocab_size == 600
    assert (trained.bos_id, trained.eos_id, trained.pad_id) == (0, 1, 2)
    assert trained.special_tokens == {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}


def test_every_text_comes_back_from_its_ids(trained):
    for text in TEXTS:
        assert trained.decode(trained.encode_response(text, add_eos=False)) == text
        assert trained.decode(trained.encode_prompt(text), skip_special_tokens=False) == BOS + text


@pytest.mark.parametrize("name", ["ours", *peer_tokenizers.SPECIALS])
def test_pieces_of_a_text_are_one_a_token_and_join_to_it(name, trained, corpus):
    tokenizer = trained if name == "ours" else peer_tokenizers.make(name, corpus)
    for text in [*TEXTS, "Größe: ½ 😀 naïve\n  日本 \ufffd é", "😀" * 5]:
        ids = tokenizer.encode_response(text)
        pieces = tokenizer.pieces(ids)
        assert len(pieces) == len(ids)
        assert "".join(pieces) == tokenizer.decode(ids)
    words = tokenizer.encode_response("a list of things", add_eos=False)
    assert all(tokenizer.pieces(words))
    assert tokenizer.pieces([]) == []


def test_ids_are_those_of_transformers(folder, trained):
    other = peer(folder)
    assert (other.bos_token_id, other.eos_token_id, other.pad_token_id) == (0, 1, 2)
    for text in TEXTS:
        assert trained.encode_prompt(text) == other(text)["input_ids"]
        plain = other(text, add_special_tokens=False)["input_ids"]
        assert trained.encode_response(text, add_eos=False) == plain
        assert trained.decode(plain) == other.decode(plain)


def test_a_prompt_gets_its_prefix_once_and_never_a_suffix(trained):
    assert trained.encode_prompt("a")[0] == trained.bos_id
    assert trained.encode_prompt(BOS + "a") == trained.encode_prompt("a")
    assert trained.encode_prompt("") == [trained.bos_id]
    assert trained.encode_prompt("a", rendered=True) == trained.encode_prompt("a")[1:]
    assert trained.eos_id not in trained.encode_prompt("a")


def test_a_response_ends_with_one_end_token(trained):
    assert trained.encode_response("a")[-1] == trained.eos_id
    assert trained.encode_response("a" + EOS) == trained.encode_response("a")
    assert trained.encode_response("a", add_eos=False) == trained.encode_response("a")[:-1]


def test_many_texts_are_encoded_like_one(trained):
    assert trained.encode_prompts(TEXTS) == [trained.encode_prompt(text) for text in TEXTS]
    assert trained.encode_responses(TEXTS) == [trained.encode_response(text) for text in TEXTS]
    assert trained.decode(np.asarray(trained.encode_response("abc"), np.int32)) == "abc" + EOS


def test_a_saved_folder_loads_and_saves_to_the_same_bytes(folder, trained, tmp_path_factory):
    second = tmp_path_factory.mktemp("second")
    loaded = Tokenizer.load(folder)
    loaded.save(second)
    assert loaded.fingerprint() == trained.fingerprint()
    assert loaded.chat_template == trained.chat_template
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    for name in names:
        assert (second / name).read_bytes() == (folder / name).read_bytes()


def test_the_rest_of_a_foreign_configuration_is_kept(folder, tmp_path_factory):
    config = folder / "tokenizer_config.json"
    edit(config, tokenizer_class="Qwen2Tokenizer", model_max_length=77, auto_map={"a": "b"})
    second = tmp_path_factory.mktemp("second")
    Tokenizer.load(folder).save(second)
    saved = json.loads((second / "tokenizer_config.json").read_text())
    assert saved["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert saved["model_max_length"] == 77
    assert saved["model_input_names"] == ["input_ids", "attention_mask"]
    assert "auto_map" not in saved
    edit(config, model_input_names=["input_ids"])
    Tokenizer.load(folder).save(second)
    saved = json.loads((second / "tokenizer_config.json").read_text())
    assert saved["model_input_names"] == ["input_ids"]


def test_special_tokens_are_text_objects_or_in_the_map_file(folder):
    config = folder / "tokenizer_config.json"
    edit(config, eos_token={"content": EOS, "special": True}, bos_token=None)
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": {"content": BOS}}))
    loaded = Tokenizer.load(folder)
    assert (loaded.bos_id, loaded.eos_id) == (0, 1)


@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_the_end_token_may_come_from_the_model_by_id(folder, name, tmp_path_factory):
    edit(folder / "tokenizer_config.json", eos_token=None)
    (folder / name).write_text(json.dumps({"eos_token_id": [1, 2]}))
    loaded = Tokenizer.load(folder)
    assert loaded.encode_response("a")[-1] == 1
    second = tmp_path_factory.mktemp("second")
    loaded.save(second)
    assert Tokenizer.load(second).eos_id == 1


@pytest.mark.parametrize("add_bos", [True, False, None])
@pytest.mark.parametrize("processed", [True, False])
def test_the_post_processor_alone_decides_on_bos_as_in_transformers(folder, add_bos, processed):
    edit(folder / "tokenizer_config.json", add_bos_token=add_bos)
    if not processed:
        content = json.loads((folder / "tokenizer.json").read_text())
        content["post_processor"] = None
        (folder / "tokenizer.json").write_text(json.dumps(content))
    assert Tokenizer.load(folder).encode_prompt("abc") == peer(folder)("abc")["input_ids"]
    assert (Tokenizer.load(folder).prefix_ids == [0]) is processed


def test_truncation_and_padding_in_the_file_are_not_applied(folder):
    import tokenizers

    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(3)
    backend.enable_padding(length=9)
    backend.save(str(folder / "tokenizer.json"))
    assert len(Tokenizer.load(folder).encode_prompt("one two three four five six")) > 9
    assert len(Tokenizer.load(folder).encode_prompt("a")) == 2


def test_a_suffix_of_the_post_processor_is_left_out(folder):
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    processor = content["post_processor"]
    processor["single"].append({"SpecialToken": {"id": EOS, "type_id": 0}})
    processor["special_tokens"][EOS] = {"id": EOS, "ids": [1], "tokens": [EOS]}
    path.write_text(json.dumps(content))
    assert peer(folder)("a")["input_ids"][-1] == 1
    assert Tokenizer.load(folder).encode_prompt("a") == peer(folder)("a")["input_ids"][:-1]


def test_a_template_file_goes_before_the_configuration(folder):
    config = folder / "tokenizer_config.json"
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    edit(config, chat_template=named)
    assert Tokenizer.load(folder).chat_template == "{{ messages[0].content }}"
    (folder / "chat_template.jinja").unlink()
    assert Tokenizer.load(folder).chat_template == "d"
    edit(config, chat_template="text")
    assert Tokenizer.load(folder).chat_template == "text"


def test_the_fingerprint_follows_the_template_and_the_special_tokens(folder, trained):
    (folder / "chat_template.jinja").write_text("other")
    assert Tokenizer.load(folder).fingerprint() != trained.fingerprint()
    (folder / "chat_template.jinja").write_text(trained.chat_template)
    assert Tokenizer.load(folder).fingerprint() == trained.fingerprint()
    edit(folder / "tokenizer_config.json", bos_token=None)
    assert Tokenizer.load(folder).fingerprint() != trained.fingerprint()


def test_faults_name_the_folder(folder, tmp_path):
    def fails(part):
        with pytest.raises(UserError, match=part) as caught:
            Tokenizer.load(folder)
        assert str(folder) in str(caught.value)

    edit(folder / "tokenizer_config.json", eos_token="<none>")
    fails("<none>")
    (folder / "tokenizer_config.json").write_text("{")
    fails("not JSON")
    (folder / "tokenizer_config.json").unlink()
    (folder / "tokenizer.json").write_text("{}")
    fails("cannot be used")
    (folder / "tokenizer.json").unlink()
    fails("no tokenizer.json")
    with pytest.raises(UserError, match="no such folder"):
        Tokenizer.load(tmp_path / "none")


def test_an_end_token_that_does_not_exist_cannot_be_added(folder):
    edit(folder / "tokenizer_config.json", eos_token=None)
    with pytest.raises(UserError, match="add_eos"):
        Tokenizer.load(folder).encode_response("a")


def test_a_vocabulary_without_room_for_the_bytes_is_refused():
    with pytest.raises(UserError, match="at least 259"):
        Tokenizer.train(["a"], 100)
