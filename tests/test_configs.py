"""Every file in configs/ is a config that runs: it loads, is valid, and is of the size it says."""

import importlib.util
from pathlib import Path

import jax
import pytest

from gram_jax.config import Config, ModelConfig
from gram_jax.config_rules import validate
from gram_jax.mesh import AXES, check_divides
from gram_jax.models.families import model_config

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.py"))
PARAMETERS = {
    "tiny_pretrain": 3_344_064,
    "llama_1b_pretrain": 1_235_814_400,
    "llama3_8b_pretrain": 8_030_261_248,
    "llama3_70b_pretrain": 70_553_706_496,
}
# Of configs that start from published weights and say their shape: it is that of the folder.
PLANNED = {"llama3_8b_finetune": 8_030_261_248, "qwen3_14b_judge_finetune": 14_768_307_200}

# Of the published models: D, L, H, K, E, F, V, whether embeddings are tied.
RELEASED = {
    "Llama-3.1-8B-Instruct": (4096, 32, 32, 8, 128, 14336, 128256, False),
    "Llama-3.2-3B-Instruct": (3072, 28, 24, 8, 128, 8192, 128256, True),
    "Qwen3-1.7B": (2048, 28, 16, 8, 128, 6144, 151936, True),
    "Qwen3-4B": (2560, 36, 32, 8, 128, 9728, 151936, True),
    "Qwen3-8B": (4096, 36, 32, 8, 128, 12288, 151936, False),
    "Qwen3-14B": (5120, 40, 40, 8, 128, 17408, 151936, False),
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
        assert (config.objective.name == "next_token") == (not path.stem.endswith("finetune"))
        # Labelled data has many columns, which are recognised unless a format is named.
        assert config.data.format == "auto" or config.objective.name == "next_token"


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
        said = PLANNED.get(path.stem, ModelConfig().num_parameters())
    else:
        said = PARAMETERS[path.stem]
    assert config.model.num_parameters() == said
    if path.stem.startswith(("llama", "qwen3_14b")):
        assert f"{said:,} parameters" in module.__doc__


@pytest.mark.parametrize("name", RELEASED)
def test_the_released_models_have_the_sizes_that_the_recipe_says(name):
    d, layers, heads, kv, e, f, v, tied = RELEASED[name]
    values = {
        "model_type": "qwen3" if name.startswith("Qwen3") else "llama",
        "vocab_size": v,
        "hidden_size": d,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "head_dim": e,
        "intermediate_size": f,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": tied,
    }
    model = model_config(values, "config.json")
    (path,) = (path for path in CONFIGS if path.stem == "gram_pretrain")
    rows = [
        line.split() for line in load(path)[1].__doc__.split("\n") if line.startswith("  " + name)
    ]
    ((_, parameters, gigabytes, _),) = rows
    assert parameters == f"{model.num_parameters():,}"
    assert gigabytes == str(round(16 * model.num_parameters() / 1e9))
    # Rows of a part, heads and features can be split as the recipe says.
    for devices in (1, 2, 4, 8, 16):
        mesh = jax.sharding.AbstractMesh((1, devices, 1, 1), AXES)
        check_divides(mesh, model, 16)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_header_gives_command_hardware_time_and_result(path):
    text = load(path)[1].__doc__
    for part in (f"--config=configs/{path.name}:", "--workdir=", "Hardware:", "Time", "esult:"):
        assert part in text
