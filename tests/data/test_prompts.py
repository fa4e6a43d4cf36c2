"""Chats are rendered and tokenised as transformers does, then cut where the response begins."""

import json
import os

import numpy as np
import pytest

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import tokenizers

from gram_jax.data.prompts import (
    ExampleError,
    apply_chat_template,
    encode_candidates,
    render,
)
from gram_jax.data.tokenizer import Tokenizer
from gram_jax.errors import UserError

LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
    "{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
CHATML = (
    "{%- for message in messages %}\n"
    "    {%- if message.role == 'system' and not loop.first %}{% continue %}{% endif %}\n"
    "    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}\n"
)
# An empty think block before a given response, none before an earlier one: Qwen3's way.
THINKING = CHATML.replace(
    "message.role + '\\n' +",
    "message.role + '\\n' + ('<think>\\n\\n</think>\\n\\n' if loop.last and message.role =="
    " 'assistant' else '') +",
)
# The generation is opened with what is not written before a given response: R1's way.
OPENED = CHATML.replace("assistant\\n'", "assistant\\n<think>\\n'")
# What a template may use: namespaces, dictionaries, JSON, the date, generation blocks.
ELABORATE = (
    "{% set ns = namespace(count=0) %}{% set extra = dict(a='<é>') %}"
    "{% for message in messages %}{% set ns.count = ns.count + 1 %}\n"
    "    {% if message.role == 'assistant' %}\n"
    "{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}\n"
    "    {% else %}\n"
    "{{ ns.count }} {{ extra | tojson }} {{ message | tojson(indent=1) }}"
    " {{ strftime_now('%Y') }} {{ message.reasoning_content }}\n"
    "    {% endif %}\n"
    "{% endfor %}{{ pad_token }}{{ unk_token }}"
)
TOOLS = "{% for tool in tools or [] %}{{ tool | tojson }}\n{% endfor %}" + CHATML
REWRITING = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"

TEMPLATES = {
    "tools": (TOOLS, None, "<|im_end|>"),
    "llama3": (LLAMA3, "<|begin_of_text|>", "<|eot_id|>"),
    "chatml": (CHATML, None, "<|im_end|>"),
    "chatml_base": (CHATML, None, "<|endoftext|>"),
    "thinking": (THINKING, None, "<|im_end|>"),
    "opened": (OPENED, None, "<|im_end|>"),
    "elaborate": (ELABORATE, None, "<|endoftext|>"),
    "rewriting": (REWRITING, None, "<|im_end|>"),
}
SPECIALS = [
    "<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|im_start|>", "<|im_end|>", "<|endoftext|>",
]  # fmt: skip
CHAT = [
    {"role": "system", "content": "Be <brief>."},
    {"role": "user", "content": "  What is 2+2? é\n", "name": None},
    {"role": "assistant", "content": "Four."},
    {"role": "user", "content": "And 3+3?"},
]
ANSWER = [{"role": "assistant", "content": "Six, of course."}]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tokenizer folder for each template, with the special tokens of all."""
    text = json.dumps(CHAT) + json.dumps(ANSWER)
    base = tmp_path_factory.mktemp("base")
    Tokenizer.train([text] * 3, 400).save(base)
    made = {}
    for name, (template, bos, eos) in TEMPLATES.items():
        backend = tokenizers.Tokenizer.from_file(str(base / "tokenizer.json"))
        backend.add_special_tokens(SPECIALS)
        if bos is None:
            backend.post_processor = tokenizers.processors.ByteLevel()
        else:
            backend.post_processor = tokenizers.processors.TemplateProcessing(
                single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
            )
        config = {"eos_token": eos, "pad_token": "<|endoftext|>"}
        if bos is not None:
            config["bos_token"] = bos
        made[name] = tmp_path_factory.mktemp(name)
        Tokenizer(backend.to_str(), config, template, name).save(made[name])
    return made


@pytest.fixture(scope="module")
def load(folders):
    loaded = {name: Tokenizer.load(folder) for name, folder in folders.items()}
    return loaded.__getitem__


@pytest.fixture(scope="module")
def peer(folders):
    from transformers import PreTrainedTokenizerFast

    loaded = {
        name: PreTrainedTokenizerFast.from_pretrained(folder) for name, folder in folders.items()
    }
    return loaded.__getitem__


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("generation", [True, False])
def test_templates_render_as_in_transformers(load, peer, name, generation):
    ours = apply_chat_template(CHAT, load(name), add_generation_prompt=generation)
    theirs = peer(name).apply_chat_template(CHAT, tokenize=False, add_generation_prompt=generation)
    assert ours == theirs


def test_reasoning_is_given_under_the_name_that_templates_read(load, peer):
    chat = [{"role": "user", "content": "q", "reasoning": "because"}]
    ours = apply_chat_template(chat, load("elaborate"))
    assert "because" in ours
    assert ours == peer("elaborate").apply_chat_template(chat, tokenize=False)


@pytest.mark.parametrize("name", ["llama3", "chatml", "chatml_base", "thinking"])
def test_ids_of_prompt_and_response_together_are_those_of_transformers(load, peer, name):
    prompt, (response,) = encode_candidates(CHAT, [ANSWER], load(name))
    opening = peer(name).apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    whole = peer(name).apply_chat_template([*CHAT, *ANSWER], return_dict=False)
    assert prompt.tolist() == opening
    joined = [*prompt.tolist(), *response.tolist()]
    assert joined == whole[: len(joined)]
    # All that transformers has beyond is the newline that the template writes after the turn.
    assert peer(name).decode(whole[len(joined) :]) in ("", "\n")


@pytest.mark.parametrize("name", ["llama3", "chatml", "chatml_base", "opened"])
def test_a_finished_response_ends_with_one_end_of_turn_token(load, name):
    tokenizer = load(name)
    end = "<|eot_id|>" if name == "llama3" else "<|im_end|>"
    _, (finished,) = encode_candidates(CHAT, [ANSWER], tokenizer)
    assert tokenizer.decode(finished) == "Six, of course." + end
    _, (open_ended,) = encode_candidates(CHAT, [ANSWER], tokenizer, add_eos=False)
    assert tokenizer.decode(open_ended) == "Six, of course."


def test_a_template_that_ends_no_turn_leaves_that_to_eos(load):
    original = load("chatml")
    bare = Tokenizer(
        original._content,
        original._config,
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}",
        "bare",
    )
    _, (response,) = encode_candidates(CHAT, [ANSWER], bare)
    assert bare.decode(response) == "Six, of course.<|im_end|>"


def test_text_and_message_are_the_same_response(load):
    as_text = render(CHAT, "Six, of course.", load("chatml"))
    assert as_text == render(CHAT, ANSWER, load("chatml"))
    assert as_text.is_chat
    assert as_text.prompt_text.endswith("<|im_start|>assistant\n")
    assert as_text.response_text == "Six, of course.<|im_end|>"


def test_what_a_template_writes_before_a_response_belongs_to_the_response(load):
    rendered = render(CHAT, ANSWER, load("thinking"))
    assert rendered.prompt_text.endswith("<|im_start|>assistant\n")
    assert rendered.response_text == "<think>\n\n</think>\n\nSix, of course.<|im_end|>"


def test_an_opening_that_no_given_response_has_is_left_out_for_all_alike(load):
    for response in ("Six.", "<thinking about it", "<think>\nhm\n</think>six"):
        rendered = render(CHAT, response, load("opened"))
        assert rendered.prompt_text.endswith("<|im_start|>assistant\n")
        assert rendered.response_text == response + "<|im_end|>"


def test_tools_before_the_messages_are_given_to_the_template(load, peer):
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    chat = [{"role": "tools", "content": json.dumps(tools)}, *CHAT]
    ours = apply_chat_template(chat, load("tools"), add_generation_prompt=True)
    theirs = peer("tools").apply_chat_template(
        CHAT, tools=tools, tokenize=False, add_generation_prompt=True
    )
    assert ours == theirs
    assert "weather" in ours
    assert render(chat, "sunny", load("tools")).prompt_text == ours
    with pytest.raises(UserError, match="does not write them"):
        apply_chat_template(chat, load("chatml"))
    for content in ("{", "{}", None):
        with pytest.raises(UserError, match="must be a JSON list"):
            apply_chat_template([{"role": "tools", "content": content}, *CHAT], load("tools"))


def test_a_template_that_rewrites_history_is_refused(load):
    with pytest.raises(UserError, match="otherwise once the response is there"):
        render(CHAT, ANSWER, load("rewriting"))


def test_plain_text_is_used_as_it_is(load):
    tokenizer = load("llama3")
    assert render("p", "r", tokenizer) == ("p", "r", False, None)
    prompt, (chosen, rejected) = encode_candidates("p q", ["r", "s"], tokenizer)
    assert prompt.tolist() == tokenizer.encode_prompt("p q")
    assert prompt[0] == tokenizer.bos_id
    assert tokenizer.decode(chosen) == "r<|eot_id|>"
    assert tokenizer.decode(rejected) == "s<|eot_id|>"
    assert {ids.dtype for ids in (prompt, chosen, rejected)} == {np.dtype(np.int32)}


def test_an_empty_prompt_needs_bos(load):
    prompt, _ = encode_candidates("", ["r"], load("llama3"))
    assert prompt.tolist() == [load("llama3").bos_id]
    with pytest.raises(ExampleError, match="BOS") as caught:
        encode_candidates("", ["r"], load("chatml"))
    assert caught.value.field == "prompt"


@pytest.mark.parametrize(
    ("prompt", "rejected", "part"),
    [
        ("p", "", "empty"),
        (CHAT, [{"role": "assistant", "content": ""}], "empty"),
        ("p", ANSWER, "prompt is text"),
        (CHAT, [*CHAT, *ANSWER], "one assistant message"),
    ],
)
def test_a_bad_response_is_named_by_its_field(load, prompt, rejected, part):
    with pytest.raises(ExampleError, match=part) as caught:
        encode_candidates(prompt, ["good", rejected], load("chatml"))
    assert (caught.value.field, caught.value.index) == ("response", 1)
    assert isinstance(caught.value, ValueError)


def test_a_chat_that_ends_with_an_answer_is_refused(load):
    with pytest.raises(ExampleError, match="ends with an assistant message"):
        render([*CHAT, *ANSWER], "more", load("chatml"))


def with_template(tokenizer, template):
    return Tokenizer(tokenizer._content, tokenizer._config, template, "test")


def test_messages_without_a_template_are_an_error_that_says_what_to_do(load):
    with pytest.raises(UserError, match="add a chat_template"):
        render(CHAT, ANSWER, with_template(load("chatml"), None))


@pytest.mark.parametrize(
    ("template", "part"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for %}", "line 1"),
        ("{{ messages[0].content + 3 }}", "refuses"),
        ("{{ messages.append(1) }}", "refuses"),
        ("{{ ''.__class__.__mro__ }}", "refuses"),
        ("{% set n = namespace(__init__=1) %}", "refuses"),
        ("{{ dict.__init__.__globals__ }}", "refuses"),
    ],
)
def test_a_template_that_fails_or_reaches_out_is_refused(load, template, part):
    with pytest.raises(UserError, match=part):
        apply_chat_template(CHAT, with_template(load("chatml"), template))
