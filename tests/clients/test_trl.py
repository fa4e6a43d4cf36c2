"""A few real steps of GRPO by TRL with our reward, which is the one that `score` gives."""

import json

import environments
import numpy as np
import pytest
import reward_models
from batch_rewards import expected

CASES = {
    "likelihood": {"rows": [{"prompt": text} for text in reward_models.PROMPTS]},
    "judge of groups": {
        "settings": {"reading": "judge"},
        "rows": [{"prompt": text} for text in reward_models.PROMPTS[:3]],
    },
    "judge with references": {
        "settings": {"reading": "judge"},
        "rows": [
            {"prompt": reward_models.messages(text), "reference": reward_models.answer(reference)}
            for text, reference in zip(reward_models.PROMPTS, reward_models.REFERENCES, strict=True)
        ],
    },
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    environments.program("huggingface")
    folder = tmp_path_factory.mktemp("trl")
    reward_models.make(folder / "policy", seed=1)
    source = str(reward_models.make(folder / "reward"))
    cases = [{"name": k, "source": source, "settings": {}} | case for k, case in CASES.items()]
    (folder / "cases.json").write_text(json.dumps(cases))
    return folder, environments.report("huggingface", "grpo_trl.py", folder)


@pytest.mark.parametrize("name", CASES)
def test_rewards_in_grpo_are_those_of_batch_scoring(trained, name):
    folder, report = trained
    case = report["found"][name]
    settings = CASES[name].get("settings", {})
    assert len(case["calls"]) >= 3
    for call in case["calls"]:
        wanted = expected(folder / "reward", call, **settings)
        assert [r is None for r in call["rewards"]] == [w is None for w in wanted]
        np.testing.assert_allclose(
            np.array(call["rewards"], float), np.array(wanted, float), rtol=1e-5, atol=1e-5
        )
        assert np.ptp(np.array(wanted, float)) > 1e-3


@pytest.mark.parametrize("name", CASES)
def test_the_policy_learns_from_them(trained, name):
    case = trained[1]["found"][name]
    assert len(case["steps"]) == 3
    for step, call in zip(case["steps"], case["calls"], strict=True):
        mean = np.nanmean(np.array(call["rewards"], float))
        assert step["reward"] == pytest.approx(mean, rel=1e-4, abs=1e-4)
        assert step[f"rewards/{case['name']}/mean"] == pytest.approx(mean, rel=1e-4, abs=1e-4)
    assert case["moved"] > 1e-4
