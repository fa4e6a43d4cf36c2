"""The reward as a function: the numbers of `score` and `rank`, whatever a batch is made of."""

import math
import random

import numpy as np
import pytest
import reward_models
from batch_rewards import expected

from gram_jax.clients import reward_function
from gram_jax.errors import UserError

PROMPTS, RESPONSES = reward_models.PROMPTS, reward_models.RESPONSES


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return reward_models.make(tmp_path_factory.mktemp("reward"))


@pytest.fixture(scope="module")
def likelihood(folder):
    return reward_function(folder)


@pytest.fixture(scope="module")
def judge(folder):
    return reward_function(folder, reading="judge")


def batch(*, chat=False, seed=0):
    """Completions to several prompts, not in their order."""
    of = [(p, r) for p, responses in zip(PROMPTS, RESPONSES, strict=True) for r in responses]
    random.Random(seed).shuffle(of)
    prompts, completions = (list(side) for side in zip(*of, strict=True))
    if chat:
        prompts = [reward_models.messages(text) for text in prompts]
        completions = [reward_models.answer(text) for text in completions]
    return {"prompts": prompts, "completions": completions}


def references(call):
    of = dict(zip(PROMPTS, reward_models.REFERENCES, strict=True))
    return [of[prompt] for prompt in call["prompts"]]


@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
def test_a_likelihood_gives_what_score_writes(folder, likelihood, chat):
    call = batch(chat=chat)
    found = likelihood(**call, completion_ids=[[1]] * 18, another_column=list(range(18)))
    np.testing.assert_allclose(found, expected(folder, call), rtol=1e-5)
    assert len(set(found)) == 18


def test_settings_differ_where_they_are_given(folder):
    call = batch()
    found = reward_function(folder, average="mean", add_eos=False)(**call)
    np.testing.assert_allclose(
        found, expected(folder, call, average="mean", add_eos=False), rtol=1e-5
    )


def test_a_head_gives_what_score_writes(tmp_path):
    folder = reward_models.make(tmp_path / "head", kind="SequenceClassification")
    reward, call = reward_function(folder), batch()
    assert reward.kind == "head"
    np.testing.assert_allclose(reward(**call), expected(folder, call, reading="head"), rtol=1e-5)


def test_a_judge_rates_the_completions_to_a_prompt_as_rank_does(folder, judge):
    call = batch()
    found = judge(**call)
    np.testing.assert_allclose(found, expected(folder, call, reading="judge"), atol=2e-6)
    for prompt in PROMPTS:
        group = [r for r, p in zip(found, call["prompts"], strict=True) if p == prompt]
        assert math.isclose(sum(group), 0, abs_tol=1e-5)
        assert np.ptp(group) > 1e-3


def test_a_judge_compares_with_the_reference_of_the_row_as_score_does(folder, judge):
    call = batch()
    call["reference"] = references(call)
    found = judge(**call)
    np.testing.assert_allclose(found, expected(folder, call, reading="judge"), atol=1e-6)
    assert np.ptp(found) > 1e-3
    assert all(0 < p < 1 for p in found)


def test_a_reference_is_nothing_to_a_likelihood(likelihood):
    call = batch()
    assert likelihood(**call, reference=references(call)) == likelihood(**call)


def test_the_order_of_completions_changes_no_reward(judge):
    one, other = batch(seed=1), batch(seed=2)
    keys = [
        dict(zip(zip(c["prompts"], c["completions"], strict=True), judge(**c), strict=True))
        for c in (one, other)
    ]
    assert keys[0].keys() == keys[1].keys()
    for key, value in keys[0].items():
        assert keys[1][key] == pytest.approx(value, abs=2e-6)


@pytest.mark.parametrize("reading", ["likelihood", "judge"])
def test_a_blank_completion_gets_the_lowest_reward_of_its_group(folder, reading):
    reward = reward_function(folder, reading=reading)
    prompts = [PROMPTS[0]] * 4 + [PROMPTS[1]] * 2
    completions = [*RESPONSES[0][:2], "", RESPONSES[0][2], "\n ", ""]
    found = reward(prompts=prompts, completions=completions)
    said = [found[i] for i in (0, 1, 3)]
    assert found[2] == min(said)
    assert found[4:] == [None, None]
    alone = reward(prompts=prompts[:3], completions=RESPONSES[0])
    np.testing.assert_allclose(said, alone, rtol=1e-5, atol=2e-6)
    chat = [reward_models.messages(PROMPTS[0])] * 2
    blank = [reward_models.answer(""), reward_models.answer(None)]
    assert reward(prompts=chat, completions=blank) == [None, None]


def test_a_judge_without_a_second_completion_says_what_to_do(judge):
    with pytest.raises(UserError, match=r"completions\[2\]: is the only one .*`reference`"):
        judge(prompts=[PROMPTS[0], PROMPTS[0], PROMPTS[1]], completions=["a", "b", "c"])
    with pytest.raises(UserError, match=r"reference\[1\]: is empty"):
        judge(prompts=PROMPTS[:2], completions=["a", "b"], reference=["c", None])
    with pytest.raises(UserError, match="1 references for 2 prompts"):
        judge(prompts=PROMPTS[:2], completions=["a", "b"], reference=["c"])


def test_what_is_wrong_with_a_completion_is_said_of_its_place(folder):
    reward = reward_function(folder, max_length=64)
    call = {"prompts": ["a", "b", "b"], "completions": ["x", "y", "z" * 500]}
    with pytest.raises(UserError, match=r"completions\[2\]: .*more than max_length=64"):
        reward(**call)
    cut = reward_function(folder, max_length=64, too_long="truncate")(**call)
    assert all(math.isfinite(r) for r in cut)
    said = reward_models.answer("c")
    with pytest.raises(UserError, match=r"completions\[1\]: must be one assistant message"):
        reward(prompts=[reward_models.messages("a")] * 2, completions=[said, [*said, *said]])
    with pytest.raises(UserError, match=r"prompts\[0\]: is neither text nor messages"):
        reward(prompts=[{1, 2}], completions=["x"])
    for wrong, called in ((None, "null"), (3, "a number"), (["x"], "a list")):
        with pytest.raises(UserError, match=rf"completions\[1\]: must be text .*not {called}"):
            reward(prompts=["a", "a"], completions=["x", wrong])
    with pytest.raises(UserError, match="1 prompts and 2 completions"):
        reward(prompts=["a"], completions=["x", "y"])


def test_a_reward_that_cannot_be_had_is_refused_at_once(folder, tmp_path):
    with pytest.raises(UserError, match=r"averag: no such setting; there are .*average"):
        reward_function(folder, averag="mean")
    with pytest.raises(UserError, match="nothing"):
        reward_function(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"too_long, dtype: http://.* settings of its own"):
        reward_function("http://localhost:9", too_long="truncate", dtype="float32")


def test_an_unreachable_server_is_named():
    with pytest.raises(UserError, match=r"localhost:1/gram/v1/model: no answer .*refused"):
        reward_function("http://localhost:1")
    for wrong in ("http://", "http://localhost:99999", "http://localhost:x", "http://[::1"):
        with pytest.raises(UserError, match="is no address of a server; write one as"):
            reward_function(wrong)
