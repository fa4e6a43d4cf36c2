"""The description of the routes in OpenAPI 3.1, as `/openapi.json` gives it."""

from __future__ import annotations

from typing import Any, TypeAlias

import gram_jax
from gram_jax.serving.errors import KINDS
from gram_jax.serving.service import Service

Schema: TypeAlias = dict[str, Any]


def describe(service: Service) -> dict[str, Any]:
    """The whole document; limits and the kind of reward are those of this server."""
    paths: dict[str, Any] = {
        path: {"post": _post(summary, request, answer)}
        for path, summary, request, answer in _routes(service)
    }
    for path, summary, answer, statuses in _READ:
        responses = {status: _json(meaning, answer) for status, meaning in statuses.items()}
        paths[path] = {"get": {"summary": summary, "responses": responses}}
    paths["/metrics"] = {
        "get": {
            "summary": "Numbers for Prometheus.",
            "responses": {
                "200": {
                    "description": "In its text format.",
                    "content": {"text/plain": {"schema": _text()}},
                }
            },
        }
    }
    for path in ("/health", "/ready"):
        paths[path]["get"]["security"] = []
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "gram_jax",
            "version": gram_jax.__version__,
            "description": f"Rewards of {service.name}, read as a {service.kind}.",
        },
        "paths": paths,
        "components": {
            "schemas": {
                "Error": _object(
                    {
                        "error": _object(
                            {
                                "message": _text("What is wrong and what to do."),
                                "field": _maybe(_text("Where, as in items[3].response.")),
                                "type": {"type": "string", "enum": list(KINDS)},
                            }
                        )
                    }
                ),
                "Message": _object(
                    {"role": _text(), "content": {}}, required=["role"], additional=True
                ),
                "Prompt": _either(_text(), _list({"$ref": "#/components/schemas/Message"})),
                "Response": _either(
                    _text(),
                    {"$ref": "#/components/schemas/Message"},
                    _list({"$ref": "#/components/schemas/Message"}, most=1),
                ),
            },
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
            },
        },
        "security": [{}, {"bearer": []}, {"key": []}],
    }


_PROMPT = {"$ref": "#/components/schemas/Prompt"}
_RESPONSE = {"$ref": "#/components/schemas/Response"}
_ERROR = {"$ref": "#/components/schemas/Error"}


def _text(meaning: str = "") -> Schema:
    return {"type": "string"} | ({"description": meaning} if meaning else {})


def _number(meaning: str = "") -> Schema:
    return {"type": "number"} | ({"description": meaning} if meaning else {})


def _count(meaning: str = "", least: int = 0) -> Schema:
    found = {"type": "integer", "minimum": least}
    return found | ({"description": meaning} if meaning else {})


def _flag(meaning: str = "") -> Schema:
    return {"type": "boolean"} | ({"description": meaning} if meaning else {})


def _list(of: Schema, most: int | None = None, least: int = 0) -> Schema:
    found = {"type": "array", "items": of, "minItems": least}
    return found if most is None else found | {"maxItems": most}


def _either(*of: Schema) -> Schema:
    return {"anyOf": list(of)}


def _maybe(of: Schema) -> Schema:
    return _either(of, {"type": "null"})


def _object(
    properties: dict[str, Schema], required: list[str] | None = None, *, additional: bool = False
) -> Schema:
    """All properties are required unless ``required`` lists those that are."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties) if required is None else required,
        "additionalProperties": additional,
    }


def _json(meaning: str, schema: Schema) -> dict[str, Any]:
    return {"description": meaning, "content": {"application/json": {"schema": schema}}}


def _post(summary: str, request: Schema, answer: Schema) -> dict[str, Any]:
    statuses = sorted({status for status in KINDS.values() if status not in (404, 405)})
    responses = {"200": _json("The answer.", answer)}
    responses |= {
        str(status): _json(", ".join(k for k, s in KINDS.items() if s == status), _ERROR)
        for status in statuses
    }
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": {"application/json": {"schema": request}}},
        "responses": responses,
    }


_STATUS = _object({"status": _text()})
_READ = (
    ("/health", "Whether the model can still compute.", _STATUS,
     {"200": "It can.", "503": "It failed, and the server ends."}),
    ("/ready", "Whether requests are answered.", _STATUS,
     {"200": "They are.", "503": "Not yet, or no more."}),
    ("/gram/v1/model", "What is served.", _object({
        "checkpoint": _text(), "reading": _text("likelihood, judge or head"), "average": _text(),
        "beta": _number(), "max_length": _count(), "dtype": _text(), "version": _text(),
        "limits": _object({"body_bytes": _count(), "candidates": _count(), "items": _count()}),
    }), {"200": "The model."}),
)  # fmt: skip

_CONTEXT = {"system": _text("A system message."), "tools": _list({"type": "object"})}
_TOKENS = _list(
    _object(
        {"text": _text(), "logprob": _number(), "special": _flag()}, required=["text", "logprob"]
    )
)
_USAGE = _object(
    {"prompt_tokens": _count(), "total_tokens": _count(), "completion_tokens": _count()}
)
_COMMON = {
    "model": _text(), "user": _text(), "priority": {"type": "integer"}, "request_id": _text(),
}  # fmt: skip
_ACTIVATION = {"use_activation": _flag("sig(beta x reward) instead of the reward.")}


def _listing(data: Schema) -> Schema:
    return _object(
        {
            "id": _text(), "object": _text(), "created": _count(), "model": _text(),
            "data": _list(data), "usage": _USAGE,
        }
    )  # fmt: skip


def _routes(service: Service) -> list[tuple[str, str, Schema, Schema]]:
    """(path, summary, body, answer) of the routes that compute."""
    limits = service.limits
    items, candidates = limits.items, limits.candidates
    item = _object(
        {
            "prompt": _PROMPT, "response": _RESPONSE, "chosen": _RESPONSE, "rejected": _RESPONSE,
            "responses": _list(_RESPONSE, candidates, 1), "reference": _RESPONSE, **_CONTEXT,
        },
        required=["prompt"],
    )  # fmt: skip
    asked = {**item, "properties": {**item["properties"], "tokens": _flag("Also of each token.")}}
    many = _object({"items": _list(item, items, 1), "tokens": _flag()}, required=["items"])
    scored = _object(
        {
            "rewards": _list(_number()), "logprobs": _list(_number()),
            "log_odds": _list(_number(), 2), "num_tokens": _list(_count()),
            "truncated": _flag(), "tokens": _list(_TOKENS),
        },
        required=["rewards", "num_tokens", "truncated"],
    )  # fmt: skip
    ranked = _object({"index": _count(), "reward": _number(), "rank": _count(least=1)})
    odds = _maybe(_number("z_A - z_B of this order."))
    score = [
        ("text_1", "text_2"), ("queries", "documents"), ("queries", "items"), ("data_1", "data_2"),
    ]  # fmt: skip
    texts = _either(_text(), _list(_text(), items, 1))
    score_body = _either(
        *(
            _object({a: texts, b: texts, **_ACTIVATION, **_COMMON}, required=[a, b])
            for a, b in score
        )
    )
    ids = _list(_count())
    whole = _either(
        _object(
            {
                "input": _either(_text(), ids, _list(_either(_text(), ids), items, 1)),
                "encoding_format": {"const": "float"}, "task": _text(),
                "add_special_tokens": _flag("BOS before a text; by default yes."),
                **_ACTIVATION, **_COMMON,
            },
            required=["input"],
        ),
        _object({"messages": _PROMPT, **_ACTIVATION, **_COMMON}, required=["messages"]),
    )  # fmt: skip
    rerank_body = _object(
        {
            "query": _text(), "top_n": _count(), "return_documents": _flag(),
            "documents": _list(
                _either(_text(), _object({"text": _text()}, additional=True)), candidates, 1
            ),
            **_ACTIVATION, **_COMMON,
        },
        required=["query", "documents"],
    )  # fmt: skip
    reranked = _object(
        {
            "id": _text(), "model": _text(), "usage": _USAGE,
            "results": _list(_object(
                {"index": _count(), "relevance_score": _number(),
                 "document": _object({"text": _text()})},
                required=["index", "relevance_score"],
            )),
        }
    )  # fmt: skip
    score_answer = _listing(_object({"index": _count(), "object": _text(), "score": _number()}))
    return [
        ("/gram/v1/score", "Rewards of responses.", _either(asked, many),
         _object({"reading": _text(), "results": _list(scored)})),
        ("/gram/v1/rank", "Responses to a prompt, best first.",
         _object({"prompt": _PROMPT, "responses": _list(_RESPONSE, candidates, 1),
                  "top_n": _count(least=1), **_CONTEXT}, required=["prompt", "responses"]),
         _object({"reading": _text(), "results": _list(ranked), "truncated": _flag()})),
        ("/gram/v1/compare", "How likely a is better than b.",
         _object({"prompt": _PROMPT, "a": _RESPONSE, "b": _RESPONSE, "tokens": _flag(), **_CONTEXT},
                 required=["prompt", "a", "b"]),
         _object({"reading": _text(), "p_a_better": _number(),
                  "rewards": _maybe(_list(_number(), 2)), "forward": odds, "backward": odds,
                  "p_forward": _maybe(_number()), "p_backward": _maybe(_number()),
                  "num_tokens": _list(_count(), 2), "truncated": _flag(),
                  "tokens": _maybe(_list(_TOKENS, 2))})),
        ("/get_reward", "OpenRLHF's remote reward model.",
         _object({"query": _list(_text(), items), "prompts": _maybe(_list({})),
                  "labels": _maybe(_list({}))}, required=["query"], additional=True),
         _object({"rewards": _list(_number()), "scores": _list(_number()),
                  "extra_logs": _object({"num_tokens": _list(_count()),
                                         "truncated": _list(_count()),
                                         "without_prompt": _list(_count())})})),
        ("/classify", "The reward of whole texts or a conversation, as a class.", whole,
         _listing(_object({"index": _count(), "label": _text(), "probs": _list(_number(), 1),
                           "num_classes": _count()}))),
        ("/pooling", "The reward of whole texts or a conversation, as a vector.", whole,
         _listing(_object({"index": _count(), "object": _text(), "data": _list(_number(), 1)}))),
        *((path, "Rewards of text_2 after text_1.", score_body, score_answer)
          for path in ("/score", "/v1/score")),
        *((path, "Documents as responses to the query, best first.", rerank_body, reranked)
          for path in ("/rerank", "/v1/rerank", "/v2/rerank")),
        ("/generative_scoring", "p(the first label is the next token).",
         _object({"query": _either(_text(), ids), "items": _list(_either(_text(), ids), items, 1),
                  "label_token_ids": _list(_count(), candidates, 1), "apply_softmax": _flag(),
                  "item_first": _flag(), "add_special_tokens": _flag(), **_COMMON},
                 required=["query", "items", "label_token_ids"]),
         score_answer),
    ]  # fmt: skip
