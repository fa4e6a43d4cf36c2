"""Tunix's GRPO with our reward in one JAX process: each reward is the one that `score` gives."""

import json

import environments
import numpy as np
import pytest
import reward_models
from batch_rewards import expected

pytestmark = pytest.mark.timeout(environments.TIMEOUT)

ROWS = [{"prompt": text[:60]} for text in reward_models.PROMPTS]
WITH_REFERENCES = [
    {"prompt": text[:60], "reference": reference}
    for text, reference in zip(reward_models.PROMPTS, reward_models.REFERENCES, strict=True)
]
CASES = {
    "likelihood": ("likelihood", ROWS),
    "judge of groups": ("judge", ROWS),
    "judge with references": ("judge", WITH_REFERENCES),
}


@pytest.fixture(scope="module")
def trained(reward_folder, tmp_path_factory):
    environments.program("tunix")
    folder = tmp_path_factory.mktemp("tunix")
    reward_models.make(folder / "policy", seed=1)
    (folder / "reward").symlink_to(reward_folder)
    cases = [
        {"name": name, "settings": {"reading": reading}, "rows": rows}
        for name, (reading, rows) in CASES.items()
    ]
    (folder / "cases.json").write_text(json.dumps(cases))
    return environments.report("tunix", "grpo_tunix.py", folder)


def test_there_is_no_pytorch_in_the_process(trained):
    assert trained["torch"] is False


@pytest.mark.parametrize("name", CASES)
def test_rewards_in_grpo_are_those_of_batch_scoring(reward_folder, trained, name):
    case, reading = trained["found"][name], CASES[name][0]
    assert case["name"] == f"gram_jax_{reading}"
    assert len(case["calls"]) >= 3
    for call in case["calls"]:
        assert len(call["rewards"]) == 8
        wanted = expected(reward_folder, call, reading=reading)
        assert [r is None for r in call["rewards"]] == [w is None for w in wanted]
        np.testing.assert_allclose(
            np.array(call["rewards"], float), np.array(wanted, float), rtol=1e-5, atol=1e-5
        )
        assert np.ptp(np.array(wanted, float)) > 1e-3
    assert case["moved"] > 1e-5
