"""A disk without room costs a run no checkpoint that it had, and no line of its metrics."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from gram_jax.data.tokenizer import Tokenizer
from gram_jax.reporting import read_metrics

# Each starts processes of its own, which take minutes where others use the machine.
pytestmark = pytest.mark.timeout(1000)
ROOT = Path(__file__).parents[1]
ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),
    "JAX_PLATFORMS": "cpu",
    "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
}

RECIPE = """
from gram_jax.config import *

def get_config(data):
    return Config(
        tokenizer=f"{data}/tokenizer",
        model=ModelConfig(vocab_size=264, hidden_size=64, num_layers=2, num_heads=2,
            num_kv_heads=2, head_dim=16, intermediate_size=128, max_position=64),
        data=DataConfig(train=(f"{data}/text.jsonl",), row_length=64, workers=1,
            prepared=f"{data}/prepared"),
        train=TrainConfig(length=40.0, batch_rows=4),
        checkpoint=CheckpointConfig(every=10))
"""


def on_small_disk(folder, size, command):
    """A command that has a disk of this size in ``folder``, a real one, for itself."""
    folder.mkdir()
    mount = f'mount -t tmpfs -o size={size} tmpfs "$0" && exec "$@"'
    return ["unshare", "-rm", "sh", "-c", mount, str(folder), *map(str, command)]


def run(command):
    # Where a process may not mount a disk of its own, say so by GRAM_JAX_NO_MOUNTS=1.
    if command[0] == "unshare" and os.environ.get("GRAM_JAX_NO_MOUNTS"):
        pytest.skip("GRAM_JAX_NO_MOUNTS is set: no full disk was tried")
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=900, env=os.environ | ENVIRONMENT
    )


@pytest.mark.parametrize("on_error", ["stop", "continue"])
@pytest.mark.parametrize("kind", ["disk", "limit"])
def test_a_full_disk_costs_no_checkpoint_and_the_next_save_works(kind, on_error, tmp_path):
    disk = tmp_path / "disk"
    command = [sys.executable, "tests/saves_without_room.py", str(disk), kind, on_error]
    if kind == "disk":
        command = on_small_disk(disk, "2m", command)
    done = run(command)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert lines.pop() == "done"
    reason = os.strerror(errno.ENOSPC if kind == "disk" else errno.EFBIG)
    runs = len(lines) // 6
    assert runs == (4 if kind == "disk" else 1)
    for said in (lines[6 * i : 6 * i + 6] for i in range(runs)):
        for step, line in ((2, said[0]), (3, said[2])):
            text = done.stderr if on_error == "continue" else line
            assert line.startswith("went on" if on_error == "continue" else "stopped: ")
            assert f"step {step}: the checkpoint could not be saved: " in text
            assert reason in text
            assert "the newest is step 1" in text
        assert said[1] == said[3] == "['1']", "the old one is kept"
        assert said[4].startswith("not finished: step 3: ")
        assert said[5] == "['4']", "nothing torn is left"
    assert done.stderr.count("warning:") == (2 * runs if on_error == "continue" else 0)
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    texts = [f"Number {i} is followed by number {i + 1}." for i in range(60)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    Tokenizer.train(texts, 264).save(folder / "tokenizer")
    (folder / "recipe.py").write_text(RECIPE)
    return folder


# $1: a folder on a small disk; $2: where to leave what is to be looked at; then the command.
FILL_UP = """
disk=$1; out=$2; shift 2
mkdir "$disk/run"
head -c $(($(df --output=avail -B1 "$disk" | tail -1) - 12288)) /dev/zero > "$disk/filler"
"$@" --workdir="$disk/run" 2> "$out/first.err"; echo $?
cat "$disk/run/metrics.jsonl" > "$out/first.jsonl"
rm "$disk/filler"
"$@" --workdir="$disk/run" 2> "$out/second.err"; echo $?
cp -r "$disk/run" "$out/run"
"""


@pytest.mark.parametrize("on_error", ["stop", "continue"])
def test_a_run_on_a_full_disk_says_so_and_the_same_command_succeeds_with_room(
    data, tmp_path, on_error
):
    """Three pages are left: too few for a checkpoint, and for the metrics of all steps."""
    command = [sys.executable, "-m", "gram_jax.pretrain", f"--config={data}/recipe.py:{data}"]
    command += [f"--config.checkpoint.on_error={on_error}"]
    disk = tmp_path / "disk"
    script = ["sh", "-c", FILL_UP, "sh", disk, tmp_path, *command]
    done = run(on_small_disk(disk, "8m", script))
    assert done.stdout.split("\n")[0] == "2", done.stderr + (tmp_path / "first.err").read_text()
    first, second = ((tmp_path / f"{name}.err").read_text() for name in ("first", "second"))
    error = first.splitlines()[-1]
    assert error.startswith("error: ")
    assert os.strerror(errno.ENOSPC) in error
    assert "Traceback" not in first + second
    lines = (tmp_path / "first.jsonl").read_text()
    assert lines.endswith("\n"), "a torn line"
    steps = [json.loads(line)["step"] for line in lines.splitlines()]
    assert steps == list(range(1, len(steps) + 1))
    if on_error == "continue":
        assert "step 40: the checkpoint could not be saved" in error
        assert first.count("metrics cannot be written") == 1
        assert [f"warning: step {step}: " in first for step in (10, 20, 30, 40)] == [True] * 3 + [
            False
        ]
    else:
        assert "warning:" not in first
    # What a failed save gives back makes room for lines that waited.
    # The save of step 10 fails in the background: the run ends as soon as that is known, and at
    # step 20 at the latest.
    assert 5 < len(steps) <= (20 if on_error == "stop" else 40)
    assert done.stdout.split("\n")[1].startswith("done: 40 steps")
    assert done.stdout.split("\n")[2] == "0", second
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == list(range(1, 41))
    checkpoints = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert sorted(checkpoints) == ["30", "40"]


def test_a_run_whose_files_may_not_grow_says_so_and_succeeds_later(data, tmp_path):
    """The same without a disk of its own: what a file may hold is limited."""
    command = [sys.executable, "-m", "gram_jax.pretrain", f"--config={data}/recipe.py:{data}"]
    command += ["--config.checkpoint.on_error=continue", f"--workdir={tmp_path}/run"]
    done = run(["bash", "-c", 'ulimit -S -f 50; exec "$@"', "bash", *command])
    assert done.returncode == 2, done.stderr
    error = done.stderr.splitlines()[-1]
    assert error.startswith("error: step 40: the checkpoint could not be saved: ")
    assert os.strerror(errno.EFBIG) in error
    assert run(command).returncode == 0
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == list(range(1, 41))
