"""Checkpoints: what is loaded is what was saved, or it is refused by name; never anything else."""

import asyncio
import contextlib
import dataclasses
import errno
import gc
import itertools
import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from orbax.checkpoint._src.asyncio_utils import run_sync
from orbax.checkpoint.experimental.v1._src.synchronization.compatibility import async_futures

from gram_jax.checkpoints import (
    RunInfo,
    find_step_folder,
    first_whole,
    load_model,
    load_state,
    quiet_orbax,
    read_run_info,
    state_parts,
)
from gram_jax.checksums import SMALL, Damaged, named_leaves
from gram_jax.config import (
    CheckpointConfig,
    Config,
    ObjectiveConfig,
    OptimizerConfig,
    TrainConfig,
)
from gram_jax.data.tokenizer import Tokenizer
from gram_jax.errors import UserError
from gram_jax.reward_model import stored_settings
from gram_jax.saving import CheckpointStore, NotFinite
from gram_jax.training import init_state, make_optimizer, merge_model, split_model

ROOT = Path(__file__).parents[1]
MODEL = tiny.config()
LAST_BLOCKS = 1
CONFIG = Config(
    model=MODEL,
    train=TrainConfig(last_blocks=LAST_BLOCKS),
    objective=ObjectiveConfig(name="smoothed_pairwise", average="mean"),
)
TOKENIZER = Tokenizer.train(["hello world, hello"], 280)


def new_state(mesh=None, seed=0, dtype=None):
    """A state as in training: moments that are not zero, a frozen block and a trained one."""
    model = tiny.decoder(MODEL, mesh=mesh, seed=seed)
    if dtype:
        model = jax.tree.map(lambda x: x.astype(dtype), model)
    _, trainable, frozen = split_model(model, TrainConfig(last_blocks=LAST_BLOCKS))
    with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
        state = init_state(make_optimizer(OptimizerConfig(), 10), trainable, frozen)
    opt_state = jax.tree.map(lambda x: x + jnp.asarray(seed + 3, x.dtype), state.opt_state)
    return dataclasses.replace(state, opt_state=opt_state)


def abstract(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def info(step=1, loss=1.0, validated=False):
    return RunInfo(CONFIG, step, {"loss": loss}, None, {}, validated, {"train": ["a"]})


def save(workdir, steps, state=None, config=None, **changes):
    """A run's checkpoints of these steps; each step's weights are of its own seed."""
    with CheckpointStore(workdir, config or CheckpointConfig(keep_last=99)) as store:
        for step in steps:
            store.save(step, state or new_state(seed=step), info(step, **changes), TOKENIZER)
        store.finish()
    return workdir / "checkpoints"


def steps_in(workdir):
    return sorted(p.name for p in (workdir / "checkpoints").iterdir())


def same(a, b):
    """Whether two trees are equal bit for bit, in their dtypes too."""
    return all(
        x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


# Round trips.


MESHES = {"one device": None, "8 x data": (8, 1, 1), "2 x 2 x 2": (2, 2, 2), "fsdp": (1, 8, 1)}


def mesh_of(name):
    return tiny.mesh(*MESHES[name]) if MESHES[name] else None


@pytest.mark.skipif(jax.device_count() != 8, reason="needs eight devices")
@pytest.mark.parametrize(("saved_on", "loaded_on"), itertools.permutations(MESHES, 2))
def test_a_state_saved_on_one_mesh_is_the_same_on_another(saved_on, loaded_on, tmp_path):
    state = new_state(mesh_of(saved_on))
    folder = save(tmp_path, [1], state) / "1"
    target = abstract(new_state(mesh_of(loaded_on), seed=5))
    loaded = load_state(folder, target)
    assert same(loaded, state)
    for x, wanted in zip(jax.tree.leaves(loaded), jax.tree.leaves(target), strict=True):
        assert x.sharding == wanted.sharding


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
def test_weights_are_loaded_in_the_dtype_asked_for(stored, dtype, tmp_path):
    """Read as stored and verified first, then cast; frozen and trained parts alike."""
    state = new_state(dtype=stored)
    save(tmp_path, [1], state)
    for path in (tmp_path, tmp_path / "checkpoints" / "1"):
        model = load_model(path, tiny.COMPUTE, dtype=dtype).model
        graph, *_ = split_model(tiny.decoder(MODEL), TrainConfig(last_blocks=LAST_BLOCKS))
        whole = merge_model(graph, state.trainable, state.frozen).joined_stacks()
        expected = jax.tree.map(lambda x: x.astype(dtype or stored), whole)
        assert same(model, expected)
    target = abstract(new_state(dtype=dtype))
    assert same(load_state(tmp_path / "checkpoints" / "1", target).trainable, jax.tree.map(
        lambda x: x.astype(dtype or "float32"), state.trainable
    ))  # fmt: skip


def test_a_checkpoint_says_what_it_is(tmp_path):
    folder = save(tmp_path, [3], loss=0.5, validated=True) / "3"
    assert find_step_folder(tmp_path) == find_step_folder(folder) == folder
    assert read_run_info(folder) == info(3, 0.5, True)
    assert stored_settings(tmp_path).average == "mean"
    described = json.loads((folder / "checksums.json").read_text())
    leaves = described["leaves"]
    assert leaves["optimizer/step"]["dtype"] == "int32"
    assert leaves["weights/frozen/embedding"]["shape"] == [64, 32]
    assert "weights/trainable/stacks/1/q" in leaves
    assert "optimizer/opt_state/1/0/mu/norm" in leaves
    assert {"files/run.json", "files/tokenizer.json"} <= described["files"].keys()


# Damage.


def damages(data):
    """(what was done, what is left of a file or None)."""
    yield "deleted", None
    for name, length in (("emptied", 0), ("half", len(data) // 2), ("cut", len(data) - 1)):
        if 0 <= length < len(data):
            yield name, data[:length]
    for place in sorted({0, len(data) // 3, len(data) // 2, len(data) - 1}) if data else ():
        flipped = bytearray(data)
        flipped[place] ^= 1 << place % 8
        yield f"bit {place % 8} of byte {place} flipped", bytes(flipped)


def test_each_damage_to_each_file_is_refused_by_name_or_changes_nothing(tmp_path, capfd):
    """Bits flipped, files cut and deleted, one after the other, in all files of a checkpoint."""
    state = new_state()
    folder = save(tmp_path, [1], state) / "1"
    target, model = abstract(state), load_model(folder, tiny.COMPUTE).model
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.parts[len(folder.parts)] for path in files} >= {"weights", "optimizer", "files"}
    assert any(path.stat().st_size > SMALL for path in files), "checksums of arrays are not tested"
    leaves = named_leaves(state_parts(state))
    outcomes = {"refused": 0, "harmless": 0}
    by_array = 0
    for path in files:
        data = path.read_bytes()
        name = path.relative_to(folder).as_posix()
        for what, left in damages(data):
            path.unlink() if left is None else path.write_bytes(left)
            for load, original in (
                (lambda: load_state(folder, target), state),
                (lambda: load_model(folder, tiny.COMPUTE).model, model),
            ):
                try:
                    loaded = load()
                except Damaged as error:
                    outcomes["refused"] += 1
                    assert error.folder == folder
                    message = str(error)
                    assert str(folder) in message
                    # A leaf is named as a path, or by readers as stacks.1.q.
                    named = name in message or any(
                        leaf in message or leaf.partition("/")[2].replace("/", ".") in message
                        for leaf in leaves
                    )
                    by_array += name not in message
                    assert named, message
                    assert len(message) < 700
                    assert "\n" not in message
                else:
                    outcomes["harmless"] += 1
                    assert same(loaded, original), f"{name}, {what}: loaded, and silently different"
            path.write_bytes(data)
    assert outcomes["refused"] > 8 * outcomes["harmless"]
    assert by_array > 4
    assert capfd.readouterr().err.count("\n") < 3


def flip_weights(folder):
    """Flips a bit in the middle of the weights, which readers do not notice."""
    (path,) = [p for p in folder.glob("weights/ocdbt*/d/*") if p.stat().st_size > SMALL]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(tmp_path, capfd):
    folder = save(tmp_path, [2, 4, 6, 8])
    flip_weights(folder / "8")
    (folder / "6" / "files" / "run.json").unlink()
    with CheckpointStore(tmp_path, CheckpointConfig(keep_last=99)) as store:
        step, found, tokenizer = store.newest()
        assert (step, found.position) == (8, 8)  # its small files are whole
        assert tokenizer.fingerprint() == TOKENIZER.fingerprint()
        step, state = store.restore(abstract(new_state()))
        assert step == 4
        assert same(state, new_state(seed=4))
        assert steps_in(tmp_path) == ["2", "4", "6.damaged", "8.damaged"]
        warnings = capfd.readouterr().err.splitlines()
        assert len(warnings) == 2
        for line, what in zip(warnings, ("8: ", "6: ", ), strict=True):  # fmt: skip
            assert line.startswith(f"warning: {folder}/{what}the checkpoint is damaged: ")
            assert line.endswith(f"{folder}/4 is used instead")
        assert "the numbers in weights/" in warnings[0]
        assert "files/run.json is missing" in warnings[1]
        # The run comes to these steps again.
        store.save(6, new_state(seed=6), info(6), TOKENIZER)
        store.finish()
    assert steps_in(tmp_path) == ["2", "4", "6", "6.damaged", "8.damaged"]
    flip_weights(folder / "6")
    with CheckpointStore(tmp_path, CheckpointConfig(keep_last=99)) as store:
        assert store.restore(abstract(new_state()))[0] == 4
    assert steps_in(tmp_path) == ["2", "4", "6.damaged", "6.damaged.2", "8.damaged"]


def test_what_is_read_for_scoring_is_the_checkpoint_before_and_nothing_is_moved(tmp_path, capfd):
    folder = save(tmp_path, [2, 4])
    flip_weights(folder / "4")
    loaded = load_model(tmp_path, tiny.COMPUTE)
    assert same(loaded.model, load_model(folder / "2", tiny.COMPUTE).model)
    assert capfd.readouterr().err.endswith(f"{folder}/2 is used instead\n")
    with pytest.raises(Damaged, match="the numbers in weights/"):
        load_model(folder / "4", tiny.COMPUTE)
    assert steps_in(tmp_path) == ["2", "4"]


def test_a_step_folder_without_its_small_files_is_damaged_and_not_ignored(tmp_path):
    folder = save(tmp_path, [2])
    shutil.rmtree(folder / "2" / "files")
    for path in (tmp_path, folder / "2"):
        with pytest.raises(Damaged, match=r"files/.* is missing"):
            load_model(path, tiny.COMPUTE)


def test_where_all_checkpoints_are_damaged_they_are_all_named_and_stay(tmp_path):
    folder = save(tmp_path, [2, 4])
    flip_weights(folder / "2")
    flip_weights(folder / "4")
    for _ in range(2):
        with CheckpointStore(tmp_path, CheckpointConfig()) as store:
            with pytest.raises(UserError, match="no checkpoint is left") as error:
                store.restore(abstract(new_state()))
            assert f"{folder}/2: " in str(error.value)
            assert f"{folder}/4: " in str(error.value)
    assert steps_in(tmp_path) == ["2", "4"]
    for step in "24":
        (folder / step).rename(folder / f"{step}.damaged")
    only = pytest.raises(UserError, match=r"only damaged checkpoints \(2.damaged, 4.damaged\)")
    with CheckpointStore(tmp_path, CheckpointConfig()) as store, only:
        store.newest()


def test_a_checkpoint_of_another_model_is_not_called_damaged(tmp_path):
    folder = save(tmp_path, [2, 4])
    state = abstract(new_state())
    other = dataclasses.replace(
        state, step=jax.ShapeDtypeStruct((2,), np.int32, sharding=state.step.sharding)
    )
    refused = pytest.raises(UserError, match=r"other arrays .* optimizer/step \(\) for \(2,\)")
    with CheckpointStore(tmp_path, CheckpointConfig()) as store, refused:
        store.restore(other)
    assert steps_in(tmp_path) == ["2", "4"]
    shallow = dataclasses.replace(state, frozen={})
    with pytest.raises(UserError, match=r"weights/frozen/embedding \(64, 32\) for None"):
        load_state(folder / "4", shallow)


@contextlib.contextmanager
def without_rights():
    """As a user who is not root, whom no permission stops."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:coroutine")
@pytest.mark.parametrize("name", ["files/run.json", "weights/ocdbt.process_0/d/*"])
def test_a_file_that_may_not_be_read_is_not_called_damaged(name, tmp_path):
    folder = save(tmp_path, [2, 4])
    path = max((folder / "4").glob(name), key=lambda p: p.stat().st_size)
    for parent in (tmp_path, *tmp_path.parents):
        if parent.stat().st_mode & 0o001 == 0 and parent.owner() == Path(tmp_path).owner():
            parent.chmod(parent.stat().st_mode | 0o011)
    state = abstract(new_state())
    path.chmod(0)
    with without_rights():
        with pytest.raises(UserError, match="cannot be read") as error:
            first_whole([folder / "4", folder / "2"], lambda f: load_state(f, state))
        assert not isinstance(error.value, Damaged)
        assert os.strerror(errno.EACCES) in str(error.value)
    path.chmod(0o644)
    del error
    gc.collect()  # what Orbax left unread is reported here
    assert steps_in(tmp_path) == ["2", "4"]


@pytest.mark.parametrize("kind", [MemoryError, KeyboardInterrupt, jax.errors.JaxRuntimeError])
def test_what_is_no_damage_is_not_answered_with_an_older_checkpoint(kind, tmp_path):
    def load(folder):
        raise kind("RESOURCE_EXHAUSTED: out of memory")

    with pytest.raises(kind):
        first_whole([tmp_path / "4", tmp_path / "2"], load)


# Saving.


def test_no_save_is_dropped_however_close_they_come(tmp_path):
    states = [new_state(seed=seed) for seed in range(6)]
    with CheckpointStore(tmp_path, CheckpointConfig(keep_last=99)) as store:
        for step, state in enumerate(states, start=1):
            store.save(step, state, info(step), TOKENIZER)
        store.finish()
    assert steps_in(tmp_path) == ["1", "2", "3", "4", "5", "6"]
    for step, state in enumerate(states, start=1):
        loaded = load_state(tmp_path / "checkpoints" / str(step), abstract(state))
        assert same(loaded, state)


def test_a_save_is_of_the_state_as_it_was_then(tmp_path):
    """The next step gives the state's memory away while the save is still being written."""
    add_one = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    state = new_state()
    with CheckpointStore(tmp_path, CheckpointConfig(keep_last=99)) as store:
        for step in range(1, 5):
            store.save(step, state, info(step), TOKENIZER)
            for _ in range(20):
                state = add_one(state)
    for step in range(1, 5):
        loaded = load_state(tmp_path / "checkpoints" / str(step), abstract(state))
        assert int(loaded.step) == 20 * (step - 1)


def test_what_is_kept(tmp_path):
    config = CheckpointConfig(keep_last=2, keep_every=4, keep_best=True)
    losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: 2.5, 5: 1.0, 6: 9.0, 7: 0.5, 8: 7.0, 9: 8.0, 10: 8.0}
    state = new_state()
    kept = {}
    with CheckpointStore(tmp_path, config) as store:
        for step, loss in losses.items():
            # A training loss, however low, is not compared with validation losses.
            store.save(step, state, info(step, loss, validated=step != 7), TOKENIZER)
            store.wait()
            kept[step] = [int(name) for name in sorted(steps_in(tmp_path), key=int)]
    assert kept[3] == [2, 3]
    assert kept[5] == [4, 5], "of equal ones the latest"
    assert kept[10] == [4, 5, 8, 9, 10]


def test_leftovers_of_a_killed_run_are_cleaned_away(tmp_path):
    folder = save(tmp_path, [1])
    for name in ("2.writing", "2.writing.orbax-checkpoint-tmp", "0.deleting"):
        shutil.copytree(folder / "1", folder / name)
    (folder / "notes.txt").write_text("mine")
    with CheckpointStore(tmp_path, CheckpointConfig()) as store:
        assert store.latest() == 1
    assert steps_in(tmp_path) == ["1", "notes.txt"]


def test_a_state_that_is_not_finite_is_never_saved(tmp_path):
    state = new_state()
    bad = dataclasses.replace(
        state, trainable=jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(jnp.inf), state.trainable)
    )
    with CheckpointStore(tmp_path, CheckpointConfig()) as store:
        store.save(1, state, info(1), TOKENIZER)
        with pytest.raises(NotFinite, match=r"step 2: weights/trainable/norm, .* and 7 more are"):
            store.save(2, bad, info(2), TOKENIZER)
    assert steps_in(tmp_path) == ["1"]


def test_two_parts_of_a_save_that_fail_at_once_are_one_error(caplog):
    """asyncio reports an error that nobody asked for when it is collected: about one in twenty."""

    class Failing:
        def result(self, timeout=None):
            raise OSError("no space")

    async def save():
        await async_futures([Failing(), Failing()])

    quiet_orbax()
    for _ in range(400):
        with pytest.raises(OSError, match="no space"):
            run_sync(save())
    gc.collect()
    assert not caplog.records
    loop = asyncio.new_event_loop()
    loop.create_future().set_exception(OSError("of somebody else"))
    gc.collect()
    loop.close()
    assert "was never retrieved" in caplog.text
