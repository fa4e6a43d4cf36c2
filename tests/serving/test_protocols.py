"""The bodies of OpenRLHF and vLLM give the same rewards as our own routes."""

import numpy as np
import pytest

from gram_jax.data.judge import Texts, render_comparison
from gram_jax.data.tokenizer import BOS, EOS
from gram_jax.rows import Example
from gram_jax.scoring import score_examples

SCORE = "/gram/v1/score"
PROMPT, RESPONSES = "What is a list?", ["A sequence.", "No.", "It holds items."]
CHAT = [{"role": "user", "content": "What is a list?"}]


def rewards(server, prompt, responses):
    body = {"prompt": prompt, "responses": responses}
    return server.good(SCORE, body)["results"][0]["rewards"]


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x)))


@pytest.mark.parametrize("reading", ["likelihood", "head"])
def test_openrlhf_queries_are_split_at_their_prompts(reading, request):
    server = request.getfixturevalue(reading)
    wanted = rewards(server, PROMPT, RESPONSES)
    queries = [PROMPT + response for response in RESPONSES]
    prompts = [PROMPT] * 3
    found = server.good("/get_reward", {"query": queries, "prompts": prompts, "labels": [None] * 3})
    np.testing.assert_allclose(found["rewards"], wanted, rtol=1e-5)
    assert found["scores"] == found["rewards"]
    assert found["extra_logs"]["without_prompt"] == [0, 0, 0]
    # As its client decodes them: with the special tokens, spelt out.
    spelt = [f"{BOS}{query}{EOS}" for query in queries]
    found = server.good("/get_reward", {"query": spelt, "prompts": prompts})
    np.testing.assert_allclose(found["rewards"], wanted, rtol=1e-5)
    assert found["extra_logs"]["without_prompt"] == [0, 0, 0]
    # One query a request, many at once, as its client sends them.
    bodies = [{"query": [q], "prompts": [p]} for q, p in zip(queries, prompts, strict=True)]
    answers = server.all_at_once([("/get_reward", body) for body in bodies * 8])
    np.testing.assert_allclose([a["rewards"][0] for _, a in answers], wanted * 8, rtol=1e-5)


def test_an_empty_query_gets_empty_lists(likelihood, judge):
    for server in (likelihood, judge):
        found = server.good("/get_reward", {"query": [], "prompts": [], "labels": []})
        assert found["rewards"] == found["scores"] == []
        assert set(map(tuple, found["extra_logs"].values())) == {()}


@pytest.mark.parametrize("reading", ["likelihood", "head"])
def test_a_text_without_a_prompt_is_a_response_to_the_empty_one(reading, request):
    server = request.getfixturevalue(reading)
    before = server.service.unsplit
    wanted = rewards(server, "", ["A list is a sequence."])
    for prompts in (None, ["Not this"], ["A list is a sequence."]):
        body = {"query": ["A list is a sequence."], "prompts": prompts}
        found = server.good("/get_reward", body)
        np.testing.assert_allclose(found["rewards"], wanted, rtol=1e-5)
        assert found["extra_logs"]["without_prompt"] == [1]
    assert server.service.unsplit == before + 3
    found = server.good("/pooling", {"input": "A list is a sequence."})
    np.testing.assert_allclose(found["data"][0]["data"], wanted, rtol=1e-5)


def test_a_judge_compares_openrlhf_responses_with_their_labels(judge):
    found = judge.good(
        "/get_reward",
        {"query": [PROMPT + r for r in RESPONSES], "prompts": [PROMPT] * 3, "labels": ["Yes."] * 3},
    )
    for response, reward in zip(RESPONSES, found["rewards"], strict=True):
        body = {"prompt": PROMPT, "a": response, "b": "Yes."}
        assert reward == pytest.approx(judge.good("/gram/v1/compare", body)["p_a_better"], rel=1e-5)


def test_scores_are_rewards_or_their_sigmoids(likelihood, head):
    many = {"text_1": PROMPT, "text_2": RESPONSES}
    pairs = {"queries": [PROMPT, "Why?", PROMPT], "documents": RESPONSES}
    for server, activated in ((likelihood, False), (head, True)):
        wanted = np.array(rewards(server, PROMPT, RESPONSES))
        raw = server.good("/score", many | {"use_activation": False, "model": "any"})
        np.testing.assert_allclose([d["score"] for d in raw["data"]], wanted, rtol=1e-5)
        assert [d["index"] for d in raw["data"]] == [0, 1, 2]
        assert raw["object"] == "list" and raw["model"] == "small"
        assert raw["usage"]["total_tokens"] > 0
        mapped = server.good("/v1/score", many | {"use_activation": True})
        np.testing.assert_allclose([d["score"] for d in mapped["data"]], sigmoid(wanted), rtol=1e-5)
        wanted[1] = rewards(server, "Why?", [RESPONSES[1]])[0]
        found = server.good("/v1/score", pairs)
        np.testing.assert_allclose(
            [d["score"] for d in found["data"]], sigmoid(wanted) if activated else wanted, rtol=1e-5
        )


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank"])
@pytest.mark.parametrize("reading", ["likelihood", "judge", "head"])
def test_reranking_is_ranking(reading, path, request):
    server = request.getfixturevalue(reading)
    ranked = server.good("/gram/v1/rank", {"prompt": PROMPT, "responses": RESPONSES})["results"]
    body = {"query": PROMPT, "documents": [RESPONSES[0], {"text": RESPONSES[1]}, RESPONSES[2]]}
    found = server.good(path, body | {"use_activation": False})["results"]
    assert [r["index"] for r in found] == [r["index"] for r in ranked]
    np.testing.assert_allclose(
        [r["relevance_score"] for r in found], [r["reward"] for r in ranked], rtol=1e-5, atol=2e-6
    )
    assert [r["document"]["text"] for r in found] == [RESPONSES[r["index"]] for r in ranked]
    best = server.good(path, body | {"top_n": 1, "return_documents": False})["results"]
    assert [r["index"] for r in best] == [ranked[0]["index"]] and "document" not in best[0]


def test_a_conversation_is_its_last_message_after_the_others(likelihood, head):
    messages = [*CHAT, {"role": "assistant", "content": "A sequence."}]
    for server in (likelihood, head):
        wanted = rewards(server, CHAT, ["A sequence."])
        found = server.good("/pooling", {"messages": messages})["data"][0]["data"]
        np.testing.assert_allclose(found, wanted, rtol=1e-5)
    (data,) = head.good("/classify", {"messages": messages})["data"]
    assert (data["num_classes"], data["label"]) == (1, "reward")
    np.testing.assert_allclose(data["probs"], sigmoid(wanted), rtol=1e-5)


def test_token_ids_are_read_as_they_are(head, likelihood):
    tokenizer = head.service.engine.scorer.encoder.tokenizer
    ids = tokenizer.encode_prompt(PROMPT) + tokenizer.encode_response(RESPONSES[0])
    wanted = rewards(head, PROMPT, [RESPONSES[0]])
    for given in (ids, [ids]):
        found = head.good("/pooling", {"input": given})["data"]
        np.testing.assert_allclose([d["data"][0] for d in found], wanted, rtol=1e-5)
    whole = likelihood.good("/pooling", {"input": ids})["data"][0]["data"][0]
    rest = likelihood.good("/gram/v1/score", {"prompt": "", "response": PROMPT + RESPONSES[0]})
    assert tokenizer.encode_response(PROMPT + RESPONSES[0]) == ids[1:]
    np.testing.assert_allclose(whole, rest["results"][0]["rewards"][0], rtol=1e-5)


def test_a_judge_reads_judge_prompts_that_others_wrote(judge):
    """As a server of the exported classifier would read them."""
    scorer = judge.service.engine.scorer
    a, b = RESPONSES[:2]
    template, tokenizer = scorer.settings.template, scorer.encoder.tokenizer
    text, _, is_chat = render_comparison(template, Texts(PROMPT, a, b), tokenizer)
    assert is_chat  # the chat template writes all special tokens itself
    chat = {"add_special_tokens": False}
    compared = judge.good("/gram/v1/compare", {"prompt": PROMPT, "a": a, "b": b})
    found = judge.good("/pooling", chat | {"input": [text]})["data"][0]["data"][0]
    np.testing.assert_allclose(found, compared["forward"], rtol=1e-5)
    activated = chat | {"input": text, "use_activation": True}
    probs = judge.good("/classify", activated)["data"][0]["probs"]
    np.testing.assert_allclose(probs, [compared["p_forward"]], rtol=1e-5)
    labels = list(scorer.readout.labels)
    ids = tokenizer.encode_prompt(text, rendered=True)
    body = {"query": ids[:5], "items": [ids[5:]]}
    first = judge.good("/generative_scoring", body | {"label_token_ids": labels})
    second = judge.good("/generative_scoring", body | {"label_token_ids": labels[::-1]})
    np.testing.assert_allclose(first["data"][0]["score"], compared["p_forward"], rtol=1e-5)
    np.testing.assert_allclose(second["data"][0]["score"], 1 - compared["p_forward"], rtol=1e-4)


@pytest.mark.parametrize("item_first", [False, True])
def test_label_probabilities_are_those_of_the_next_token(likelihood, item_first):
    scorer = likelihood.service.engine.scorer
    tokenizer, labels = scorer.encoder.tokenizer, [70, 80, 90]
    query = tokenizer.encode_prompt("Is it a city? ")
    items = [tokenizer.encode_response(text, add_eos=False) for text in ("Paris:", "Blue:")]
    prompts = [item + query if item_first else query + item for item in items]
    wanted = []
    for prompt in prompts:
        logprobs = next_token_logprobs(scorer, prompt, labels)
        wanted.append((np.exp(logprobs[0]), np.exp(logprobs[0]) / np.exp(logprobs).sum()))
    body = {
        "query": "Is it a city? ", "items": ["Paris:", "Blue:"], "label_token_ids": labels,
        "item_first": item_first,
    }  # fmt: skip
    for softmax in (False, True):
        found = likelihood.good("/generative_scoring", body | {"apply_softmax": softmax})
        np.testing.assert_allclose(
            [d["score"] for d in found["data"]], [pair[softmax] for pair in wanted], rtol=1e-5
        )


def next_token_logprobs(scorer, prompt, labels):
    """By the whole vocabulary's softmax."""
    size = scorer.vocab_size
    responses = tuple(np.array([token], np.int32) for token in range(size))
    example = Example(np.array(prompt, np.int32), responses)
    scored = score_examples(scorer.loaded.model, [example], scorer.shapes[-1].row, 1)
    numbers = np.full(size, np.nan)
    for one in scored:
        numbers[one.response] = one.score
    np.testing.assert_allclose(np.exp(numbers).sum(), 1, rtol=1e-5)
    return numbers[labels]
