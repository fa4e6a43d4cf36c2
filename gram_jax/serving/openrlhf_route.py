"""The remote reward model of OpenRLHF: whole texts in, with their prompts beside them.

  POST /get_reward {"query": [text, ...], "prompts": [...], "labels": [...]}

A query is split where its prompt ends, whether or not BOS is spelt out before it. One that has no
prompt, or does not begin with it, is a text without a prompt (`gram_jax.serving.texts`), and
``extra_logs`` marks it. A judge compares each query's response with its label, a reference answer,
and the reward is p(it is better). Other fields are not read: versions of the client add their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gram_jax.data.sources import checked_text
from gram_jax.encoding import Encoded
from gram_jax.errors import DataError, UserError
from gram_jax.scorer import Question, judge_probability
from gram_jax.serving.bodies import listed
from gram_jax.serving.engine import Answer
from gram_jax.serving.errors import RequestError, from_data, invalid
from gram_jax.serving.service import Asked, Service, number
from gram_jax.serving.texts import encode_text, split_text


async def get_reward(service: Service, body: dict[str, Any]) -> dict[str, Any]:
    """`POST /get_reward`."""
    most = service.limits.items
    queries = [_text(q, f"query[{i}]") for i, q in enumerate(_list(body, "query", most))]
    prompts = _beside(body, "prompts", len(queries))
    labels = _beside(body, "labels", len(queries)) if service.kind == "judge" else []
    encoded, unsplit = await service.engine.aside(_encode, service, queries, prompts, labels)
    service.unsplit += sum(unsplit)
    answers = await service.compute(encoded, [f"query[{i}]" for i in range(len(queries))])
    rewards = [_reward(answer) for answer in answers]
    return {
        "rewards": rewards,
        "scores": rewards,
        "extra_logs": {
            "num_tokens": [int(a.verdict.num_tokens[0]) for a in answers],
            "truncated": [int(a.verdict.truncated) for a in answers],
            "without_prompt": [int(value) for value in unsplit],
        },
    }


def _reward(answer: Answer) -> float:
    found = answer.verdict
    if found.rewards is not None:
        return number(found.rewards[0])
    assert found.forward is not None and found.backward is not None
    return number(judge_probability(found.forward, found.backward)[0])


def _encode(
    service: Service, queries: list[str], prompts: list[Any], labels: list[Any]
) -> tuple[list[Encoded], list[bool]]:
    encoder = service.engine.scorer.encoder
    bos = encoder.tokenizer.special_tokens.get("bos_token", "")
    found, unsplit = [], []
    for i, query in enumerate(queries):
        field = f"query[{i}]"
        prompt = prompts[i] if prompts and isinstance(prompts[i], str) else None
        parts = split_text(query, prompt, bos)
        unsplit.append(parts is None)
        if service.kind == "judge":
            label = _text(labels[i] if labels else None, f"labels[{i}]")
            if parts is None:
                raise invalid(
                    field,
                    f"does not begin with prompts[{i}], which a judge needs to tell the question"
                    " from the response",
                )
            asked = Asked(
                Question(parts[0], [parts[1], label], [(0, 1)]),
                (field, f"labels[{i}]"),
                f"prompts[{i}]",
            )
            found.append(service.encode(asked))
        elif parts is not None:
            asked = Asked(Question(parts[0], [parts[1]]), (field,), f"prompts[{i}]")
            found.append(service.encode(asked))
        else:
            try:
                found.append(encode_text(encoder, query, field))
            except UserError as error:
                raise invalid(field, str(error)) from None
    return found, unsplit


def _list(body: Mapping[str, Any], field: str, most: int) -> list[Any]:
    """A list that may be empty: of several servers, all but one may be asked nothing."""
    return listed(body, field, most, "texts", least=0)


def _beside(body: Mapping[str, Any], field: str, count: int) -> list[Any]:
    """A list with one entry per query, or [] where there is none."""
    if body.get(field) is None:
        return []
    values = body[field]
    if isinstance(values, list) and len(values) == count:
        return values
    got = f"{len(values)} entries" if isinstance(values, list) else "no list"
    raise invalid(field, f"must be a list with one entry per query, {count}; got {got}")


def _text(value: Any, field: str) -> str:
    try:
        return checked_text(value, field, "", None, allow_empty=False)
    except DataError as error:
        if field.startswith("labels"):
            raise RequestError(
                "invalid",
                f"{error.reason}; this model is a judge, which compares each response with a label,"
                " a reference answer",
                field=field,
            ) from None
        raise from_data(error) from None
