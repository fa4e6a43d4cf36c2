"""--help of every command: what it is for, how to run it, and each flag that it reads."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from gram_jax.help_text import WIDTH

ROOT = Path(__file__).parents[1]
COMMANDS = sorted(
    path.stem
    for path in (ROOT / "gram_jax").glob("*.py")
    if "\n    entry.run(main" in path.read_text("utf-8")
)


@pytest.fixture(scope="module")
def reference():
    """docs/commands.md by command; that it is what --help prints now is a test of its own."""
    page = (ROOT / "docs" / "commands.md").read_text("utf-8")
    parts = re.split(r"^## (\w+)$", page, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_the_pages_made_from_code_are_up_to_date():
    done = subprocess.run(
        [sys.executable, "-m", "tools.reference", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_every_command_is_in_the_reference(reference):
    assert list(reference) == COMMANDS
    assert len(COMMANDS) >= 10


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_says_how_to_run_it_and_what_each_flag_means(command, reference):
    text = reference[command]
    assert f"  python -m gram_jax.{command} " in text or f"  python -m gram_jax.{command}\n" in text
    rows = re.findall(r"^\| `(--\S+)` \| (.*?) \| (.+) \|$", text, flags=re.M)
    names = [name for name, _, _ in rows]
    assert len(set(names)) == len(names) > 0
    for name, _, meaning in rows:
        assert len(meaning) > 10 and meaning.endswith("."), name
    required = [takes == "required" for _, takes, _ in rows]
    assert required == sorted(required, reverse=True)  # what is needed comes first


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_in_the_examples_is_a_flag(command, reference):
    text = reference[command]
    listed = {name.replace("[no]", "") for name in re.findall(r"^\| `(--\S+)` ", text, flags=re.M)}
    examples = re.findall(rf"python -m gram_jax\.{command} .*(?:\\\n.*)*", text)
    used = {f"--{name}" for example in examples for name in re.findall(r"--(\w+)", example)}
    assert used <= listed | {"--config"}


@pytest.mark.parametrize("asked", ["--help", "-h"])
def test_help_is_printed_in_lines_that_fit_with_the_flags_that_commands_share(asked):
    done = subprocess.run(
        [sys.executable, "-m", "gram_jax.score", asked], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Scores responses with a reward model")
    assert max(map(len, done.stdout.splitlines())) <= WIDTH
    for line in (
        "  --checkpoint  (required)",
        "  --reward  (likelihood|judge|head)",
        "  --row_length  (integer; default: 0)",
        "  --[no]per_token  (default: no)",
        "  --num_processes  (integer)",
    ):
        assert line in done.stdout.splitlines()
