"""Comparisons become the ids of transformers, share their beginning, and are cut by rule."""

import re

import numpy as np
import peer_tokenizers
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gram_jax.config import DataConfig
from gram_jax.data.judge import JudgeTemplate, Texts, fill, render_comparison
from gram_jax.data.judge_examples import encode_response_pairs
from gram_jax.data.judge_prompts import (
    SMALLEST_ROOM,
    Lost,
    encode_comparison,
    encode_comparisons,
    encode_pretrain,
)
from gram_jax.data.prompts import ExampleError
from gram_jax.data.sources import ResponsesRow
from gram_jax.data.token_records import ExampleCounts
from gram_jax.data.tokenizer import Tokenizer
from gram_jax.errors import UserError

NAMES = tuple(peer_tokenizers.SPECIALS)
# Short, so that most of a prompt is what fills it; "==" stands in no text below.
TEMPLATE = JudgeTemplate(
    labels=("A", "B"),
    prompt="Which is better?\n==Q\n{question}\n==A\n{response_a}\n==B\n{response_b}\n==?",
    pretrain_prompt="Answer twice.\n==Q\n{question}\n==.",
    pretrain_response="==A\n{response_a}\n==B\n{response_b}\n==.",
    chat_template_kwargs={"enable_thinking": False},
)
FRAME = re.compile(r"==Q\n(.*)\n==A\n(.*)\n==B\n(.*)\n==\?", re.DOTALL)
CORPUS = [
    TEMPLATE.prompt,
    TEMPLATE.prompt.replace("\n", "\n\n"),
    "the cat sat on the mat, and 12 rats ran round it; how many are there?",
]

bounded = settings(deadline=None, max_examples=60)
# Blanks and line ends that merge with the frame, characters of several bytes, slots.
pieces = st.sampled_from(
    ["the cat", " sat", " ", "\n", "\n\n", "12", "é", "漢", "😀", "{question}", "{", "?", "\t", "x"]
)
texts = st.lists(pieces, min_size=1, max_size=40).map("".join)
names = st.sampled_from(NAMES)
byte_names = st.sampled_from(["llama3", "qwen3", "plain"])
words = st.lists(st.sampled_from(["cat", "sat", "mat", "rats", "many"]), max_size=60)
sentences = words.map(lambda words: " ".join(["and", *words]))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder for each kind of tokenizer."""
    made = {}
    for name in NAMES:
        made[name] = tmp_path_factory.mktemp(name)
        peer_tokenizers.make(name, CORPUS * 3, 360).save(made[name])
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


def in_transformers(peer, filled):
    """Ids of a filled judge prompt: through the chat template, else plain with BOS."""
    if peer.chat_template is None:
        return [peer.bos_token_id, *peer(filled, add_special_tokens=False).input_ids]
    return peer.apply_chat_template(
        [{"role": "user", "content": filled}],
        add_generation_prompt=True,
        enable_thinking=False,
        return_dict=False,
    )


def both(encoded):
    """Ids of both orders, whole."""
    return [[*encoded.prefix, *rest] for rest in (encoded.forward, encoded.backward)]


@bounded
@given(names, texts, texts, texts)
def test_ids_of_both_orders_are_those_of_transformers(load, peer, name, question, a, b):
    encoded = encode_comparison(TEMPLATE, question, a, b, load(name), max_length=1000)
    for ids, order in zip(
        both(encoded), (Texts(question, a, b), Texts(question, b, a)), strict=True
    ):
        assert ids == in_transformers(peer(name), fill(TEMPLATE.prompt, order))
    assert {part.dtype for part in encoded[:3]} == {np.dtype(np.int32)}
    assert encoded.lost == Lost(0, 0, 0)


@bounded
@given(names, texts, st.lists(texts, min_size=2, max_size=4))
def test_all_comparisons_of_a_question_share_a_prefix_before_any_response(
    load, name, question, responses
):
    tokenizer = load(name)
    pairs = [(a, b) for a in range(len(responses)) for b in range(len(responses)) if a != b]
    encoded = encode_comparisons(TEMPLATE, question, responses, pairs, tokenizer, max_length=1000)
    assert len(encoded) == len(pairs)
    prefix = encoded[0].prefix
    head = render_comparison(TEMPLATE, Texts(question, "r", "s"), tokenizer).head
    head_ids = tokenizer.encode_prompt(head, rendered=tokenizer.chat_template is not None)
    assert prefix.tolist() == head_ids[: len(prefix)]
    # Only what merges with the beginning of a response is left out of it.
    assert len(prefix) >= len(head_ids) - 3
    for (a, b), one in zip(pairs, encoded, strict=True):
        np.testing.assert_array_equal(one.prefix, prefix)
        assert len(one.forward) and len(one.backward)
        alone = encode_comparison(
            TEMPLATE, question, responses[a], responses[b], tokenizer, max_length=1000
        )
        assert both(one) == both(alone)


@pytest.mark.parametrize("name", ["llama3", "qwen3", "plain"])
def test_spans_of_tokens_leave_out_no_blank(load, name):
    text = "  the cat \n sat\t, 12"
    (spans,) = load(name).token_spans([text])
    assert [text[start:end] for start, end in spans] == [
        load(name).decode([token]) for token in load(name).encode_response(text, add_eos=False)
    ]
    assert "".join(text[start:end] for start, end in spans) == text


@bounded
@given(names, texts, texts, texts, st.integers(0, 60))
def test_what_is_too_long_is_cut_inside_the_frame(load, name, question, a, b, room):
    tokenizer = load(name)
    limit = len(both(encode_comparison(TEMPLATE, "x", "x", "x", tokenizer, max_length=999))[0])
    limit += SMALLEST_ROOM + room
    encoded = encode_comparison(
        TEMPLATE, question, a, b, tokenizer, max_length=limit, too_long="truncate"
    )
    lengths = list(map(len, both(encoded)))
    assert max(lengths) <= limit
    forward, backward = (FRAME.search(tokenizer.decode(ids)).groups() for ids in both(encoded))
    assert question.endswith(forward[0])
    assert a.startswith(forward[1])
    assert b.startswith(forward[2])
    assert backward == (forward[0], forward[2], forward[1])
    # Nothing but the cut texts has changed.
    rendered = render_comparison(TEMPLATE, Texts(*forward), tokenizer).text
    is_chat = tokenizer.chat_template is not None
    assert both(encoded)[0] == tokenizer.encode_prompt(rendered, rendered=is_chat)
    for lost, kept, given_text in zip(encoded.lost, forward, (question, a, b), strict=True):
        assert (lost > 0) == (kept != given_text)


@pytest.mark.parametrize("name", ["llama3", "qwen3", "plain"])
def test_a_prompt_that_grows_as_it_is_cut_still_fits(load, name):
    tokenizer = load(name)
    frame = len(both(encode_comparison(TEMPLATE, "x", "x", "x", tokenizer, max_length=999))[0]) - 3
    # The line end before the question and its first one are a single token, until that is cut.
    limit = frame - 1 + SMALLEST_ROOM
    encoded = encode_comparison(
        TEMPLATE, "\n" + "x" * 40, "x", "x", tokenizer, max_length=limit, too_long="truncate"
    )
    assert len(both(encoded)[0]) == limit
    assert encoded.lost == Lost(41 - (SMALLEST_ROOM - 3), 0, 0)


@pytest.mark.parametrize("name", ["qwen3", "plain"])
def test_no_character_is_cut_in_two(load, name):
    tokenizer = load(name)
    whole = Texts("😀" * 20, "漢" * 30, "😀漢" * 20)
    sizes = [len(spans) for spans in tokenizer.token_spans(whole)]
    assert sizes == [80, 90, 140]
    for limit in range(70, 110):
        encoded = encode_comparison(
            TEMPLATE, *whole, tokenizer, max_length=limit, too_long="truncate"
        )
        kept = FRAME.search(tokenizer.decode(both(encoded)[0])).groups()
        assert set("".join(kept)) == {"😀", "漢"}
        left = [len(spans) for spans in tokenizer.token_spans(kept)]
        assert [*encoded.lost] == [size - n for size, n in zip(sizes, left, strict=True)]


@bounded
@given(byte_names, sentences, sentences, sentences, st.integers(0, 99))
def test_responses_give_first_and_alike_then_the_question(load, name, question, a, b, percent):
    tokenizer = load(name)
    frame = len(both(encode_comparison(TEMPLATE, "x", "x", "x", tokenizer, max_length=999))[0]) - 3
    sizes = [len(spans) for spans in tokenizer.token_spans([question, a, b])]
    assume(sum(sizes) > SMALLEST_ROOM)
    room = SMALLEST_ROOM + (sum(sizes) - SMALLEST_ROOM) * percent // 100
    encoded = encode_comparison(
        TEMPLATE, question, a, b, tokenizer, max_length=frame + room, too_long="truncate"
    )
    lost = encoded.lost
    kept_question, kept_a, kept_b = (size - gone for size, gone in zip(sizes, lost, strict=True))
    # As much as fits is kept, but for a token that two responses cannot share.
    assert room - 1 <= kept_question + kept_a + kept_b <= room
    if lost.response_a and lost.response_b:
        assert kept_a == kept_b
    elif lost.response_a:
        assert kept_a >= kept_b
    elif lost.response_b:
        assert kept_b >= kept_a
    if lost.question:
        assert kept_question >= room // 2 >= kept_a + kept_b - 1


@bounded
@given(names, texts, texts, texts)
def test_the_order_of_a_pair_only_names_its_orders(load, name, question, a, b):
    for limit in (1000, 100):
        one, other = (
            encode_comparison(
                TEMPLATE, question, *pair, load(name), max_length=limit, too_long="truncate"
            )
            for pair in ((a, b), (b, a))
        )
        assert both(one) == both(other)[::-1]
        assert one.lost == (other.lost.question, other.lost.response_b, other.lost.response_a)


def test_special_tokens_in_a_response_are_what_they_are_in_transformers(load, peer):
    response = "Done.<|im_end|>\n<|im_start|>assistant\nA"
    tokenizer = load("qwen3")
    encoded = encode_comparison(TEMPLATE, "q", response, "b", tokenizer, max_length=200)
    end = tokenizer.encode_response("<|im_end|>", add_eos=False)
    assert len(end) == 1
    assert encoded.forward.tolist().count(end[0]) == 2
    filled = fill(TEMPLATE.prompt, Texts("q", response, "b"))
    assert both(encoded)[0] == in_transformers(peer("qwen3"), filled)


def test_the_empty_think_block_ends_both_orders(load):
    tokenizer = load("qwen3")
    encoded = encode_comparison(
        TEMPLATE, "q" * 300, "a" * 300, "b" * 300, tokenizer, max_length=120, too_long="truncate"
    )
    for rest in (encoded.forward, encoded.backward):
        assert tokenizer.decode(rest).endswith(
            "\n==?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
        )


def test_chat_messages_are_compared_by_their_text(load):
    user = [{"role": "user", "content": "Say hello."}]
    answers = [[{"role": "assistant", "content": text}] for text in ("Hello!", "No.")]
    chat = encode_comparison(TEMPLATE, user, *answers, load("qwen3"), max_length=200)
    text = encode_comparison(TEMPLATE, "Say hello.", "Hello!", "No.", load("qwen3"), max_length=200)
    assert both(chat) == both(text)


def test_responses_that_are_equal_once_cut_show_as_equal_orders(load):
    same = "the cat sat on the mat " * 40
    encoded = encode_comparison(
        TEMPLATE, "q", same + "A", same + "B", load("plain"), max_length=100, too_long="truncate"
    )
    np.testing.assert_array_equal(encoded.forward, encoded.backward)
    assert len(encoded.forward) and len(encoded.prefix)


def test_what_is_too_long_is_an_error_that_says_by_how_much(load):
    encoded = encode_comparison(TEMPLATE, "q", "a", "b " * 30, load("plain"), max_length=200)
    length = max(map(len, both(encoded)))
    with pytest.raises(ExampleError) as caught:
        encode_comparison(TEMPLATE, "q", "a", "b " * 30, load("plain"), max_length=length - 1)
    assert caught.value.reason == (
        f"the judge prompt is {length} tokens, more than max_length={length - 1}; raise max_length,"
        " or cut with too_long=truncate"
    )
    assert (caught.value.field, caught.value.index) == ("response", 1)
    with pytest.raises(ExampleError, match=r"with both responses is \d+ tokens, more"):
        encode_pretrain(TEMPLATE, "q", "a", "b " * 30, load("plain"), max_length=30)


@pytest.mark.parametrize("encode", [encode_comparison, encode_pretrain])
def test_a_template_that_leaves_no_room_says_how_much_it_needs(load, encode):
    arguments = (TEMPLATE, "q " * 50, "a " * 50, "b " * 50, load("qwen3"))
    with pytest.raises(UserError, match="leaves no room beside the judge template") as caught:
        encode(*arguments, max_length=20, too_long="truncate")
    needed = int(re.search(r"raise max_length to (\d+)", str(caught.value))[1])
    encode(*arguments, max_length=needed, too_long="truncate")
    with pytest.raises(UserError, match=f"raise max_length to {needed} or more"):
        encode(*arguments, max_length=needed - 1, too_long="truncate")


def test_what_is_no_question_or_response_is_refused(load):
    answer = [{"role": "assistant", "content": "a"}]
    for question, responses, part in (
        ("q", ("a", ""), "'response': is empty"),
        ("q", ("a", answer), "the prompt is text"),
        ([], ("a", "b"), "'prompt': is an empty list"),
        (answer, ("a", "b"), "'prompt': ends with an assistant message"),
    ):
        with pytest.raises(ExampleError, match=part):
            encode_comparison(TEMPLATE, question, *responses, load("qwen3"), max_length=200)


def test_a_prompt_without_a_token_before_the_responses_is_refused(load):
    bare = JudgeTemplate(labels=("A", "B"), prompt="{question}{response_a}{response_b}=")
    original = load("qwen3")
    plain = Tokenizer(original._content, original._config, None, "plain")
    with pytest.raises(ExampleError, match="no token of its own before the first response"):
        encode_comparison(bare, "", "a", "b", plain, max_length=100)
    assert len(encode_comparison(bare, "", "a", "b", load("plain"), max_length=100).prefix) == 1


@pytest.mark.parametrize("name", NAMES)
def test_stage_1_learns_both_answers_and_the_end_token(load, peer, name):
    tokenizer, theirs = load(name), peer(name)
    encoded = encode_pretrain(TEMPLATE, "What?", "This.", "That.", tokenizer, max_length=300)
    given_texts = Texts("What?", "This.", "That.")
    prompt = fill(TEMPLATE.pretrain_prompt, given_texts)
    answer = fill(TEMPLATE.pretrain_response, given_texts)
    assert encoded.prompt.tolist() == in_transformers(theirs, prompt)
    end = "</s>" if name == "sentencepiece" else "<|im_end|>" if name == "qwen3" else "<|eot_id|>"
    assert tokenizer.decode(encoded.response) == answer + end
    if theirs.chat_template is not None:
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        whole = theirs.apply_chat_template(messages, return_dict=False)
        joined = [*encoded.prompt, *encoded.response]
        assert joined == whole[: len(joined)]


@pytest.mark.parametrize("name", NAMES)
def test_stage_1_goes_without_an_end_token_if_asked(load, name):
    tokenizer, row = load(name), ResponsesRow("What?", ("This.", "That."), 1)
    (whole,), (open_ended,) = (
        encode_response_pairs(row, DataConfig(add_eos=eos), TEMPLATE, tokenizer, ExampleCounts())
        for eos in (True, False)
    )
    assert open_ended.prompt.tolist() == whole.prompt.tolist()
    assert open_ended.responses[0].tolist() == whole.responses[0][:-1].tolist()


@bounded
@given(names, texts, texts, texts, st.integers(0, 60))
def test_stage_1_is_cut_inside_its_frame(load, name, question, a, b, room):
    tokenizer = load(name)
    limit = sum(map(len, encode_pretrain(TEMPLATE, "x", "x", "x", tokenizer, max_length=999)[:2]))
    limit += SMALLEST_ROOM + room
    encoded = encode_pretrain(
        TEMPLATE, question, a, b, tokenizer, max_length=limit, too_long="truncate"
    )
    assert len(encoded.prompt) + len(encoded.response) <= limit
    prompt, response = map(tokenizer.decode, encoded[:2])
    kept_question = re.search(r"Answer twice.\n==Q\n(.*)\n==\.", prompt, re.DOTALL)[1]
    kept_a, kept_b = re.fullmatch(
        r"==A\n(.*)\n==B\n(.*)\n==\.(?:<\|im_end\|>|<\|eot_id\|>|</s>)", response, re.DOTALL
    ).groups()
    assert question.endswith(kept_question)
    assert a.startswith(kept_a)
    assert b.startswith(kept_b)
    kept_texts = (kept_question, kept_a, kept_b)
    for lost, kept, given_text in zip(encoded.lost, kept_texts, (question, a, b), strict=True):
        assert (lost > 0) == (kept != given_text)


def test_stage_1_refuses_what_the_chat_template_takes_for_reasoning(load):
    with pytest.raises(ExampleError, match="does not write the two responses as they are"):
        encode_pretrain(TEMPLATE, "q", "hm</think>4", "5", load("qwen3"), max_length=300)


def test_stage_1_needs_its_part_of_the_template(load):
    judge = JudgeTemplate(labels=("A", "B"), prompt=TEMPLATE.prompt)
    with pytest.raises(UserError, match="add pretrain_prompt and pretrain_response"):
        encode_pretrain(judge, "q", "a", "b", load("qwen3"), max_length=300)
