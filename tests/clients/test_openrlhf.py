"""OpenRLHF's remote reward protocol: its own client, many at once, against batch scoring."""

import json
import urllib.request

import environments
import numpy as np
import pytest
import reward_models
from batch_rewards import expected
from servers import serving

pytestmark = pytest.mark.timeout(environments.TIMEOUT)

COPIES = 4


@pytest.fixture(scope="module")
def rollouts(reward_folder, likelihood_url, tmp_path_factory):
    environments.program("huggingface")
    folder = tmp_path_factory.mktemp("openrlhf")
    reward_models.make(folder / "policy", seed=1)
    prompts = [text[: 20 + 5 * i] for i, text in enumerate(reward_models.TEXTS[:12])] * COPIES
    given = {"prompts": prompts, "labels": ["a label"] * len(prompts)}
    (folder / "rollouts.json").write_text(json.dumps(given))
    report = environments.report("huggingface", "openrlhf_rollouts.py", folder, likelihood_url)
    return prompts, report


def test_rewards_of_concurrent_rollouts_are_those_of_batch_scoring(reward_folder, rollouts):
    prompts, report = rollouts
    assert len(report) == len(prompts) == 12 * COPIES
    completions = []
    for prompt, one in zip(prompts, report, strict=True):
        assert one["query"].startswith(prompt)
        completions.append(one["query"].removeprefix(prompt))
    wanted = expected(reward_folder, {"prompts": prompts, "completions": completions})
    found = np.array([one["reward"] for one in report])
    np.testing.assert_allclose(found[:, 0], wanted, rtol=1e-5)
    assert len(set(wanted)) > 12
    assert all(one["scores"] == one["reward"] for one in report)
    assert all(one["logs"]["without_prompt"] == [0] for one in report)


def test_an_empty_query_is_answered_with_nothing(likelihood_url):
    """What clients before 0.11 send to all but one of several servers."""
    body = json.dumps({"query": [], "prompts": [], "labels": []}).encode()
    request = urllib.request.Request(
        f"{likelihood_url}/get_reward", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        said = json.load(answer)
    assert answer.status == 200
    assert said["rewards"] == said["scores"] == []
    assert all(values == [] for values in said["extra_logs"].values())


def test_a_judge_compares_with_the_label(reward_folder, tmp_path):
    environments.program("huggingface")
    reward_models.make(tmp_path / "policy", seed=1)
    prompts, labels = reward_models.PROMPTS, reward_models.REFERENCES
    (tmp_path / "rollouts.json").write_text(json.dumps({"prompts": prompts, "labels": labels}))
    with serving(reward_folder, "--reward=judge") as url:
        report = environments.report("huggingface", "openrlhf_rollouts.py", tmp_path, url)
    completions = [
        one["query"].removeprefix(prompt) for prompt, one in zip(prompts, report, strict=True)
    ]
    call = {"prompts": prompts, "completions": completions, "reference": labels}
    wanted = expected(reward_folder, call, reading="judge")
    np.testing.assert_allclose([one["reward"][0] for one in report], wanted, atol=1e-6)
