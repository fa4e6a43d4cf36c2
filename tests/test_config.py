"""Settings: what is wrong is named, what a resumed run may change is known, all have a sentence."""

import dataclasses
import json
import re

import pytest

from gram_jax.config import (
    FIXED,
    FREE,
    CheckpointConfig,
    ComputeConfig,
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    RopeScaling,
    TrainConfig,
)
from gram_jax.config_rules import _RULES, check_overrides, differences, from_dict, to_dict, validate
from gram_jax.errors import UserError

CLASSES = (
    RopeScaling, ModelConfig, ComputeConfig, MeshConfig, DataConfig, ObjectiveConfig,
    OptimizerConfig, TrainConfig, CheckpointConfig, Config,
)  # fmt: skip
PREFERENCES = {
    "data": DataConfig(format="preferences"),
    "objective": ObjectiveConfig(name="smoothed_pairwise"),
}


def every_field():
    return [pytest.param(c, f, id=f"{c.__name__}.{f.name}") for c in CLASSES for f in fields(c)]


def fields(cls):
    return dataclasses.fields(cls)


@pytest.mark.parametrize(("cls", "field"), every_field())
def test_every_setting_has_a_sentence_and_a_resume_policy(cls, field):
    assert field.metadata["doc"].endswith((".", ")"))
    assert len(field.metadata["doc"]) > 4
    assert field.metadata["resume"] in (FIXED, FREE)
    default = getattr(cls(), field.name)
    assert not field.metadata["choices"] or default in field.metadata["choices"]


def test_the_defaults_are_valid():
    validate(Config())
    validate(Config(**PREFERENCES))


def test_a_config_survives_json():
    config = Config(
        seed=3,
        model=ModelConfig(windows=(4,) * 8, rope_scaling=RopeScaling(kind="yarn", factor=4.0)),
        data=DataConfig(train=("a.jsonl", "b.jsonl"), validation=("c.jsonl",)),
        optimizer=OptimizerConfig(learning_rate=1e-3),
    )
    again = from_dict(Config, json.loads(json.dumps(to_dict(config))))
    assert again == config
    assert again.model.windows == (4,) * 8
    assert hash(again.model) == hash(config.model)
    assert from_dict(Config, {}) == Config()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sed": 1}, "config.sed is not a setting; did you mean config.seed?"),
        (
            {"optimizer": {"learning_rat": 1.0}},
            "config.optimizer.learning_rat is not a setting; did you mean"
            " config.optimizer.learning_rate?",
        ),
        ({"mesh": {"zzz": 1}}, "config.mesh.zzz is not a setting; it has context, data, fsdp"),
        ({"model": 5}, "config.model holds 5; it must be an object"),
        ({"seed": "0"}, "config.seed='0' must be of type int"),
        ({"model": {"windows": [1, "2"]}}, "config.model.windows='2' must be of type int"),
    ],
)
def test_values_that_are_no_config_are_named_with_the_nearest_setting(values, message):
    with pytest.raises(UserError, match=re.escape(message)):
        from_dict(Config, values)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.optimizer.learning_rat=1", "did you mean config.optimizer.learning_rate?"),
        ("-config.sead=1", "did you mean config.seed?"),
        ("--noconfig.model.tie_embedding", "did you mean config.model.tie_embeddings?"),
        ("--config.data.train[0]=a.jsonl", "did you mean config.data.train?"),
        ("--config.model.rope_scaling.facto=2", "did you mean config.model.rope_scaling.factor?"),
    ],
)
def test_a_command_line_setting_that_does_not_exist_is_named(argument, message):
    with pytest.raises(UserError, match=re.escape(message)):
        check_overrides(["--workdir=x", argument])


def test_command_line_settings_that_exist_pass():
    check_overrides(
        [
            "--config=configs/a.py:DATA",
            "--config.optimizer.learning_rate=1",
            "--config.model.rope_scaling.factor=2",
            "--config.data.train=('a.jsonl',)",
            "--noconfig.model.tie_embeddings",
            "--workdir=a.b.c",
        ]
    )


def with_(**changes):
    """The default config with ``section__field=value`` changed."""
    config = Config()
    for path, value in changes.items():
        *parents, name = path.split("__")
        holder = config
        for parent in parents:
            holder = getattr(holder, parent)
        setattr(holder, name, value)
    return config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": "0"}, "config.seed='0' must be of type int"),
        ({"seed": 1.0}, "config.seed=1.0 must be of type int"),
        ({"seed": True}, "config.seed=True must be of type int"),
        ({"optimizer__learning_rate": "1e-4"}, "config.optimizer.learning_rate='1e-4' must be of"),
        ({"optimizer__learning_rate": True}, "config.optimizer.learning_rate=True must be of"),
        ({"model__tie_embeddings": 1}, "config.model.tie_embeddings=1 must be of type bool"),
        ({"data__train": "a.jsonl"}, "config.data.train='a.jsonl' must be a tuple of str"),
        ({"data__train": (1,)}, "config.data.train=1 must be of type str"),
        ({"model__windows": [4] * 8}, "config.model.windows=[4, 4, 4, 4, 4, 4, 4, 4] must be a"),
        ({"model__family": "bert"}, "config.model.family='bert' must be one of 'llama', 'mistral'"),
        ({"compute__remat": "some"}, "config.compute.remat='some' must be one of 'none', 'full'"),
        ({"model__rope_scaling__kind": "ntk"}, "config.model.rope_scaling.kind='ntk' must be one"),
    ],
)
def test_a_value_of_the_wrong_kind_is_named(changes, message):
    with pytest.raises(UserError, match=re.escape(message)):
        validate(with_(**changes))


def test_whole_numbers_are_numbers():
    validate(with_(optimizer__learning_rate=1, train__length=5))


BREAKING = {
    (ModelConfig, 0): {"model__num_layers": 0},
    (ModelConfig, 1): {"model__num_kv_heads": 3},
    (ModelConfig, 2): {"model__head_dim": 63},
    (ModelConfig, 3): {"model__windows": (4,)},
    (DataConfig, 0): {"data__row_length": 1},
    (DataConfig, 1): {"data__row_targets": 1025},
    (DataConfig, 2): {"data__row_sequences": 1},
    (DataConfig, 3): {"data__weights": (1.0, 2.0)},
    (DataConfig, 4): {"data__workers": -1},
    (DataConfig, 5): {"data__max_prompt": 1024},
    (DataConfig, 6): {"data__holdout": 1.0},
    (DataConfig, 7): {"data__holdout": 0.1, "data__validation": ("a.jsonl",)},
    (DataConfig, 8): {"data__max_pairs": -1},
    (DataConfig, 9): {"data__exclude_ngrams": 13},
    (DataConfig, 10): {"data__near_duplicates": 1.5},
    (ObjectiveConfig, 0): {"objective__label_smoothing": 0.5},
    (ObjectiveConfig, 1): {"objective__beta": 0.0},
    (ObjectiveConfig, 2): {"objective__name": "judge", "objective__beta": 2.0},
    (ObjectiveConfig, 3): {"objective__centring": 0.1},
    (ObjectiveConfig, 4): {"objective__name": "judge", "objective__chosen_ce": 0.1},
    (OptimizerConfig, 0): {"optimizer__learning_rate": 0.0},
    (OptimizerConfig, 1): {"optimizer__warmup": 0.9},
    (TrainConfig, 0): {"train__length": 0.0},
    (TrainConfig, 1): {"train__accumulate": 3},
    (TrainConfig, 2): {"train__log_every": 0},
    (TrainConfig, 3): {"train__lora_alpha": 0.0},
    (TrainConfig, 4): {"train__lora_targets": ("q", "q_proj")},
    (TrainConfig, 5): {"train__lora_rank": 4, "train__last_blocks": 1},
    (CheckpointConfig, 0): {"checkpoint__every": 0},
    (CheckpointConfig, 1): {"checkpoint__keep_every": -1},
    (Config, 0): {"train__last_blocks": 9},
    (Config, 1): {"data__format": "preferences"},
    (Config, 2): {"train__head_only": True},
    (Config, 3): {"data__reference_field": "logprob"},
    (Config, 4): {"data__max_pairs": 100},
}


def test_there_is_a_breaking_case_for_every_rule():
    assert BREAKING.keys() == {(cls, i) for cls, rules in _RULES.items() for i in range(len(rules))}


@pytest.mark.parametrize(("rule", "changes"), BREAKING.items(), ids=str)
def test_each_rule_is_checked_and_says_what_it_wants(rule, changes):
    cls, number = rule
    with pytest.raises(UserError, match=re.escape(_RULES[cls][number][1])) as raised:
        validate(with_(**changes))
    section = next(iter(changes)).split("__")[0]
    assert str(raised.value).startswith("config:" if cls is Config else f"config.{section}:")


@pytest.mark.parametrize(
    "changes",
    [
        {"data__row_targets": -1},
        {"data__row_pairs": -1},
        {"data__train": ("a", "b"), "data__weights": (1.0, 0.0)},
        {"objective__label_smoothing": -0.1},
        {"objective__name": "judge_full_vocab", "objective__beta": 0.5},
        {"optimizer__warmup": -0.1},
        {"train__batch_rows": 0},
        {"train__accumulate": 0},
        {"train__last_blocks": -1},
        {"data__holdout": -0.1},
        {"train__lora_rank": -1},
        {"train__lora_targets": ()},
        {"train__lora_targets": ("q", "q")},
        {"train__lora_rank": 4, "train__head_only": True},
        {"train__last_blocks": 1, "train__head_only": True},
        {"objective__name": "smoothed_ce", "data__format": "responses"},
        {"objective__name": "judge", "data__format": "pairs"},
        {"data__format": "unpaired"},
    ],
    ids=str,
)
def test_rules_hold_at_their_other_ends(changes):
    with pytest.raises(UserError):
        validate(with_(**changes))


def test_the_depth_of_the_model_is_not_known_yet_where_another_run_gives_it():
    validate(with_(train__last_blocks=9, init_from="somewhere"))


def test_differences_name_path_values_and_policy():
    old, new = Config(), with_(seed=1, optimizer__learning_rate=1e-3, train__log_every=1)
    new.model.rope_scaling.factor = 2.0
    assert differences(old, new) == [
        ("config.seed", 0, 1, FIXED),
        ("config.model.rope_scaling.factor", 1.0, 2.0, FIXED),
        ("config.optimizer.learning_rate", 3e-4, 1e-3, FIXED),
        ("config.train.log_every", 10, 1, FREE),
    ]
    assert differences(old, Config()) == []


def test_how_a_run_is_computed_may_change_and_what_is_computed_may_not():
    def policies(cls):
        return {f.name: f.metadata["resume"] for f in fields(cls)}

    for cls in (ComputeConfig, MeshConfig, CheckpointConfig):
        assert set(policies(cls).values()) == {FREE}, cls
    for cls in (ModelConfig, ObjectiveConfig, OptimizerConfig):
        assert set(policies(cls).values()) == {FIXED}, cls
    # Sources may move: what a run must keep is the rows, which are compared by content.
    free = ["train", "validation", "exclude", "judge_template", "prepared", "workers"]
    assert [name for name, policy in policies(DataConfig).items() if policy == FREE] == free
