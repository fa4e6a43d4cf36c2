"""Servers that several tests of clients ask; helper modules lie beside this file."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def reward_folder(tmp_path_factory):
    """The Hugging Face folder of the model that is served."""
    import reward_models

    return reward_models.make(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="session")
def likelihood_url(reward_folder):
    """A server that takes little in one request."""
    import servers

    with servers.serving(reward_folder, "--items=4", "--candidates=2", "--row_length=2048") as url:
        yield url


@pytest.fixture(scope="session")
def judge_url(reward_folder):
    """A judge that wants a key, and has no room for many requests at once."""
    import servers

    flags = ("--reward=judge", "--waiting=4", "--row_length=2048")
    with servers.serving(reward_folder, *flags, GRAM_JAX_API_KEY=servers.KEY) as url:
        yield url
