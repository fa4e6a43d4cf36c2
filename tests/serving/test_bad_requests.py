"""Bad input gets one clear error that names its place, and harms nobody else."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from live_server import Gated, live

from gram_jax.models.decoder import weight_name

SCORE, RANK, COMPARE = "/gram/v1/score", "/gram/v1/rank", "/gram/v1/compare"
GOOD = {"prompt": "What is a list?", "responses": ["A sequence.", "No."]}
HALF = b'{"prompt": "x", "response": "\\ud800"}'

BAD = [
    (SCORE, b"", 400, None, "empty"),
    (SCORE, b"{", 400, None, "not JSON"),
    (SCORE, b"\xff\xfe{}", 400, None, "not UTF-8"),
    (SCORE, b"[1]", 400, None, "a JSON object is expected, not a list"),
    (SCORE, b"[" * 100_000, 400, None, "nested too deeply"),
    (SCORE, b'{"prompt": ' + b"1" * 5000 + b"}", 400, None, "not JSON"),
    (SCORE, {}, 422, None, "no response"),
    (SCORE, {"prompt": "x"}, 422, None, "no response"),
    (SCORE, {"response": "x"}, 422, "prompt", "is missing"),
    (SCORE, {"prompt": None, "response": "x"}, 422, "prompt", "must be text, not null"),
    (SCORE, b'{"prompt": NaN, "response": "x"}', 422, "prompt", "must be text, not a number"),
    (SCORE, {"prompt": "x", "response": ""}, 422, "response", "is empty"),
    (SCORE, {"prompt": "x", "response": {"role": "user"}}, 422, "response", "is chat messages"),
    (SCORE, {"prompt": "x", "responses": []}, 422, "responses", "at least 1"),
    (SCORE, {"prompt": "x", "responses": "a"}, 422, "responses", "must be a list"),
    (SCORE, {"prompt": "x", "responses": ["a", 3]}, 422, "responses[1]", "must be text"),
    (SCORE, {"prompt": "x", "responses": ["a"] * 6}, 422, "responses", "at most 5"),
    (SCORE, HALF, 422, "response", "half of a surrogate pair"),
    (SCORE, {"prompt": "x", "response": "a", "repsonse": "b"}, 422, "repsonse", "is not known"),
    (SCORE, b'{"prompt": "x", "response": "a", "\\ud800": 1}', 422, "\\ud800", "is not known"),
    (SCORE, {"prompt": "x", "response": "a", "tokens": 1}, 422, "tokens", "true or false"),
    (SCORE, {"prompt": "x", "response": "a " * 500}, 422, "response", "more than max_length=160"),
    (SCORE, {"prompt": [], "response": "a"}, 422, "prompt", "is an empty list"),
    (SCORE, {"prompt": [{"role": "user"}], "response": "a"}, 422, "content", "is missing"),
    (SCORE, {"items": {}}, 422, "items", "must be a list"),
    (SCORE, {"items": []}, 422, "items", "at least 1"),
    (SCORE, {"items": [GOOD] * 9}, 422, "items", "at most 8"),
    (SCORE, {"items": [GOOD, 3]}, 422, "items[1]", "must be an object"),
    (SCORE, {"items": [GOOD, {"prompt": "x"}]}, 422, "items[1]", "no response"),
    (SCORE, {"items": [GOOD, GOOD | {"responses": ["a", ""]}]}, 422, "items[1].responses[1]",
     "is empty"),
    (SCORE, {"items": [GOOD, {"prompt": "x", "response": "a " * 500}]}, 422, "items[1].response",
     "more than max_length"),
    (SCORE, {"items": [GOOD | {"tokens": True}]}, 422, "items[0].tokens", "is not known"),
    (RANK, {"prompt": "x"}, 422, "responses", "is missing"),
    (RANK, GOOD | {"top_n": 0}, 422, "top_n", "at least 1"),
    (RANK, GOOD | {"top_n": "1"}, 422, "top_n", "must be a whole number, not text"),
    (RANK, GOOD | {"top_n": True}, 422, "top_n", "must be a whole number"),
    (COMPARE, {"prompt": "x", "a": "y"}, 422, "b", "is missing"),
    (COMPARE, {"prompt": "x", "a": "y", "b": ["z"]}, 422, "b", "is chat messages"),
    (COMPARE, {"prompt": "x", "a": "y", "b": "a " * 500}, 422, "b", "more than max_length"),
    ("/get_reward", {"query": "x"}, 422, "query", "must be a list"),
    ("/get_reward", {"query": ["x", None]}, 422, "query[1]", "must be text"),
    ("/get_reward", {"query": ["x"], "prompts": []}, 422, "prompts", "one entry per query"),
    ("/classify", {"input": [""]}, 422, "input[0]", "is empty"),
    ("/classify", {"input": ["x"], "truncate_prompt_tokens": 3}, 422, "truncate_prompt_tokens",
     "is not known"),
    ("/classify", {"messages": [{"role": "user", "content": "x"}]}, 422, "messages[0]",
     "must be one assistant message"),
    ("/pooling", {"input": [1, 400]}, 422, "input[1]", "must be a token id, 0 to 399"),
    ("/pooling", {"input": "x", "encoding_format": "base64"}, 422, "encoding_format", "as such"),
    ("/score", {"text_1": ["a", "b"], "text_2": ["c"]}, 422, "text_1", "holds 2"),
    ("/score", {"text_1": "a"}, 422, "text_2", "is missing"),
    ("/rerank", {"query": "a", "documents": [{"url": "x"}]}, 422, "documents[0].text", "text"),
    ("/generative_scoring", {"query": "a", "items": ["b"], "label_token_ids": [5, 5]}, 422,
     "label_token_ids", "twice"),
    ("/generative_scoring", {"query": "a", "items": ["b"], "label_token_ids": [400]}, 422,
     "label_token_ids[0]", "must be a token id"),
]  # fmt: skip


@pytest.fixture(scope="module")
def server(make_scorer):
    with live(make_scorer(), items=8, candidates=5) as found:
        yield found


def test_bad_requests_name_their_fault_and_good_ones_beside_them_are_answered(server):
    wanted = server.good(SCORE, GOOD)
    requests = []
    for path, body, *_ in BAD:
        requests += [(SCORE, GOOD), (path, body)]
    answers = server.all_at_once(requests)
    assert all(answer == (200, wanted) for answer in answers[::2])
    for (path, body, status, field, reason), (found, answer) in zip(
        BAD, answers[1::2], strict=True
    ):
        shown = (path, body if len(str(body)) < 200 else str(body)[:200], answer)
        assert found == status, shown
        error = answer["error"]
        assert set(error) == {"message", "field", "type"}, shown
        if field == "content":  # of a message
            field = error["field"]
            assert (field and "prompt[0]" in field) or "content" in field, shown
        assert error["field"] == field, shown
        assert reason in error["message"], shown
        assert len(error["message"]) < 500, shown


def test_what_a_judge_cannot_do_says_what_it_can(judge):
    ids = list(judge.service.engine.scorer.readout.labels)
    fifty = [f"number {i}" for i in range(50)]
    refused = [
        (RANK, {"prompt": "x", "responses": fifty}, "responses", "1225 comparisons"),
        ("/rerank", {"query": "x", "documents": fifty}, "documents", "1225 comparisons"),
        (SCORE, {"prompt": "x", "response": "a"}, "response", "compares two"),
        (SCORE, {"prompt": "x", "responses": ["a"] * 3}, "responses", "/gram/v1/rank"),
        (SCORE, GOOD | {"tokens": True}, "tokens", "no log-probs"),
        (COMPARE, {"prompt": "x", "a": "y", "b": "z", "tokens": True}, "tokens", "no log-probs"),
        ("/score", {"text_1": "a", "text_2": "b"}, None, "/gram/v1/compare"),
        ("/get_reward", {"query": ["x y"], "prompts": ["x"]}, "labels[0]", "a reference answer"),
        ("/get_reward", {"query": ["x y"], "labels": ["z"]}, "query[0]", "does not begin with"),
        ("/generative_scoring", {"query": "a", "items": ["b"], "label_token_ids": [5, 6]},
         "label_token_ids", str(ids)),
    ]  # fmt: skip
    for path, body, field, reason in refused:
        status, answer = judge.post(path, body)
        assert status == 422, answer
        assert answer["error"]["field"] == field, answer
        assert reason in answer["error"]["message"], answer


def test_a_score_that_is_not_finite_fails_its_own_request_alone(make_scorer):
    scorer = make_scorer(batch_rows=1)
    vocabulary = scorer.encoder.tokenizer
    (poisoned,) = set(vocabulary.encode_response("~", add_eos=False))
    for text in (GOOD["prompt"], *GOOD["responses"]):
        assert poisoned not in vocabulary.encode_prompt(text)
    loaded = scorer.loaded

    def spoil(path, leaf):
        return leaf.at[poisoned].set(np.nan) if weight_name(path) == "embedding" else leaf

    model = jax.tree_util.tree_map_with_path(spoil, loaded.model)
    with live(Gated(dataclasses.replace(loaded, model=model), scorer.settings)) as server:
        wanted = server.good(SCORE, GOOD)
        bad = (SCORE, {"prompt": "~", "response": "Yes."})
        item = {"prompt": "~", "response": "Yes."}
        items = (SCORE, {"items": [GOOD, item]})
        one = GOOD | {"responses": ["A sequence.", "~", "No."]}
        more = [
            (bad, "response"),
            (items, "items[1]"),
            ((SCORE, one), "responses"),  # those beside it in the row have none either
            ((SCORE, {"items": [GOOD, one]}), "items[1]"),
            ((RANK, GOOD | {"prompt": "~"}), "responses"),
            ((COMPARE, {"prompt": "x", "a": "Yes.", "b": "~"}), None),
            (("/score", {"text_1": "x", "text_2": ["a", "~"]}), "text_2[1]"),
            (("/rerank", {"query": "x", "documents": ["a", "~"]}), "documents"),
        ]
        requests = [(SCORE, GOOD), *(request for request, _ in more), (SCORE, GOOD)]
        answers = server.all_at_once(requests)
    assert answers[0] == answers[-1] == (200, wanted)
    for (status, answer), (_, field) in zip(answers[1:-1], more, strict=True):
        assert status == 500
        assert (answer["error"]["type"], answer["error"]["field"]) == ("not_finite", field)


def test_errors_outside_the_routes_are_json_too(server):
    for method, path, status, said in (
        ("GET", "/gram/v1/score", 405, "takes POST"),
        ("POST", "/page/page.css", 405, "takes GET"),
        ("POST", "/nowhere", 404, "/docs"),
    ):
        found, raw, headers = server.request(method, path, b"{}")
        assert found == status
        assert headers["content-type"] == "application/json"
        error = json.loads(raw)["error"]
        assert error["type"] in ("method_not_allowed", "not_found")
        assert said in error["message"]
