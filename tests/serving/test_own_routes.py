"""What is served is what batch scoring gives, whoever else is asking meanwhile."""

import io
import json

import numpy as np
import pytest
from live_server import live

from gram_jax.ranking import rank
from gram_jax.scorer import Question, Scorer, judge_probability
from gram_jax.scoring_job import ScoringJob, run_job

CHAT_PROMPT = [{"role": "user", "content": "What is a list?"}]


def expected(scorer, rows):
    """Rewards by batch scoring: of each response, or of a judge's first two."""
    plain = Scorer(scorer.loaded, scorer.settings)
    questions = [Question(prompt, responses, [(0, 1)]) for prompt, responses in rows]
    found = []
    for verdict in plain.score(questions):
        if verdict.rewards is not None:
            found.append(verdict.rewards)
        else:
            (p,) = judge_probability(verdict.forward, verdict.backward)
            found.append(np.array([p, 1 - p]))
    return found


@pytest.mark.parametrize("reading", ["likelihood", "judge", "head"])
def test_served_at_once_is_scored_as_in_a_batch(reading, rows, request):
    server = request.getfixturevalue(reading)
    if reading == "judge":
        rows = [(prompt, responses[:2]) for prompt, responses in rows]
    bodies = [{"prompt": prompt, "responses": responses} for prompt, responses in rows]
    items = {"items": bodies[:10]}
    requests = [("/gram/v1/score", body) for body in bodies] + [("/gram/v1/score", items)]
    answers = server.all_at_once(requests)
    assert {status for status, _ in answers} == {200}
    assert all(answer["reading"] == reading for _, answer in answers)
    rewards = [answer["results"][0]["rewards"] for _, answer in answers[:-1]]
    together = [result["rewards"] for result in answers[-1][1]["results"]]
    wanted = expected(server.service.engine.scorer, rows)
    assert np.ptp(np.concatenate(wanted)) > 0.1
    for found, number in zip(rewards + together, wanted + wanted[:10], strict=True):
        np.testing.assert_allclose(found, number, rtol=1e-5, atol=1e-6)


def test_served_is_what_the_score_command_writes(tmp_path, likelihood, rows):
    path, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    items = [{"prompt": prompt, "responses": responses} for prompt, responses in rows[:12]]
    items += [{"prompt": CHAT_PROMPT, "response": "A sequence."}, {"prompt": "", "response": "a"}]
    items += [{"prompt": "One?", "chosen": "Yes.", "rejected": "No.", "system": "Be brief."}]
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    scorer = likelihood.service.engine.scorer
    job = ScoringJob(input=str(path), output=str(output), reward=scorer.settings, per_token=True)
    run_job(job, lambda: scorer.loaded, stream=io.StringIO())
    written = [json.loads(line) for line in output.read_text().splitlines()]
    served = likelihood.good("/gram/v1/score", {"items": items, "tokens": True})["results"]
    for row, result in zip(written, served, strict=True):
        single = not isinstance(row["reward"], list)
        for column, name in (("reward", "rewards"), ("logprob", "logprobs")):
            values = [row[column]] if single else row[column]
            np.testing.assert_allclose(result[name], values, rtol=1e-5)
        assert result["num_tokens"] == ([row["num_tokens"]] if single else row["num_tokens"])
        assert not result["truncated"]
        for tokens, logprobs in zip(
            result["tokens"], [row["token_logprobs"]] if single else row["token_logprobs"],
            strict=True,
        ):  # fmt: skip
            np.testing.assert_allclose(
                [token["logprob"] for token in tokens], logprobs, rtol=1e-4, atol=1e-5
            )


def test_the_texts_of_tokens_join_to_the_response(likelihood):
    response = "Größe: ½ 😀 naïve\nlist.sort()  ok"
    answer = likelihood.good(
        "/gram/v1/score", {"prompt": "x", "responses": [response], "tokens": True}
    )
    (tokens,) = answer["results"][0]["tokens"]
    assert "".join(t["text"] for t in tokens if not t.get("special")) == response
    assert tokens[-1]["special"] and len(tokens) == answer["results"][0]["num_tokens"][0]
    total = sum(token["logprob"] for token in tokens)
    np.testing.assert_allclose(total, answer["results"][0]["logprobs"][0], rtol=1e-5)


@pytest.mark.parametrize("reading", ["likelihood", "judge", "head"])
def test_a_served_ranking_is_that_of_the_rank_command(reading, rows, request):
    server = request.getfixturevalue(reading)
    chosen = [(prompt, [*responses, responses[0]]) for prompt, responses in rows[:8]]  # a tie
    chosen.append((rows[0][0], ["Alone."]))
    scorer = server.service.engine.scorer
    plain = Scorer(scorer.loaded, scorer.settings)
    wanted = rank(plain, [Question(*row) for row in chosen])
    bodies = [{"prompt": prompt, "responses": responses} for prompt, responses in chosen]
    answers = server.all_at_once([("/gram/v1/rank", body) for body in bodies])
    for (status, answer), ranked in zip(answers, wanted, strict=True):
        assert status == 200
        results = answer["results"]
        assert [result["rank"] for result in results] == list(range(1, len(results) + 1))
        assert tuple(result["index"] for result in results) == ranked.ranking.order
        numbers = [ranked.ranking.rewards[result["index"]] for result in results]
        np.testing.assert_allclose(
            [result["reward"] for result in results], numbers, rtol=1e-5, atol=2e-6
        )
    top = server.good("/gram/v1/rank", bodies[0] | {"top_n": 1})
    assert [result["index"] for result in top["results"]] == [wanted[0].ranking.best]


def test_a_comparison_of_a_judge_shows_both_orders(judge, rows):
    prompt, (a, b, *_) = rows[0]
    scorer = judge.service.engine.scorer
    plain = Scorer(scorer.loaded, scorer.settings)
    (verdict,) = plain.score([Question(prompt, [a, b], [(0, 1)])])
    found = judge.good("/gram/v1/compare", {"prompt": prompt, "a": a, "b": b})
    np.testing.assert_allclose(found["forward"], verdict.forward[0], rtol=1e-5)
    np.testing.assert_allclose(found["backward"], verdict.backward[0], rtol=1e-5)
    mean = (found["p_forward"] + found["p_backward"]) / 2
    np.testing.assert_allclose(found["p_a_better"], mean, rtol=1e-6)
    np.testing.assert_allclose(found["p_forward"], 1 / (1 + np.exp(-verdict.forward[0])), rtol=1e-5)
    swapped = judge.good("/gram/v1/compare", {"prompt": prompt, "a": b, "b": a})
    np.testing.assert_allclose(swapped["p_a_better"], 1 - found["p_a_better"], rtol=1e-5)
    assert found["rewards"] is None and found["tokens"] is None
    assert found["num_tokens"] == verdict.num_tokens.tolist()


def test_a_comparison_of_a_likelihood_uses_its_beta(make_scorer, rows):
    prompt, (a, b, *_) = rows[0]
    with live(make_scorer(beta=0.05, average="mean", batch_rows=1)) as server:
        found = server.good("/gram/v1/compare", {"prompt": prompt, "a": a, "b": b, "tokens": True})
        assert server.good("/gram/v1/score", {"prompt": prompt, "responses": [a, b]})["results"][0][
            "rewards"
        ] == pytest.approx(found["rewards"], rel=1e-6)
        status, raw, _ = server.request("GET", "/gram/v1/model")
    first, second = found["rewards"]
    np.testing.assert_allclose(
        found["p_a_better"], 1 / (1 + np.exp(-0.05 * (first - second))), rtol=1e-6
    )
    means = [np.mean([token["logprob"] for token in tokens]) for tokens in found["tokens"]]
    np.testing.assert_allclose(means, found["rewards"], rtol=1e-5)
    model = json.loads(raw)
    assert status == 200
    assert (model["checkpoint"], model["reading"], model["beta"]) == ("small", "likelihood", 0.05)
    assert (model["average"], model["max_length"]) == ("mean", 160)


def test_candidates_of_one_call_share_their_prompt(likelihood, english):
    tokenizer = likelihood.service.engine.scorer.encoder.tokenizer
    prompt, responses = english[0][:120], [f"Number {i}." for i in range(8)]
    before = likelihood.service.engine.batcher.packed.tokens
    likelihood.good("/gram/v1/score", {"prompt": prompt, "responses": responses})
    used = likelihood.service.engine.batcher.packed.tokens - before
    own = sum(map(len, tokenizer.encode_responses(responses)))
    assert used == len(tokenizer.encode_prompt(prompt)) - 1 + own


def test_what_is_too_long_is_cut_where_the_server_was_told_so(make_scorer, english):
    long = {"prompt": english[0] * 4, "responses": [english[1][:60], english[2][:90]]}
    with live(make_scorer(too_long="truncate", batch_rows=1)) as server:
        result = server.good("/gram/v1/score", long)["results"][0]
        ranked = server.good("/gram/v1/rank", long)
        scorer = server.service.engine.scorer
        wanted = expected(scorer, [(long["prompt"], long["responses"])])[0]
    assert result["truncated"] and ranked["truncated"]
    np.testing.assert_allclose(result["rewards"], wanted, rtol=1e-5)


def test_settings_of_a_scorer_have_no_say_in_a_served_number(make_scorer, likelihood, rows):
    """Rows of other lengths give the same numbers."""
    items = {"items": [{"prompt": p, "responses": r} for p, r in rows[:12]]}
    wanted = likelihood.good("/gram/v1/score", items)["results"]
    with live(make_scorer(row_length=512, batch_rows=1)) as server:
        found = server.good("/gram/v1/score", items)["results"]
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a["rewards"], b["rewards"], rtol=1e-5)
