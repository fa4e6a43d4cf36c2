"""What an exported folder says of its reward is how the reward is read."""

import pytest
import tiny

from gram_jax.checkpoints import LoadedModel
from gram_jax.config import Config, ObjectiveConfig
from gram_jax.data.tokenizer import Tokenizer
from gram_jax.model_card import gram_config, model_card
from gram_jax.scorer import RewardSettings


@pytest.fixture(scope="module")
def loaded():
    """A model that was trained with an objective."""
    tokenizer = Tokenizer.train(["A or B, which is better?"], 280)
    model = tiny.decoder()

    def trained(**objective):
        config = Config(objective=ObjectiveConfig(**objective))
        return LoadedModel(model, tokenizer, "tiny", None, config)

    return trained


def test_the_beta_of_a_judge_is_1(loaded):
    """Scoring ignores it, also where an older version has trained with another one."""
    judge = loaded(name="judge", beta=2.0)
    settings = RewardSettings(reading="judge", beta=2.0)
    assert gram_config(judge, settings)["beta"] == 1.0
    assert "beta" not in model_card(judge, settings)
    likelihood = loaded(name="smoothed_pairwise", beta=2.0)
    settings = RewardSettings(reading="likelihood", beta=2.0)
    assert gram_config(likelihood, settings)["beta"] == 2.0
    assert "beta 2, 100 steps" in model_card(likelihood, settings)


@pytest.mark.parametrize("add_eos", [True, False])
@pytest.mark.parametrize("average", ["sum", "mean"])
def test_the_card_of_a_likelihood_says_how_it_is_read(loaded, average, add_eos):
    settings = RewardSettings(average=average, add_eos=add_eos)
    text = " ".join(model_card(loaded(name="smoothed_pairwise"), settings).split())
    mean = average == "mean"
    assert ("is the mean log-prob of the response's tokens" in text) == mean
    assert ("is the log-prob of the response's tokens" in text) != mean
    assert ("and take the mean of the response's log-probs" in text) == mean
    assert ("and add up the response's log-probs" in text) != mean
    assert ("given the prompt, end-of-sequence token included" in text) == add_eos
    assert ("given the prompt, without an end-of-sequence token" in text) != add_eos
    assert ("apart, append the end-of-sequence token, and" in text) == add_eos
