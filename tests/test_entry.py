"""What goes wrong on a command line is said in one line, with what to do; no traceback."""

import subprocess
import sys

import jax
import pytest

from gram_jax import entry
from gram_jax.errors import UserError
from gram_jax.loop import StageResult


@pytest.fixture(scope="module", autouse=True)
def config_flag():
    from absl import flags

    if "config" not in flags.FLAGS:
        entry.define_config()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workdir=x"], "--config is missing; name a file"),
        (["--config.train.length=3"], "--config is missing; name a file"),
        (["--config=no/such.py:data"], "there is no file 'no/such.py'"),
        (["--config", "no/such.py"], "there is no file 'no/such.py'"),
        (["--config"], "there is no file ''"),
    ],
)
def test_a_config_that_is_not_there_is_named(arguments, message):
    with pytest.raises(UserError, match="config") as caught:
        entry._check_config_file(arguments)
    assert message in str(caught.value)


@pytest.mark.parametrize("form", ["--config={}", "-config={}", "--config={}:data"])
def test_a_config_that_is_there_passes(form, tmp_path):
    (tmp_path / "a.py").touch()
    entry._check_config_file([form.format(tmp_path / "a.py"), "--config.train.length=3"])


def test_an_unknown_flag_is_named_with_the_nearest_one():
    with pytest.raises(UserError, match=r"'confg'\. Did you mean: config .*--help lists the flags"):
        entry._parse_flags(["program", "--confg=a.py"])


def test_a_command_of_one_process_refuses_to_be_one_of_several(monkeypatch):
    monkeypatch.setattr(entry.distributed, "start", lambda argv: None)
    monkeypatch.setattr(entry.distributed, "process_count", lambda: 2)
    with pytest.raises(UserError, match=r"one process; start it without launch/local\.sh"):
        entry._run(pytest.fail, one_process=True)


@pytest.fixture
def no_cache_yet():
    names = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_compiled_functions_are_kept_by_default(no_cache_yet, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    entry.enable_compilation_cache()
    folder = jax.config.jax_compilation_cache_dir
    assert folder.startswith(str(tmp_path / "gram_jax"))
    assert jax.config.jax_persistent_cache_min_compile_time_secs < 0.5


def test_compiled_functions_are_kept_where_the_user_says(no_cache_yet, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 7.0)
    entry.enable_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path)
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 7.0


HEAVY = "grain", "matplotlib", "orbax", "pyarrow", "scipy", "tensorflow_datasets", "torch"


def test_score_starts_without_what_it_does_not_need():
    listing = "import sys, gram_jax.score; print(*{n.partition('.')[0] for n in sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", listing], capture_output=True, text=True, check=True
    )
    assert not set(HEAVY) & set(done.stdout.split())


def test_help_needs_no_config():
    entry._check_config_file(["--helpfull"])


def test_a_run_resumed_after_its_last_step_says_that_it_is_complete(capsys):
    entry.print_result(StageResult(20, {}, {}, 1.0), "runs/x")
    assert capsys.readouterr().out == "complete already: 20 steps; checkpoint runs/x\n"
