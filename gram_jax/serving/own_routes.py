"""Our own routes: a model's rewards as `score`, `rank` and comparisons give them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from gram_jax.data.sources import require_prompt, require_response
from gram_jax.errors import DataError
from gram_jax.evaluation import win_probability
from gram_jax.ranking import Ranked, comparisons, rank
from gram_jax.scorer import Question, Verdict, judge_probability
from gram_jax.scoring_input import Candidates, candidates_of, judged
from gram_jax.serving.bodies import flag, listed, only_fields, positive
from gram_jax.serving.engine import Answer
from gram_jax.serving.errors import RequestError, from_data, invalid
from gram_jax.serving.service import Asked, Service, number

_CONTEXT = ("system", "tools")
_ITEM = ("prompt", "response", "responses", "chosen", "rejected", "reference", *_CONTEXT)
_RANK = ("prompt", "responses", "top_n", *_CONTEXT)
_COMPARE = ("prompt", "a", "b", "tokens", *_CONTEXT)


async def score(service: Service, body: dict[str, Any]) -> dict[str, Any]:
    """`POST /gram/v1/score`: what the `score` command writes for the same rows."""
    wants_tokens = _wants_tokens(service, body)
    rest = {name: value for name, value in body.items() if name != "tokens"}
    if "items" in rest:
        only_fields(rest, ("items",))
        items = listed(rest, "items", service.limits.items, "items")
        asked = [_item(service, item, f"items[{i}].") for i, item in enumerate(items)]
    else:
        asked = [_item(service, rest, "")]
    answers = await service.ask(asked)
    results = [_scored(answer) for answer in answers]
    if wants_tokens:
        for result, answer in zip(results, answers, strict=True):
            result["tokens"] = await service.engine.aside(service.token_texts, answer)
    return {"reading": service.kind, "results": results}


async def rank_responses(service: Service, body: dict[str, Any]) -> dict[str, Any]:
    """`POST /gram/v1/rank`: best first, as the `rank` command ranks by its default method."""
    only_fields(body, _RANK)
    top_n = positive(body, "top_n")
    (ranked,), _ = await ranked_by(service, [_candidates(service, body)])
    results = []
    for place, index in enumerate(ranked.ranking.order, start=1):
        reward = ranked.ranking.rewards[index]
        assert reward is not None  # only keep_best leaves some out
        results.append({"index": index, "reward": number(reward), "rank": place})
    return {
        "reading": service.kind,
        "results": results[:top_n],
        "truncated": ranked.truncated,
    }


async def compare(service: Service, body: dict[str, Any]) -> dict[str, Any]:
    """`POST /gram/v1/compare`: how likely a is better than b; a judge sees them in both orders."""
    only_fields(body, _COMPARE)
    wants_tokens = _wants_tokens(service, body)
    try:
        prompt = require_prompt(body, file="", line=None)
        responses = [require_response(body, f, prompt, file="", line=None) for f in ("a", "b")]
    except DataError as error:
        raise from_data(error) from None
    (answer,) = await service.ask([Asked(Question(prompt, responses, [(0, 1)]), ("a", "b"))])
    found = answer.verdict
    result = {
        "reading": service.kind,
        **_comparison(service, found),
        "num_tokens": found.num_tokens.tolist(),
        "truncated": found.truncated,
        "tokens": None,
    }
    if wants_tokens:
        result["tokens"] = await service.engine.aside(service.token_texts, answer)
    return result


async def ranked_by(service: Service, asked: Sequence[Asked]) -> tuple[list[Ranked], list[Answer]]:
    """Ranks each question's responses by the method that rates and orders all of them.

    Returns:
      The rankings, and the answers that they come from.
    """
    if service.kind == "judge":
        _check_comparisons(service, asked)
        asked = [
            one._replace(question=one.question._replace(pairs=_all_pairs(one.question)))
            for one in asked
        ]
        open_ = [one for one in asked if one.question.pairs]
    else:
        open_ = list(asked)
    answers = await service.ask(open_)
    told = _Answered(service, [answer.verdict for answer in answers])
    return await service.engine.aside(rank, told, [one.question for one in asked]), answers


class _Answered:
    """A reward model that has answered already what `rank` will ask in its one round."""

    def __init__(self, service: Service, verdicts: Sequence[Verdict]) -> None:
        self.kind, self.beta, self._verdicts = service.kind, service.beta, verdicts

    def score(self, questions: Iterable[Question]) -> Iterator[Verdict]:
        for _, found in zip(questions, self._verdicts, strict=True):
            yield found


def _check_comparisons(service: Service, asked: Sequence[Asked]) -> None:
    """Comparisons are the questions of a judge."""
    for one in asked:
        n = len(one.question.responses)
        made = comparisons("round_robin", n)
        if made > service.limits.items:
            raise invalid(
                one.fields[0].split("[")[0],
                f"holds {n}, which a judge ranks by {made} comparisons; this server makes at most"
                f" {service.limits.items} a request",
            )


def _all_pairs(question: Question) -> list[tuple[int, int]]:
    n = len(question.responses)
    return [(i, j) for i in range(n) for j in range(i + 1, n)]


def _item(service: Service, item: Any, prefix: str) -> Asked:
    if not isinstance(item, dict):
        raise invalid(prefix.rstrip("."), "must be an object with prompt and response")
    only_fields(item, _ITEM, prefix)
    is_judge = service.kind == "judge"
    if is_judge:
        _check_two(item, prefix)
    if "responses" in item:
        _check_count(service, item, prefix)
    try:
        found = (judged if is_judge else candidates_of)(item, file="", line=None)
    except DataError as error:
        raise from_data(error, prefix) from None
    return _asked(found, prefix)


def _candidates(service: Service, body: dict[str, Any]) -> Asked:
    _check_count(service, body, "")
    try:
        found = candidates_of(
            {name: value for name, value in body.items() if name != "top_n"}, file="", line=None
        )
    except DataError as error:
        raise from_data(error) from None
    return _asked(found, "")


def _asked(found: Candidates, prefix: str) -> Asked:
    question = Question(found.prompt, found.responses, found.pairs)
    return Asked(question, [f"{prefix}{field}" for field in found.fields], f"{prefix}prompt")


def _check_two(item: Mapping[str, Any], prefix: str) -> None:
    """A judge's words for what `score` says of a file."""
    if "response" in item and "reference" not in item:
        raise invalid(
            f"{prefix}response",
            "is one response, and this model is a judge, which compares two; give two responses, or"
            " a reference beside it",
        )
    responses = item.get("responses")
    if isinstance(responses, list) and len(responses) != 2:
        raise invalid(
            f"{prefix}responses",
            f"holds {len(responses)}, and this model is a judge, which compares two; POST more to"
            " /gram/v1/rank",
        )


def _check_count(service: Service, values: Mapping[str, Any], prefix: str) -> None:
    try:
        listed(values, "responses", service.limits.candidates, "responses")
    except RequestError as error:
        raise invalid(f"{prefix}responses", error.message) from None


def _wants_tokens(service: Service, body: Mapping[str, Any]) -> bool:
    wanted = flag(body, "tokens")
    if wanted and service.kind != "likelihood":
        reason = f"this model is a {service.kind}, which has no log-probs of tokens; leave it out"
        raise RequestError("not_supported", reason, field="tokens")
    return wanted


def _scored(answer: Answer) -> dict[str, Any]:
    found = answer.verdict
    if found.rewards is None:
        assert found.forward is not None and found.backward is not None
        p = float(judge_probability(found.forward, found.backward)[0])
        return {
            "rewards": [number(p), number(1 - p)],
            "log_odds": [number(found.forward[0]), number(found.backward[0])],
            "num_tokens": found.num_tokens.tolist(),
            "truncated": found.truncated,
        }
    result: dict[str, Any] = {"rewards": list(map(number, found.rewards))}
    if answer.sums is not None:
        result["logprobs"] = list(map(number, answer.sums))
    return result | {"num_tokens": found.num_tokens.tolist(), "truncated": found.truncated}


def _comparison(service: Service, found: Verdict) -> dict[str, Any]:
    """p(a is better), and what it is made of."""
    if found.rewards is not None:
        p = win_probability(found.rewards[:1] - found.rewards[1:], service.beta)
        nothing = dict.fromkeys(("forward", "backward", "p_forward", "p_backward"))
        rewards = list(map(number, found.rewards))
        return {"p_a_better": number(p[0]), "rewards": rewards, **nothing}
    assert found.forward is not None and found.backward is not None
    return {
        "p_a_better": number(judge_probability(found.forward, found.backward)[0]),
        "rewards": None,
        "forward": number(found.forward[0]),
        "backward": number(found.backward[0]),
        "p_forward": number(win_probability(found.forward, 1.0)[0]),
        "p_backward": number(win_probability(-found.backward, 1.0)[0]),
    }
