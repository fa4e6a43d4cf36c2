"""What goes wrong on a command line is said in one line, with what to do; no traceback."""

import pytest

from gram_jax import entry
from gram_jax.config import DataConfig
from gram_jax.data.examples import ExampleCounts, read_examples
from gram_jax.data.tokenizer import Tokenizer
from gram_jax.errors import DataError, UserError
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


def test_help_needs_no_config():
    entry._check_config_file(["--helpfull"])


def test_a_run_resumed_after_its_last_step_says_that_it_is_complete(capsys):
    entry.print_result(StageResult(20, {}, {}, 1.0), "runs/x")
    assert capsys.readouterr().out == "complete already: 20 steps; checkpoint runs/x\n"


def test_a_chat_row_without_a_chat_template_is_named(tmp_path):
    path = tmp_path / "chat.jsonl"
    path.write_text(
        '{"prompt": [{"role": "user", "content": "a"}], "chosen": "b", "rejected": "c"}'
    )
    tokenizer = Tokenizer.train(["abc"], 300)
    with pytest.raises(DataError, match=r"chat\.jsonl:1: .*no chat template"):
        list(read_examples([path], DataConfig(format="preferences"), tokenizer, ExampleCounts()))
