"""What a checkpoint must hold to be whole: its files, and a checksum of each array.

Storage returns flipped bits without a word, and compressed arrays decode to other numbers just as
silently. So each array's checksum is computed on its devices before it is saved and again after it
is read. It depends on the array alone, not on its sharding: a 64-bit sum over elements of a hash of
(bits of the element, its place), so that parts which changed places are noticed as well.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gram_jax.errors import UserError

FILE = "checksums.json"
DAMAGE_ERRNOS = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO, errno.EUCLEAN)
"""What the system says of a file that is missing, or lies on a part of a disk that is broken."""
SMALL = 2**16
"""Files of at most so many bytes are compared by content, larger ones by length."""

# Rounds and constants of MurmurHash3's finaliser; the third is 2^32 over the golden ratio.
_MIX_1, _MIX_2, _STRIDE = (np.uint32(n) for n in (0x85EBCA6B, 0xC2B2AE35, 0x9E3779B1))


class Damaged(UserError):
    """A checkpoint does not hold what was saved. The message names the folder and what is wrong.

    Attributes:
      folder: the step folder.
    """

    def __init__(self, folder: str | Path, what: str) -> None:
        self.folder = Path(folder)
        super().__init__(f"{folder}: the checkpoint is damaged: {what}")


@dataclasses.dataclass(frozen=True)
class Leaf:
    """What an array was when it was saved."""

    shape: tuple[int, ...]
    dtype: str
    checksum: str  # 16 hexadecimal digits


@jax.jit
def checksum(x: jax.Array) -> jax.Array:
    """[3] uint32: two sums modulo 2^32, and how many elements are not finite.

    Sums of integers, so the order in which devices add them does not matter. One pass over the
    array, without an intermediate of its size.
    """
    sharding = jax.typeof(x).sharding
    out = None if sharding.mesh.empty else sharding
    place = jnp.zeros(x.shape, jnp.uint32, out_sharding=out)
    for axis in range(x.ndim):
        # By axis and not by one linear index, which would wrap in arrays of over 2^32 elements.
        index = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis, out_sharding=out)
        place = _mix(place * _STRIDE + index + np.uint32(1))
    first = _mix(_bits(x) ^ place)
    second = _mix(first + _STRIDE)
    floating = jnp.issubdtype(x.dtype, jnp.floating)
    bad = ~jnp.isfinite(x) if floating else jnp.zeros_like(x, jnp.bool_)
    sums = jax.lax.reduce(
        (first, second, bad.astype(jnp.uint32)),
        (np.uint32(0),) * 3,
        lambda a, b: tuple(i + j for i, j in zip(a, b, strict=True)),
        tuple(range(x.ndim)),
    )
    return jnp.stack(sums)


def _mix(h: jax.Array) -> jax.Array:
    """A bijection of uint32 in which each bit of the input changes half of the output's."""
    h = (h ^ (h >> 16)) * _MIX_1
    h = (h ^ (h >> 13)) * _MIX_2
    return h ^ (h >> 16)


def _bits(x: jax.Array) -> jax.Array:
    """Each element's bits as uint32.

    Raises:
      TypeError: an element has more than 32 bits.
    """
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}.get(x.dtype.itemsize)
    if unsigned is None:
        raise TypeError(f"no checksum for arrays of {x.dtype}")
    return jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)


def leaf_name(path: tuple[Any, ...]) -> str:
    """The name of a leaf of a state, as in ``weights/trainable/stacks/0/q``."""
    return jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by name."""
    return {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def describe(tree: Any) -> tuple[dict[str, Leaf], list[str]]:
    """What each array is now, and the names of those with elements that are not finite.

    With several processes all of them must call this; all get the same answer.
    """
    leaves = named_leaves(tree)
    # One after the other: a CPU client of several devices, which has as many threads, deadlocks
    # where more than 32 computations that need all of its devices are under way.
    sums = {name: jax.device_get(checksum(leaf)) for name, leaf in leaves.items()}
    found = {
        name: Leaf(tuple(leaf.shape), str(leaf.dtype), f"{sums[name][0]:08x}{sums[name][1]:08x}")
        for name, leaf in leaves.items()
    }
    return found, [name for name in leaves if sums[name][2]]


def write_manifest(step_folder: Path, leaves: Mapping[str, Leaf]) -> None:
    """Writes checksums.json: these arrays, and all files that are in the folder now.

    Raises:
      OSError: it cannot be written, or a file cannot be read.
    """
    paths = sorted(path for path in step_folder.rglob("*") if path.is_file())
    content = {
        "leaves": {name: dataclasses.asdict(leaf) for name, leaf in leaves.items()},
        "files": {path.relative_to(step_folder).as_posix(): _describe_file(path) for path in paths},
    }
    text = json.dumps({**content, "sha256": _digest(content)}, indent=1)
    (step_folder / FILE).write_text(text, encoding="utf-8")


def verify_files(step_folder: Path) -> dict[str, Leaf]:
    """Checks the files of a step folder; what its arrays must be.

    Raises:
      Damaged: names a file that is missing, has another length or, if it is small, other content.
      UserError: a file cannot be read for another reason, such as its permissions.
    """
    values = _read_manifest(step_folder)
    for name, expected in values["files"].items():
        try:
            found = _describe_file(step_folder / name)
        except OSError as error:
            raise _unreadable(step_folder, name, error) from error
        if found != expected:
            raise Damaged(step_folder, f"{name} is not what was saved")
    return {
        name: Leaf(tuple(leaf["shape"]), leaf["dtype"], leaf["checksum"])
        for name, leaf in values["leaves"].items()
    }


def _describe_file(path: Path) -> dict[str, Any]:
    """Size and, of a small file, SHA-256; large ones hold arrays, which have their own checksums.

    To read all data back after each save would cost as much as to write it.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(path.read_bytes()).hexdigest() if size <= SMALL else None
    return {"bytes": size, "sha256": digest}


def changed(expected: Mapping[str, Leaf], found: Mapping[str, Leaf]) -> list[str]:
    """Names of the arrays found that are not what they must be."""
    return [name for name, leaf in found.items() if expected[name] != leaf]


def listed(names: Iterable[str], most: int = 3) -> str:
    """The first few of many names."""
    found = list(names)
    rest = f" and {len(found) - most} more" if len(found) > most else ""
    return ", ".join(found[:most]) + rest


def _read_manifest(step_folder: Path) -> dict[str, Any]:
    try:
        values = json.loads((step_folder / FILE).read_bytes())
        whole = values.pop("sha256") == _digest(values)
    except OSError as error:
        raise _unreadable(step_folder, FILE, error) from error
    except (ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise Damaged(step_folder, f"{FILE} is not what was saved")
    return dict(values)


def _unreadable(step_folder: Path, name: str, error: OSError) -> UserError:
    """The error to raise: that one may not read a file, or has too many open, is no damage."""
    if error.errno not in DAMAGE_ERRNOS:
        return UserError(f"{step_folder}: {name} cannot be read: {error}")
    missing = error.errno == errno.ENOENT
    return Damaged(step_folder, f"{name} {'is missing' if missing else f'is unreadable: {error}'}")


def _digest(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
