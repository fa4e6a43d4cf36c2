"""The judge's template: checked, filled in one pass, rendered as transformers does."""

import json
import tomllib
from pathlib import Path

import peer_models
import peer_tokenizers
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from gram_jax.data.judge import (
    DEFAULT,
    JudgeTemplate,
    Texts,
    fill,
    label_ids,
    question_text,
    render_comparison,
    response_text,
)
from gram_jax.data.tokenizer import Tokenizer
from gram_jax.errors import UserError

PROMPT = '"Q: {question} A: {response_a} B: {response_b} Better:"'
ANSWER = '"A: {response_a} B: {response_b}"'
GOOD = f"""
labels = ["A", "B"]
prompt = {PROMPT}
pretrain_prompt = "Q: {{question}}"
pretrain_response = {ANSWER}
system = "Judge."
[chat_template_kwargs]
enable_thinking = false
"""
TEXTS = Texts("What is 2 + 2?", "It is 4.", "5, I think.")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder for each kind of tokenizer."""
    made = {}
    for name in peer_tokenizers.SPECIALS:
        made[name] = tmp_path_factory.mktemp(name)
        peer_tokenizers.make(name, [JudgeTemplate.load().prompt] * 3).save(made[name])
    return made


@pytest.fixture(scope="module")
def load(folders):
    loaded = {name: Tokenizer.load(folder) for name, folder in folders.items()}
    return loaded.__getitem__


@pytest.fixture(scope="module")
def peer(folders):
    from transformers import AutoTokenizer

    loaded = {name: AutoTokenizer.from_pretrained(folder) for name, folder in folders.items()}
    return loaded.__getitem__


def template(**changes):
    return JudgeTemplate.from_dict(JudgeTemplate.load().to_dict() | changes)


def test_the_default_template_is_used_without_a_path():
    default = JudgeTemplate.load()
    assert default == JudgeTemplate.load(DEFAULT)
    assert default.labels == ("A", "B")
    assert default.pretrain_prompt and default.pretrain_response
    blocks = [
        "[User Question]\n{question}\n",
        "[The Start of Assistant A's Answer]\n{response_a}\n[The End of Assistant A's Answer]",
        "[The Start of Assistant B's Answer]\n{response_b}\n[The End of Assistant B's Answer]",
        "#Preferred:",
    ]
    places = [default.prompt.index(block) for block in blocks]
    assert places == sorted(places)
    assert default.prompt.endswith(blocks[-1])


def test_a_file_is_read_field_by_field(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(GOOD)
    assert JudgeTemplate.load(path) == JudgeTemplate(
        labels=("A", "B"),
        prompt="Q: {question} A: {response_a} B: {response_b} Better:",
        pretrain_prompt="Q: {question}",
        pretrain_response="A: {response_a} B: {response_b}",
        system="Judge.",
        chat_template_kwargs={"enable_thinking": False},
    )


def test_the_example_in_the_docs_is_a_template():
    text = (Path(__file__).parents[2] / "docs" / "judge.md").read_text(encoding="utf-8")
    example = JudgeTemplate.from_dict(tomllib.loads(text.split("```toml\n")[1].split("```")[0]))
    assert example.prompt.endswith("[Answer B]\n{response_b}\n\nThe better answer is:")
    assert example.chat_template_kwargs == {"enable_thinking": False}


def test_a_template_survives_json_and_its_fingerprint_covers_every_field():
    default = JudgeTemplate.load()
    again = JudgeTemplate.from_dict(json.loads(json.dumps(default.to_dict())))
    assert again == default
    assert again.fingerprint() == default.fingerprint()
    changes = [
        {"labels": ["B", "A"]},
        {"prompt": default.prompt + " "},
        {"pretrain_prompt": "{question}"},
        {"pretrain_response": "{response_a} {response_b}"},
        {"system": "s"},
        {"chat_template_kwargs": {}},
    ]
    assert [name for change in changes for name in change] == list(default.to_dict())
    prints = {template(**change).fingerprint() for change in changes}
    assert len(prints | {default.fingerprint()}) == len(changes) + 1


@pytest.mark.parametrize(
    ("old", "new", "part"),
    [
        ("system", "sistem", "sistem is not a field of a judge template; did you mean system?"),
        ("system", "x", "x is not a field of a judge template; it has labels, prompt"),
        ('labels = ["A", "B"]', "", "labels is missing"),
        (f"prompt = {PROMPT}", "", "prompt is missing"),
        ('["A", "B"]', '"AB"', "labels must be a list of two texts"),
        ('["A", "B"]', '["A", "B", "C"]', "labels must be a list of two texts"),
        ('["A", "B"]', '["A", 2]', "labels must be a list of two texts"),
        ('["A", "B"]', '["A", "A"]', "labels are 'A' and 'A'; write two different texts"),
        ('["A", "B"]', '["", "B"]', "labels are '' and 'B'; write two different texts"),
        ('"Judge."', "3", "system must be text"),
        ("enable_thinking = false", "a = [1]", "chat_template_kwargs must be a table of texts"),
        ("enable_thinking = false", "tools = 1", "chat_template_kwargs.tools is set by rendering"),
        ("Q: {question} A", "Q: A", "prompt has no {question}; write each of"),
        ("B: {response_b} Better", "Better", "prompt has no {response_b}; write each of"),
        ("Better", "{question}", "prompt has 2 times {question}; write each of"),
        ("Better", "{answer}", "prompt has {answer}, which is no slot there; it has {question},"),
        ('"Q: {question}"', '"{response_a}"', "pretrain_prompt has {response_a}, which is no slot"),
        (ANSWER, '"{response_a}"', "pretrain_response has no {response_b}"),
        ('"Q: {question}"', '""', "write both or neither"),
        (PROMPT, '"{question} {response_b} {response_a}"', "{response_b} before {response_a}"),
        (PROMPT, '" {response_a} {response_b} {question}"', "write words before it"),
        ('["A", "B"]', '["A" "B"]', "not TOML: "),
    ],
)  # fmt: skip
def test_a_bad_template_is_refused_in_one_line_with_its_file(tmp_path, old, new, part):
    path = tmp_path / "mine.toml"
    assert old in GOOD
    path.write_text(GOOD.replace(old, new, 1))
    with pytest.raises(UserError) as caught:
        JudgeTemplate.load(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert part in message
    assert "\n" not in message


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.toml: the judge template cannot be read \(No such"):
        JudgeTemplate.load(tmp_path / "none.toml")
    (tmp_path / "latin.toml").write_bytes(b'system = "\xe9"')
    with pytest.raises(UserError, match=r"latin\.toml: not UTF-8"):
        JudgeTemplate.load(tmp_path / "latin.toml")


def test_texts_that_look_like_slots_or_braces_stay_as_they_are():
    texts = Texts("{response_a}", r"{response_b}{question} \1 {0} {", "}{response_a}{{question}}")
    assert fill("<{question}|{response_a}|{response_b}>", texts) == f"<{'|'.join(texts)}>"


@pytest.mark.parametrize("system", ["", "You are a judge."])
@pytest.mark.parametrize("name", ["llama3", "qwen3"])
def test_a_judge_prompt_is_rendered_as_in_transformers(load, peer, name, system):
    judge = template(system=system)
    messages = [{"role": "user", "content": fill(judge.prompt, TEXTS)}]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    theirs = peer(name).apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    text, head, is_chat = render_comparison(judge, TEXTS, load(name))
    assert text == theirs
    assert is_chat
    assert text.startswith(head + TEXTS.response_a)
    assert text.endswith("</think>\n\n") == (name == "qwen3")


def test_a_turn_that_is_stripped_still_has_its_head(load):
    judge = template(prompt="\n \n{question}|{response_a}{response_b} #Preferred: \n")
    text, head, _ = render_comparison(judge, TEXTS, load("llama3"))
    assert text.startswith(head + TEXTS.response_a + TEXTS.response_b)
    assert head.endswith(f"<|end_header_id|>\n\n{TEXTS.question}|")
    assert "#Preferred:<|eot_id|>" in text
    blank = render_comparison(judge, Texts(" ", " \n", "x"), load("qwen3"))
    assert blank.head.endswith("user\n\n \n |")


def test_without_a_chat_template_the_prompt_is_plain_text(load):
    text, head, is_chat = render_comparison(template(system="Judge."), TEXTS, load("plain"))
    assert text == "Judge.\n\n" + fill(JudgeTemplate.load().prompt, TEXTS)
    assert text.startswith(head + TEXTS.response_a)
    assert not is_chat


def test_a_chat_template_that_changes_the_text_is_refused(load):
    original = load("qwen3")
    shouting = Tokenizer(
        original._content, original._config, "{{ messages[0].content | upper }}", "shouting"
    )
    with pytest.raises(UserError, match="does not write the text of the judge prompt as it is"):
        render_comparison(JudgeTemplate.load(), TEXTS, shouting)


@pytest.mark.parametrize("name", peer_tokenizers.SPECIALS)
def test_labels_of_the_default_template_are_one_token_after_its_prompt(load, peer, name):
    judge = JudgeTemplate.load()
    ids = label_ids(judge, load(name))
    text = render_comparison(judge, TEXTS, load(name)).text
    for label, found in zip("AB", ids, strict=True):
        assert peer(name)(text + label, add_special_tokens=False).input_ids[-1] == found
        assert load(name).decode([found]) == label


def test_a_label_of_several_tokens_is_refused(load):
    with pytest.raises(UserError) as caught:
        label_ids(template(labels=["A", "B77"]), load("qwen3"))
    message = str(caught.value)
    assert "label 'B77' is not one token after the judge prompt" in message
    assert "ends in the tokens ['B', '7', '7']; change labels, or the end of the prompt" in message


def test_a_label_that_merges_with_the_end_of_the_prompt_is_refused(load):
    blank = template(prompt=JudgeTemplate.load().prompt + " ")
    with pytest.raises(UserError, match=r"'#Preferred: ' \+ 'A' ends in the tokens \[' A'\]"):
        label_ids(blank, load("plain"))
    # In a chat the label begins a turn of its own, whatever the user's turn ends with.
    assert label_ids(blank, load("llama3")) == label_ids(JudgeTemplate.load(), load("llama3"))


def test_a_label_that_depends_on_the_response_is_refused():
    # Within a word WordPiece has another token than at its start.
    letters = [chr(c) for c in range(33, 127)]
    tokens = [*letters, *(f"##{letter}" for letter in letters)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    pieces = Tokenizer(backend.to_str(), {}, None, "pieces")
    with pytest.raises(UserError, match="label 'A' becomes another token after another response"):
        label_ids(template(prompt="{question} {response_a} {response_b}"), pieces)


def test_labels_that_are_the_same_token_are_refused():
    # Of whole words, where each unknown one is the same token.
    words = peer_models.tokenizer()
    plain = Tokenizer(words._content, words._config, None, "words")
    with pytest.raises(UserError, match="labels 'A' and 'B' are the same token"):
        label_ids(JudgeTemplate.load(), plain)
    assert label_ids(template(labels=["w3", "w4"]), plain) == (3, 4)


def test_a_chat_is_written_turn_by_turn():
    user = {"role": "user", "content": "Say hello."}
    call = {"function": {"name": "greet", "arguments": {"é": 1}}}
    assert question_text("as it is\n") == "as it is\n"
    assert question_text([user]) == "Say hello."
    assert question_text([{"role": "system", "content": "Be brief."}, user]) == (
        "system: Be brief.\n\nuser: Say hello."
    )
    chat = [user, {"role": "assistant", "content": None, "tool_calls": [call]}, user]
    assert question_text(chat) == (
        'user: Say hello.\n\nassistant: [{"function": {"name": "greet", "arguments": {"é": 1}}}]'
        "\n\nuser: Say hello."
    )


def test_of_an_answer_the_content_is_judged_not_the_reasoning():
    answer = {"role": "assistant", "content": "4", "reasoning_content": "2 and 2"}
    assert response_text([answer]) == "4"
    assert response_text("4\n") == "4\n"
