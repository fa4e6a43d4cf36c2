"""What test_full_disk.py runs in a process of its own: saves with room, without, and with room.

  python tests/saves_without_room.py FOLDER disk|limit stop|continue

``disk``: FOLDER is on a small disk, which is filled up; ``limit``: files may not grow.
"""

import resource
import shutil
import sys
from pathlib import Path

import test_checkpoints as t

from gram_jax.config import CheckpointConfig
from gram_jax.saving import CheckpointStore, SaveFailed

HARD = resource.getrlimit(resource.RLIMIT_FSIZE)[1]


def take_room(folder, kind, leave):
    """Leaves so many bytes at most."""
    if kind == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, HARD))
        return
    with (folder / "filler").open("wb", buffering=0) as file:
        while (free := shutil.disk_usage(folder).free) > leave:
            file.write(bytes(max(min(free - leave, 2**16), 1)))


def give_room(folder, kind):
    if kind == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (HARD, HARD))
    else:
        (folder / "filler").unlink()


def entries(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def saves(folder, kind, on_error, leave):
    """Prints what happens, in six lines."""
    state = t.new_state()
    with CheckpointStore(folder, CheckpointConfig(keep_last=1, on_error=on_error)) as store:
        store.save(1, state, t.info(1), t.TOKENIZER)
        store.wait()
        take_room(folder, kind, leave)
        for step in (2, 3):
            try:
                store.save(step, state, t.info(step), t.TOKENIZER)
                store.wait()
                print("went on")
            except SaveFailed as error:
                print("stopped:", error)
            print([name for name in entries(folder) if name.isdigit()])
        try:
            store.finish()
            print("finished")
        except SaveFailed as error:
            print("not finished:", error)
        give_room(folder, kind)
        assert t.same(t.load_state(folder / "checkpoints" / "1", t.abstract(state)), state)
        store.save(4, state, t.info(4), t.TOKENIZER)
        store.finish()
    print(entries(folder))
    shutil.rmtree(folder / "checkpoints")


def main(folder, kind, on_error):
    for leave in (0, 20_000, 60_000, 120_000) if kind == "disk" else (0,):
        saves(Path(folder), kind, on_error, leave)
    print("done")


if __name__ == "__main__":
    main(*sys.argv[1:])
