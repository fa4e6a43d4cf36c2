"""The reward function over HTTP: the same numbers, however a server wants to be asked."""

import json

import environments
import numpy as np
import pytest
import reward_models
from batch_rewards import expected
from servers import KEY
from test_reward_function import batch, references

from gram_jax.clients import reward_function
from gram_jax.clients.server import Server
from gram_jax.errors import UserError
from gram_jax.scorer import Question

pytestmark = pytest.mark.timeout(environments.TIMEOUT)


@pytest.fixture(scope="module")
def likelihood(likelihood_url):
    return reward_function(likelihood_url)


@pytest.fixture(scope="module")
def judge(judge_url):
    return reward_function(judge_url + "/", api_key=KEY)


@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
def test_a_server_gives_what_score_writes(reward_folder, likelihood, chat):
    """With fewer items and candidates a request than the batch has."""
    call = batch(chat=chat)
    assert likelihood.__name__ == "gram_jax_likelihood"
    np.testing.assert_allclose(likelihood(**call), expected(reward_folder, call), rtol=1e-5)


def test_a_judge_that_is_served_rates_and_compares_as_the_commands_do(reward_folder, judge):
    """More comparisons at once than the server takes; those that it refuses are sent again."""
    call = batch()
    found = judge(**call)
    np.testing.assert_allclose(found, expected(reward_folder, call, reading="judge"), atol=2e-6)
    call["reference"] = references(call)
    found = judge(**call)
    np.testing.assert_allclose(found, expected(reward_folder, call, reading="judge"), atol=1e-6)


def test_blank_completions_are_not_sent(likelihood, judge):
    prompts = [reward_models.PROMPTS[0]] * 3 + [reward_models.PROMPTS[1]] * 2
    completions = [*reward_models.RESPONSES[0][:2], " ", "", "said"]
    found = likelihood(prompts=prompts, completions=completions)
    assert found[2] == min(found[:2])
    assert found[3] == found[4]
    rated = judge(prompts=prompts, completions=completions)
    assert rated[2] == min(rated[:2])
    assert rated[3:] == [0.0, 0.0]
    assert likelihood(prompts=prompts[:1], completions=[""]) == [None]


def test_what_the_server_refuses_is_said_of_its_place(likelihood, judge):
    said = reward_models.answer("c")
    chat = [reward_models.messages("a"), reward_models.messages("b"), reward_models.messages("b")]
    with pytest.raises(UserError, match=r"completions\[2\]: must be one assistant message"):
        likelihood(prompts=chat, completions=[said, said, [*said, *said]])
    with pytest.raises(UserError, match=r"completions\[1\]: .*max_length"):
        likelihood(prompts=["a", "b"], completions=["x", "y " * 5000])
    with pytest.raises(UserError, match=r"reference\[0\]: .*one assistant message"):
        judge(prompts=chat[:1], completions=[said], reference=[[*said, *said]])


def test_what_is_sent_at_once_is_never_more_than_the_server_takes(likelihood_url):
    server = Server(likelihood_url)
    server._most_items = 100
    questions = [Question("p" * n, ["r" * (n % 7)]) for n in range(40)]
    for most in range(150, 400):
        server._most_bytes = most
        bundles = list(server._bundles(questions))
        assert [part.question for parts in bundles for part in parts] == list(range(40))
        for parts in bundles:
            assert len(json.dumps(server._scores(parts).body)) <= most


def test_a_server_that_does_not_know_the_key_is_an_error_at_once(judge_url):
    with pytest.raises(UserError, match="401"):
        reward_function(judge_url)
    with pytest.raises(UserError, match="401"):
        reward_function(judge_url, api_key="another key")
