"""Hugging Face folders, in and out: config.json, safetensors, tokenizer, model card.

In: float32 weights stream from the files straight into their shards; each device's share is read
on its own, so a host never holds more than one weight's share and one tensor beside it. Out: one
tensor at a time, in the dtype that it came in, so that import and export give the same bytes. With
several processes each reads the shares of its own devices; process 0 gathers and writes.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from safetensors import SafetensorError, safe_open

from gram_jax.config import ComputeConfig, ModelConfig
from gram_jax.data.tokenizer import Tokenizer
from gram_jax.distributed import barrier, is_main, main_first
from gram_jax.errors import UserError
from gram_jax.mesh import check_divides
from gram_jax.models.decoder import (
    MODEL_DIMS,
    Decoder,
    abstract_decoder,
    block_weights,
    shardings,
    weight_name,
)
from gram_jax.models.families import (
    MODEL_TENSORS,
    config_values,
    model_config,
    tensor_name,
    tensor_part,
    tensor_shapes,
    to_tensor,
)

CONFIG, GENERATION = "config.json", "generation_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES: dict[str, tuple[str, Any]] = {
    "F32": ("float32", np.dtype(np.float32)),
    "BF16": ("bfloat16", np.dtype(ml_dtypes.bfloat16)),
    "F16": ("float16", np.dtype(np.float16)),
}
"""safetensors' names of the dtypes that float32 holds exactly: torch's names, numpy's dtypes."""


@dataclasses.dataclass(kw_only=True, slots=True)
class HfInfo:
    """What an export must give back beside the weights. Plain values, ready for JSON."""

    config: dict[str, Any]  # config.json as it was: unknown fields go round unchanged
    generation_config: dict[str, Any] | None = None
    dtype: str = "float32"  # of the weights, but for
    exceptions: dict[str, str] = dataclasses.field(default_factory=dict)  # tensor name -> dtype

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> HfInfo:
        """The inverse of :meth:`to_json`."""
        return cls(**values)


def is_hf_folder(path: str | Path) -> bool:
    """Whether this is meant as a Hugging Face folder; :func:`load` says whether it is whole."""
    return (Path(path) / CONFIG).is_file()


def is_classifier(path: str | Path) -> bool:
    """Whether config.json names a sequence classifier."""
    names = _read_object(Path(path) / CONFIG).get("architectures") or []
    return any(str(name).endswith("ForSequenceClassification") for name in names)


def read_config(folder: str | Path) -> tuple[ModelConfig, HfInfo]:
    """The model's shape, and what an export must give back. Reads headers, not weights.

    Raises:
      UserError: the folder does not hold a causal language model of a known family, or its files
        are damaged, or its tensors are not those of its config.
    """
    folder = Path(folder)
    values = _read_object(folder / CONFIG)
    config = model_config(values, str(folder / CONFIG))
    generation = _read_object(folder / GENERATION) if (folder / GENERATION).is_file() else None
    with ExitStack() as stack:
        tensors = _Tensors(folder, stack)
        tensors.check(config)
        dtypes = {name: tensors.dtype(name) for name in tensor_shapes(config)}
    sizes = Counter[str]()
    for name, shape in tensor_shapes(config).items():
        sizes[dtypes[name]] += math.prod(shape)
    most = sizes.most_common(1)[0][0]
    return config, HfInfo(
        config=values,
        generation_config=generation,
        dtype=most,
        exceptions={name: dtype for name, dtype in dtypes.items() if dtype != most},
    )


def load(
    folder: str | Path, compute: ComputeConfig, mesh: Mesh | None = None
) -> tuple[Decoder, HfInfo]:
    """The model of a folder, with float32 weights (cast up exactly), created in its shards.

    Args:
      folder: a Hugging Face folder.
      compute: how the model computes.
      mesh: where the weights go; None = the first device.

    Raises:
      UserError: as :func:`read_config`; or the mesh does not divide the model.
    """
    folder = Path(folder)
    config, info = read_config(folder)
    abstract = abstract_decoder(config, compute)
    if mesh is None:
        one = SingleDeviceSharding(jax.devices()[0])
        targets = jax.tree.map(lambda _: one, abstract)
    else:
        check_divides(mesh, config, mesh.shape["data"] * mesh.shape["fsdp"])
        targets = shardings(abstract, mesh)
    with ExitStack() as stack:
        tensors = _Tensors(folder, stack)

        def create(path: tuple[Any, ...], leaf: Any, sharding: Sharding) -> jax.Array:
            read = _reader(tensors, weight_name(path), config)
            return jax.make_array_from_callback(leaf.shape, sharding, read)

        model = jax.tree_util.tree_map_with_path(create, abstract, targets)
    return cast(Decoder, model), info


def export(
    model: Decoder,
    folder: str | Path,
    *,
    tokenizer: Tokenizer,
    info: HfInfo | None = None,
    card: str,
    gram_config: dict[str, Any],
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes a folder that transformers 4 and 5 load, whole or not at all.

    Args:
      model: its arrays may be sharded, over the devices of all processes.
      folder: must not exist, or be empty.
      tokenizer: its ids must be rows of the model's embedding.
      info: of the folder that the model came from; None = a model of our own, in float32.
      card: the text of README.md.
      gram_config: content of gram_config.json: what the reward is and how to compute it.
      max_shard_bytes: weights above this are written in several files.

    Raises:
      UserError: the folder is in use, the tokenizer does not fit, the family cannot express the
        model, or a weight is not finite in its dtype.
    """
    folder = Path(folder).absolute()
    main_first(lambda: _check_unused(folder))
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"the tokenizer has ids up to {tokenizer.vocab_size - 1}; the model's vocabulary ends"
            f" at {model.config.vocab_size - 1}: this is not the model's tokenizer"
        )
    info = info if info is not None else HfInfo(config={})
    values, generation = _export_configs(model.config, info, tokenizer)
    if not is_main():
        _write_weights(model, folder, info, max_shard_bytes)  # takes part; process 0 writes
        barrier("exported")
        return
    # Written beside and renamed at the end: a folder of this name is always a whole one.
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _write_object(partial / CONFIG, values)
        _write_object(partial / GENERATION, generation)
        _write_object(partial / "gram_config.json", gram_config)
        (partial / "README.md").write_text(card, encoding="utf-8")
        tokenizer.save(partial)
        _write_weights(model, partial, info, max_shard_bytes)
        partial.replace(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    barrier("exported")


def _check_unused(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists and is not an empty folder; export to a new one")


class _Tensors:
    """The tensors of a folder's safetensors files, by name; open until ``stack`` is closed."""

    def __init__(self, folder: Path, stack: ExitStack):
        self.folder = folder
        self.files: dict[str, Path] = {}
        self._open: dict[Path, Any] = {}
        index = folder / INDEX
        listed: dict[str, str] = {}
        if index.is_file() and not (folder / WEIGHTS).is_file():  # as transformers chooses
            listed = _read_object(index).get("weight_map") or {}
            paths = sorted({folder / file for file in listed.values()})
        else:
            paths = [folder / WEIGHTS]
        for path in paths:
            if not path.is_file():
                raise UserError(_missing_file(path, index if listed else None))
            try:
                self._open[path] = stack.enter_context(safe_open(path, framework="numpy"))
                self.files.update(dict.fromkeys(self._open[path].keys(), path))
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path}: not a readable safetensors file: {error}") from error
        for name, file in listed.items():
            if self.files.get(name) != folder / file:
                raise UserError(f"{folder / file}: no tensor {name}, which {INDEX} puts there")

    def dtype(self, name: str) -> str:
        return _DTYPES[self._slice(name).get_dtype()][0]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def read(self, name: str, slices: tuple[slice, ...]) -> np.ndarray:
        """A part of a tensor, in its own dtype."""
        try:
            return cast(np.ndarray, self._slice(name)[slices])
        except SafetensorError as error:
            raise UserError(f"{self.files[name]}: tensor {name} cannot be read: {error}") from error

    def check(self, config: ModelConfig) -> None:
        """Whether the tensors are those of the model, in name, shape and dtype; else UserError."""
        wanted = tensor_shapes(config)
        for name, shape in wanted.items():
            if name not in self.files:
                raise UserError(
                    f"{self.folder}: tensor {name} of shape {list(shape)} is in none of"
                    f" {', '.join(path.name for path in self._open)}"
                )
            if self.shape(name) != shape:
                raise UserError(
                    f"{self.files[name]}: tensor {name} has shape {list(self.shape(name))};"
                    f" {CONFIG} says {list(shape)}"
                )
            dtype = self._slice(name).get_dtype()
            if dtype not in _DTYPES:
                raise UserError(
                    f"{self.files[name]}: tensor {name} has dtype {dtype};"
                    f" known: {', '.join(_DTYPES)}"
                )
        unembedding = tensor_name("unembedding")
        extra = [n for n in self.files if n not in wanted and not n.endswith("rotary_emb.inv_freq")]
        if config.tie_embeddings and unembedding in extra and self._is_tied():
            extra.remove(unembedding)
        if extra:
            shown = ", ".join(f"{name} ({self.files[name].name})" for name in extra[:8])
            more = f" and {len(extra) - 8} more" if len(extra) > 8 else ""
            why = (
                f"; {CONFIG} ties the embeddings, but the two tensors differ"
                if unembedding in extra and config.tie_embeddings
                else ""
            )
            raise UserError(
                f"{self.folder}: tensors that a {config.family} of this {CONFIG} does not have:"
                f" {shown}{more}{why}"
            )

    def _is_tied(self) -> bool:
        """Whether the unembedding repeats the embedding; transformers would not tie them if not."""
        names = tensor_name("embedding"), tensor_name("unembedding")
        rows, step = self.shape(names[0])[0], 4096
        if self.shape(names[0]) != self.shape(names[1]):
            return False
        for start in range(0, rows, step):
            part = (slice(start, min(start + step, rows)), slice(None))
            if not np.array_equal(self.read(names[0], part), self.read(names[1], part)):
                return False
        return True

    def _slice(self, name: str) -> Any:
        return self._open[self.files[name]].get_slice(name)


def _missing_file(path: Path, index: Path | None) -> str:
    if index is not None:
        return f"{path}: this file, which {index.name} lists, is missing: the folder is incomplete"
    if any(path.parent.glob("pytorch_model*.bin")):
        return f"{path}: missing. The weights are in PyTorch's format: save them as safetensors"
    return f"{path}: missing, and there is no {INDEX} either"


def _reader(tensors: _Tensors, weight: str, config: ModelConfig) -> Callable[[Any], np.ndarray]:
    """Reads the part of one of our weights that a device holds, as float32."""
    cache: dict[Any, np.ndarray] = {}  # replicas ask for the same part again

    def read(index: tuple[slice, ...]) -> np.ndarray:
        key = tuple((s.start, s.stop) for s in index)
        if key not in cache:
            cache[key] = _read_part(tensors, weight, index, config)
        return cache[key]

    return read


def _read_part(
    tensors: _Tensors, weight: str, index: tuple[slice, ...], config: ModelConfig
) -> np.ndarray:
    if weight in MODEL_DIMS:
        slices, shape, order = tensor_part(weight, index, config)
        part = tensors.read(tensor_name(weight), slices).reshape(shape).transpose(order)
        return np.ascontiguousarray(part, dtype=np.float32)
    layers = range(*index[0].indices(config.num_layers))
    slices, shape, order = tensor_part(weight, index[1:], config)
    stacked = np.empty((len(layers), *(shape[i] for i in order)), np.float32)
    for place, layer in enumerate(layers):
        part = tensors.read(tensor_name(weight, layer), slices)
        stacked[place] = part.reshape(shape).transpose(order)  # casts up, which is exact
    return stacked


def _export_configs(
    config: ModelConfig, info: HfInfo, tokenizer: Tokenizer
) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json and generation_config.json: what was there, completed by what was not."""
    dtype = info.config.get("dtype") or info.config.get("torch_dtype") or info.dtype
    own = {**config_values(config), "dtype": dtype, "torch_dtype": dtype}
    values = {**own, **info.config}
    same = bool(info.config) and model_config(info.config, CONFIG) == config
    for name, value in own.items():
        # Both spellings of the rope must say the same, so the one that was not read gives way.
        if not same or values[name] is None or name == "rope_theta":
            values[name] = value
    values.pop("auto_map", None)  # names Python files that are not part of this folder
    special = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
    }
    for name, token in special.items():
        if values.get(name) is None:
            values[name] = token
    if info.generation_config is not None:
        return values, info.generation_config
    ids = {name: values[name] for name in special if values[name] is not None}
    return values, {"_from_model_config": True, **ids}


@dataclasses.dataclass(frozen=True, slots=True)
class _Entry:
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]
    code: str  # safetensors' name of its dtype
    read: Callable[[], np.ndarray]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * int(_DTYPES[self.code][1].itemsize)


def _write_weights(model: Decoder, folder: Path, info: HfInfo, max_shard_bytes: int) -> None:
    entries = list(_entries(model, info))
    shards: list[list[_Entry]] = [[]]
    for entry in entries:
        if shards[-1] and sum(e.num_bytes for e in shards[-1]) + entry.num_bytes > max_shard_bytes:
            shards.append([])
        shards[-1].append(entry)
    if len(shards) == 1:
        _write_safetensors(folder / WEIGHTS, shards[0])
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_safetensors(folder / file, shard)
        weight_map.update(dict.fromkeys((entry.name for entry in shard), file))
    if not is_main():
        return
    metadata = {
        "total_parameters": sum(math.prod(entry.shape) for entry in entries),
        "total_size": sum(entry.num_bytes for entry in entries),
    }
    _write_object(folder / INDEX, {"metadata": metadata, "weight_map": weight_map})


def _entries(model: Decoder, info: HfInfo) -> Iterator[_Entry]:
    """The tensors of a model, each with a function that brings it to the host in its dtype."""
    config = model.config
    shapes, codes = tensor_shapes(config), {torch: code for code, (torch, _) in _DTYPES.items()}
    sources: dict[str, tuple[str, jax.Array, int | None]] = {}
    for weight in MODEL_TENSORS:
        if hasattr(model, weight):
            sources[tensor_name(weight)] = (weight, getattr(model, weight)[...], None)
    layer = 0
    for stack in model.stacks:  # one, or two where part of the blocks is frozen
        for place in range(stack.attention_norm[...].shape[0]):
            for weight in block_weights(config):
                array = getattr(stack, weight)[...]
                sources[tensor_name(weight, layer)] = (weight, array, place)
            layer += 1
    for name, shape in shapes.items():
        code = codes[info.exceptions.get(name, info.dtype)]

        def read(name: str = name, code: str = code) -> np.ndarray:
            weight, array, place = sources[name]
            return _cast(name, to_tensor(weight, _on_host(array, place), config), code)

        yield _Entry(name, shape, code, read)


def _cast(name: str, tensor: np.ndarray, code: str) -> np.ndarray:
    torch_name, dtype = _DTYPES[code]
    with np.errstate(over="ignore"):
        tensor = np.ascontiguousarray(tensor, dtype=dtype)
    if not np.isfinite(tensor).all():
        raise UserError(f"tensor {name} has values that are not finite in {torch_name}")
    return tensor


def _on_host(array: jax.Array, layer: int | None) -> np.ndarray:
    """An array, or one layer of a stacked one, put together on the host from its shards."""
    if not array.is_fully_addressable:
        everywhere = NamedSharding(cast(NamedSharding, array.sharding).mesh, PartitionSpec())
        return np.asarray(_gather(array, layer, everywhere).addressable_data(0))
    if layer is None:
        return np.asarray(array)
    whole = np.empty(array.shape[1:], array.dtype)
    for shard in array.addressable_shards:
        if shard.replica_id == 0:
            whole[shard.index[1:]] = np.asarray(shard.data[layer])
    return whole


@functools.partial(jax.jit, static_argnums=2)
def _gather(array: jax.Array, layer: int | None, everywhere: NamedSharding) -> jax.Array:
    """An array, or one layer of it, whole on every device."""
    if layer is not None:
        array = jax.lax.dynamic_index_in_dim(array, layer, keepdims=False)
    return jax.reshard(array, everywhere)


def _write_safetensors(path: Path, entries: list[_Entry]) -> None:
    """The safetensors format: length of the header, header, data. One tensor in memory at a time.

    (The library's own writer wants all tensors of a file at once.)
    """
    # Widest dtypes first, as the library does, so that every tensor is aligned to its dtype.
    entries = sorted(entries, key=lambda entry: -_DTYPES[entry.code][1].itemsize)
    if not is_main():
        for entry in entries:
            entry.read()
        return
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        start, end = end, end + entry.num_bytes
        header[entry.name] = {
            "dtype": entry.code,
            "shape": list(entry.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in entries:
            file.write(entry.read().view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


def _read_object(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: missing; this is not a Hugging Face folder") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: a JSON object is expected")
    return values


def _write_object(path: Path, values: dict[str, Any]) -> None:
    text = json.dumps(values, indent=2, ensure_ascii=False, sort_keys=True)
    path.write_text(text + "\n", encoding="utf-8")
