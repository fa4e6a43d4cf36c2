"""What a run that goes on may change: each setting says so, and each change is refused or shown."""

import dataclasses

import pytest
import tiny

from gram_jax.config import FIXED, FREE, Config, MeshConfig
from gram_jax.errors import UserError
from gram_jax.loop import _resumed

MODEL = tiny.config()


def sections(config=None, where="config"):
    config = config or Config()
    yield where, config
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from sections(value, f"{where}.{field.name}")


def test_each_setting_says_what_it_is_and_whether_a_resumed_run_may_change_it():
    seen = 0
    for where, section in sections():
        for field in dataclasses.fields(section):
            assert len(field.metadata["doc"]) > 4, f"{where}.{field.name}"
            assert field.metadata["resume"] in (FIXED, FREE), f"{where}.{field.name}"
            seen += 1
    assert seen > 80


def test_each_change_is_refused_or_shown_as_its_policy_says():
    """Every setting outside the model, one by one."""
    for where, section in sections():
        if where.startswith("config.model"):
            continue
        for field in dataclasses.fields(section):
            old = getattr(section, field.name)
            if dataclasses.is_dataclass(old):
                continue
            new = {
                bool: lambda v: not v,
                int: lambda v: v + 1,
                float: lambda v: v + 1.0,
                str: lambda v: v + "x",
                tuple: lambda v: (*v, "x"),
            }[type(old)](old)
            before, after = Config(), Config()
            holder = after
            for name in where.split(".")[1:]:
                holder = getattr(holder, name)
            setattr(holder, field.name, new)
            line = f"{where}.{field.name}: {old!r} -> {new!r}"
            if field.metadata["resume"] == FREE:
                assert _resumed(after, before) == (after, [line])
            else:
                with pytest.raises(UserError) as error:
                    _resumed(after, before)
                assert line in str(error.value)


def test_the_mesh_may_change_and_the_model_is_that_of_the_checkpoint():
    old = Config(model=MODEL)
    new = Config(mesh=MeshConfig(fsdp=2))
    config, lines = _resumed(new, old)
    assert config.model == MODEL
    assert lines == ["config.mesh.fsdp: 1 -> 2"]
