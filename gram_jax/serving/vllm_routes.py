"""Routes with the bodies of vLLM's pooling and scoring servers, so that their clients work.

  /score, /v1/score                          text_1 is the prompt, text_2 the response
  /rerank, /v1/rerank, /v2/rerank            the query is the prompt, documents are responses
  /classify, /pooling                        whole texts, or a conversation
  /generative_scoring                        p(first label) as the next token

A number is the reward where ``use_activation`` is false, and sig(beta x reward) where it is true.
Left out, it is true on /classify, /score and /rerank for a head, as in vLLM, and false elsewhere:
the sigmoid of a log-prob says nothing. Fields that would change numbers in vLLM and are not here
are refused.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gram_jax.data.formats import kind
from gram_jax.data.sources import Prompt, checked_messages, checked_response, checked_text
from gram_jax.encoding import Encoded
from gram_jax.errors import DataError, UserError
from gram_jax.evaluation import win_probability
from gram_jax.scorer import Question
from gram_jax.serving.bodies import flag, listed, only_fields, positive
from gram_jax.serving.engine import Answer
from gram_jax.serving.errors import RequestError, from_data, invalid
from gram_jax.serving.own_routes import ranked_by
from gram_jax.serving.service import Asked, Service, number
from gram_jax.serving.texts import continuations, encode_ids, encode_text

_COMMON = ("model", "user", "priority", "request_id", "use_activation")
_SIDES = (("text_1", "text_2"), ("queries", "documents"), ("queries", "items"),
          ("data_1", "data_2"))  # fmt: skip


async def score(service: Service, body: dict[str, Any]) -> dict[str, Any]:
    """`POST /score`: one prompt with each response, or as many prompts as responses."""
    names = next((pair for pair in _SIDES if pair[1] in body), _SIDES[0])
    only_fields(body, (*names, *_COMMON))
    if service.kind == "judge":
        raise RequestError(
            "not_supported",
            "this model is a judge, which compares responses and has no score for one; POST to"
            " /rerank or /gram/v1/compare",
        )
    most = service.limits.items
    prompts = _texts(body, names[0], most, may_be_empty=True)
    responses = _texts(body, names[1], most)
    if len(prompts) not in (1, len(responses)):
        reason = f"holds {len(prompts)}; it takes one, or as many as {names[1]}, {len(responses)}"
        raise invalid(names[0], reason)
    several = len(prompts) > 1
    prompts = prompts if several else prompts * len(responses)
    fields = _fields(body, names[1], len(responses))
    asked = [
        Asked(Question(prompt, [response]), (field,), f"{names[0]}[{i}]" if several else names[0])
        for i, (prompt, response, field) in enumerate(zip(prompts, responses, fields, strict=True))
    ]
    answers = await service.ask(asked)
    activate = _activation(service, body, service.kind == "head")
    data = [
        {"index": i, "object": "score", "score": activate(_reward(answer))}
        for i, answer in enumerate(answers)
    ]
    return _list_of(service, "score", data, answers)


async def rerank(service: Service, body: dict[str, Any]) -> dict[str, Any]:
    """`POST /rerank`: best first."""
    only_fields(body, ("query", "documents", "top_n", "return_documents", *_COMMON))
    top_n = None if body.get("top_n") == 0 else positive(body, "top_n")
    prompt = _checked(body.get("query"), "query", allow_empty=True)
    documents = listed(body, "documents", service.limits.candidates, "documents")
    responses = [_document(document, i) for i, document in enumerate(documents)]
    fields = [f"documents[{i}]" for i in range(len(responses))]
    asked = Asked(Question(prompt, responses), fields, "query")
    ((ranked,), answers) = await ranked_by(service, [asked])
    activate = _activation(service, body, service.kind == "head")
    wanted = body.get("return_documents") is None or flag(body, "return_documents")
    results = []
    for index in ranked.ranking.order[:top_n]:
        reward = ranked.ranking.rewards[index]
        assert reward is not None
        found: dict[str, Any] = {"index": index, "relevance_score": activate(reward)}
        results.append(found | ({"document": {"text": responses[index]}} if wanted else {}))
    return {
        "id": _id("rerank"),
        "model": service.name,
        "usage": _usage(answers),
        "results": results,
    }


async def classify(service: Service, body: dict[str, Any]) -> dict[str, Any]:
    """`POST /classify`: one class, whose number is the reward."""
    answers = await _whole(service, body)
    activate = _activation(service, body, service.kind == "head")
    data = [
        {
            "index": i,
            "label": "reward",
            "probs": [activate(_reward(answer))],
            "num_classes": 1,
        }
        for i, answer in enumerate(answers)
    ]
    return _list_of(service, "classify", data, answers)


async def pooling(service: Service, body: dict[str, Any]) -> dict[str, Any]:
    """`POST /pooling`: the reward as a vector of one number."""
    answers = await _whole(service, body)
    activate = _activation(service, body, False)
    data = [
        {"index": i, "object": "pooling", "data": [activate(_reward(answer))]}
        for i, answer in enumerate(answers)
    ]
    return _list_of(service, "pool", data, answers)


async def generative_scoring(service: Service, body: dict[str, Any]) -> dict[str, Any]:
    """`POST /generative_scoring`: p(the first label comes next), among the labels or all tokens."""
    known = ("query", "items", "label_token_ids", "apply_softmax", "item_first",
             "add_special_tokens")  # fmt: skip
    only_fields(body, (*known, *_COMMON[:-1]))
    labels = _labels(service, body)
    softmax = True if body.get("apply_softmax") is None else flag(body, "apply_softmax")
    if service.kind == "judge" and not softmax:
        raise RequestError(
            "not_supported",
            "a judge compares its two labels only; leave it out",
            field="apply_softmax",
        )
    listed(body, "items", service.limits.items, "items")
    encoded = await service.engine.aside(_label_questions, service, body, labels)
    answers = await service.compute(encoded, _fields(body, "items", len(encoded)))
    data = [
        {"index": i, "object": "score", "score": _label_score(service, answer, labels, softmax)}
        for i, answer in enumerate(answers)
    ]
    return _list_of(service, "generative-scoring", data, answers)


def _label_score(service: Service, answer: Answer, labels: list[int], softmax: bool) -> float:
    if service.kind == "judge":
        log_odds = float(answer.verdict.forward[0])  # type: ignore[index]
        first = service.engine.scorer.readout.labels[0]  # type: ignore[index]
        return number(win_probability(np.array([log_odds]), 1.0 if labels[0] == first else -1.0)[0])
    assert answer.sums is not None
    logprobs = np.array(answer.sums)
    if softmax:
        logprobs = logprobs - np.logaddexp.reduce(logprobs)
    return number(float(np.exp(logprobs[0])))


def _labels(service: Service, body: dict[str, Any]) -> list[int]:
    values = listed(body, "label_token_ids", service.limits.candidates, "token ids")
    if service.kind == "head":
        raise RequestError("not_supported", "this model is a head, which has no next token")
    labels = _token_ids(service, values, "label_token_ids")
    if len(set(labels)) < len(labels):
        raise invalid("label_token_ids", "holds the same id twice")
    own = service.engine.scorer.readout.labels
    if service.kind == "judge" and set(labels) != set(own or ()):
        raise RequestError(
            "not_supported",
            f"this model is a judge, which reads its labels {list(own or ())} only",
            field="label_token_ids",
        )
    return labels


def _label_questions(service: Service, body: dict[str, Any], labels: list[int]) -> list[Encoded]:
    encoder = service.engine.scorer.encoder
    special = body.get("add_special_tokens") is None or flag(body, "add_special_tokens")
    item_first = flag(body, "item_first")
    query = _ids(service, body.get("query"), "query", special)
    found = []
    for i, item in enumerate(body["items"]):
        field = f"items[{i}]"
        ids = _ids(service, item, field, False)
        ids = [*ids, *query] if item_first else [*query, *ids]
        if not ids:
            raise invalid(field, "and the query are empty")
        if service.kind == "judge":
            before = min(len(ids) - 1, len(ids) if item_first else len(query))
            found.append(encode_ids(encoder, ids, before, field))
        else:
            nexts = [np.array([label], np.int32) for label in labels]
            found.append(continuations(encoder, np.asarray(ids, np.int32), nexts, field))
    return found


def _ids(service: Service, value: Any, field: str, special: bool) -> list[int]:
    if isinstance(value, list):
        return _token_ids(service, value, field)
    text = _checked(value, field, allow_empty=True)
    tokenizer = service.engine.scorer.encoder.tokenizer
    if special:
        return tokenizer.encode_prompt(text)
    return tokenizer.encode_response(text, add_eos=False)


async def _whole(service: Service, body: dict[str, Any]) -> list[Answer]:
    """The answers to whole texts, or to a conversation."""
    if "messages" in body:
        only_fields(body, ("messages", *_COMMON))
        return await service.ask([_conversation(service, body["messages"])])
    only_fields(body, ("input", "encoding_format", "task", "add_special_tokens", *_COMMON))
    if body.get("encoding_format", "float") != "float":
        raise RequestError("not_supported", "numbers are written as such", field="encoding_format")
    inputs = body.get("input")
    if isinstance(inputs, str) or (isinstance(inputs, list) and inputs and _is_id(inputs[0])):
        inputs, fields = [inputs], ["input"]
    else:
        inputs = listed(body, "input", service.limits.items, "texts")
        fields = [f"input[{i}]" for i in range(len(inputs))]
    special = body.get("add_special_tokens") is None or flag(body, "add_special_tokens")
    encoded = await service.engine.aside(_encode_inputs, service, inputs, fields, special)
    service.unsplit += len(encoded)
    return await service.compute(encoded, fields)


def _encode_inputs(
    service: Service, inputs: Sequence[Any], fields: Sequence[str], special: bool
) -> list[Encoded]:
    encoder = service.engine.scorer.encoder
    found = []
    for value, field in zip(inputs, fields, strict=True):
        if isinstance(value, list):
            ids = _token_ids(service, value, field)
            found.append(encode_ids(encoder, ids, 1, field))
            continue
        text = _checked(value, field)
        try:
            found.append(encode_text(encoder, text, field, special=special))
        except UserError as error:
            raise invalid(field, str(error)) from None
    return found


def _conversation(service: Service, messages: Any) -> Asked:
    """A conversation whose last message, the assistant's, is the response."""
    if service.kind == "judge":
        raise RequestError(
            "not_supported",
            "this model is a judge, which compares two responses; POST to /gram/v1/compare",
            field="messages",
        )
    if not isinstance(messages, list):
        raise invalid("messages", f"must be a list of messages, not {kind(messages)}")
    try:
        checked = checked_messages(messages, "messages", "", None)
        prompt: Prompt = checked[:-1]
        last = f"messages[{len(checked) - 1}]"
        response = checked_response(checked[-1], last, prompt, file="", line=None)
    except DataError as error:
        raise from_data(error) from None
    if not prompt:
        raise invalid("messages", "holds the response alone; the turns before it are missing")
    return Asked(Question(prompt, [response]), (last,), "messages")


def _texts(body: dict[str, Any], field: str, most: int, *, may_be_empty: bool = False) -> list[str]:
    """A field that is a text or a list of texts."""
    if isinstance(body.get(field), str):
        return [_checked(body[field], field, allow_empty=may_be_empty)]
    values = listed(body, field, most, "texts")
    return [_checked(v, f"{field}[{i}]", allow_empty=may_be_empty) for i, v in enumerate(values)]


def _fields(body: dict[str, Any], field: str, count: int) -> list[str]:
    if isinstance(body[field], str):
        return [field]
    return [f"{field}[{i}]" for i in range(count)]


def _document(value: Any, i: int) -> str:
    if isinstance(value, dict):
        return _checked(value.get("text"), f"documents[{i}].text")
    return _checked(value, f"documents[{i}]")


def _checked(value: Any, field: str, *, allow_empty: bool = False) -> str:
    try:
        return checked_text(value, field, "", None, allow_empty)
    except DataError as error:
        raise from_data(error) from None


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _token_ids(service: Service, values: Sequence[Any], field: str) -> list[int]:
    """Ids of the vocabulary."""
    size = service.engine.scorer.vocab_size
    for i, value in enumerate(values):
        if not _is_id(value) or not 0 <= value < size:
            raise invalid(f"{field}[{i}]", f"must be a token id, 0 to {size - 1}")
    return list(values)


def _reward(answer: Answer) -> float:
    """The one number of an answer to a single sequence."""
    found = answer.verdict
    return float((found.forward if found.rewards is None else found.rewards)[0])  # type: ignore[index]


def _activation(
    service: Service, body: dict[str, Any], by_default: bool
) -> Callable[[float], float]:
    """What becomes of a reward."""
    given = body.get("use_activation")
    if not (by_default if given is None else flag(body, "use_activation")):
        return number
    return lambda reward: number(win_probability(np.array([reward]), service.beta)[0])


def _list_of(
    service: Service, what: str, data: list[dict[str, Any]], answers: Sequence[Answer]
) -> dict[str, Any]:
    return {
        "id": _id(what),
        "object": "list",
        "created": int(time.time()),
        "model": service.name,
        "data": data,
        "usage": _usage(answers),
    }


def _id(what: str) -> str:
    return f"{what}-{uuid.uuid4().hex}"


def _usage(answers: Sequence[Answer]) -> dict[str, int]:
    tokens = sum(len(prompt) + len(rest) for a in answers for prompt, rest in a.encoded.sequences)
    return {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0}
