"""A few real steps of GRPO by TRL with our reward, which is the one that `score` gives."""

import json

import environments
import numpy as np
import pytest
import reward_models
from batch_rewards import expected
from servers import KEY

pytestmark = pytest.mark.timeout(environments.TIMEOUT)

ROWS = [{"prompt": text} for text in reward_models.PROMPTS]
CHATS = [
    {"prompt": reward_models.messages(text), "reference": reward_models.answer(reference)}
    for text, reference in zip(reward_models.PROMPTS, reward_models.REFERENCES, strict=True)
]
CASES = {
    "likelihood": ("here", "likelihood", ROWS),
    "judge of groups": ("here", "judge", ROWS[:3]),
    "judge with references": ("here", "judge", CHATS),
    "likelihood of a server": ("server", "likelihood", CHATS),
    "judge of a server, of groups": ("server", "judge", ROWS[:3]),
}
"""Name: (where the reward is computed, what it is, the rows to train on)."""


@pytest.fixture(scope="module")
def trained(reward_folder, likelihood_url, judge_url, tmp_path_factory):
    environments.program("huggingface")
    folder = tmp_path_factory.mktemp("trl")
    reward_models.make(folder / "policy", seed=1)
    sources = {
        ("here", "likelihood"): (str(reward_folder), {}),
        ("here", "judge"): (str(reward_folder), {"reading": "judge"}),
        ("server", "likelihood"): (likelihood_url, {}),
        ("server", "judge"): (judge_url, {"api_key": KEY}),
    }
    cases = []
    for name, (where, reading, rows) in CASES.items():
        source, settings = sources[where, reading]
        cases.append({"name": name, "source": source, "settings": settings, "rows": rows})
    (folder / "cases.json").write_text(json.dumps(cases))
    return environments.report("huggingface", "grpo_trl.py", folder)


@pytest.mark.parametrize("name", CASES)
def test_rewards_in_grpo_are_those_of_batch_scoring(reward_folder, trained, name):
    case, reading = trained["found"][name], CASES[name][1]
    assert case["name"] == f"gram_jax_{reading}"
    assert len(case["calls"]) >= 3
    for call in case["calls"]:
        wanted = expected(reward_folder, call, reading=reading)
        assert [r is None for r in call["rewards"]] == [w is None for w in wanted]
        np.testing.assert_allclose(
            np.array(call["rewards"], float), np.array(wanted, float), rtol=1e-5, atol=1e-5
        )
        assert np.ptp(np.array(wanted, float)) > 1e-3


@pytest.mark.parametrize("name", CASES)
def test_the_policy_learns_from_them(trained, name):
    case = trained["found"][name]
    assert len(case["steps"]) == 3
    for step, call in zip(case["steps"], case["calls"], strict=True):
        mean = np.nanmean(np.array(call["rewards"], float))
        assert step["reward"] == pytest.approx(mean, rel=1e-4, abs=1e-4)
        assert step[f"rewards/{case['name']}/mean"] == pytest.approx(mean, rel=1e-4, abs=1e-4)
    assert case["moved"] > 1e-4
