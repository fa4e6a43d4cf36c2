"""Every file in configs/ is a config that runs: it loads, is valid, and is of the size it says."""

import importlib.util
from pathlib import Path

import pytest

from gram_jax.config import Config, validate
from gram_jax.models.families import model_config

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.py"))
PARAMETERS = {"tiny_pretrain": 5_310_720, "llama_1b_pretrain": 1_235_814_400}
QWEN3_1P7B = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": True,
}


def load(path, *arguments):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*arguments), module


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_is_valid_with_and_without_an_argument(path):
    for arguments in ((), ("FOLDER",)):
        config, _ = load(path, *arguments)
        assert isinstance(config, Config)
        validate(config)
        assert (config.objective.name == "next_token") == path.stem.endswith("pretrain")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_argument_says_where_the_run_starts_or_where_its_data_is(path):
    config, _ = load(path, "FOLDER")
    paths = (config.init_from, config.tokenizer, *config.data.train, *config.data.validation)
    assert any(name.startswith("FOLDER") for name in paths)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_model_has_the_size_that_is_said(path):
    config, module = load(path)
    if config.init_from:  # the shape is that of the folder
        assert path.stem not in PARAMETERS
    else:
        assert config.model.num_parameters() == PARAMETERS[path.stem]
    if path.stem == "llama_1b_pretrain":
        assert f"{PARAMETERS[path.stem]:,} parameters" in module.__doc__


def test_qwen3_has_the_size_that_its_config_says():
    (path,) = (path for path in CONFIGS if path.stem.startswith("qwen3"))
    parameters = model_config(QWEN3_1P7B, "config.json").num_parameters()
    assert f"({parameters:,} parameters)" in load(path)[1].__doc__


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_header_gives_command_hardware_time_and_result(path):
    text = load(path)[1].__doc__
    for part in (f"--config=configs/{path.name}:", "--workdir=", "Hardware:", "Time", "esult:"):
        assert part in text
