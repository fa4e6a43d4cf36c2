"""Hugging Face folders, out: config.json, safetensors, tokenizer, model card.

One tensor at a time, in the dtype that it came in, so that import and export give the same bytes.
With several processes process 0 gathers and writes. A model with a reward head goes out as a
sequence classifier, any other as a causal language model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from gram_jax.config import ModelConfig
from gram_jax.data.tokenizer import Tokenizer
from gram_jax.distributed import barrier, is_main, main_first
from gram_jax.errors import UserError
from gram_jax.hf import CONFIG, DTYPES, GENERATION, INDEX, WEIGHTS, HfInfo
from gram_jax.models.classifiers import classifier
from gram_jax.models.decoder import Decoder, block_weights
from gram_jax.models.families import (
    MODEL_TENSORS,
    config_values,
    is_classifier,
    model_config,
    tensor_name,
    tensor_shapes,
    to_tensor,
)


def export(
    model: Decoder,
    folder: str | Path,
    *,
    tokenizer: Tokenizer,
    info: HfInfo | None = None,
    card: str,
    gram_config: dict[str, Any],
    ends_in_eos: bool = True,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes a folder that transformers 4 and 5 load, whole or not at all.

    Args:
      model: its arrays may be sharded, over the devices of all processes. With a head it becomes a
        classifier, and an unembedding is left out.
      folder: must not exist, or be empty.
      tokenizer: its ids must be rows of the model's embedding.
      info: of the folder that the model came from; None = a model of our own, in float32.
      card: the text of README.md.
      gram_config: content of gram_config.json: what the reward is and how to compute it.
      ends_in_eos: a classifier reads sequences that end in the end token, which therefore cannot be
        its padding.
      max_shard_bytes: weights above this are written in several files.

    Raises:
      UserError: the folder is in use, the tokenizer does not fit, the family cannot express the
        model, or a weight is not finite in its dtype.
    """
    folder = Path(folder).absolute()
    model = classifier(model) if hasattr(model, "head") else model
    main_first(lambda: check_unused(folder))
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"the tokenizer has ids up to {tokenizer.vocab_size - 1}; the model's vocabulary ends"
            f" at {model.config.vocab_size - 1}: this is not the model's tokenizer"
        )
    info = info if info is not None else HfInfo(config={})
    values, generation = _export_configs(model.config, info, tokenizer)
    if not model.config.has_unembedding:
        values["pad_token_id"] = _padding(values, tokenizer, ends_in_eos)
        tokenizer = tokenizer.with_padding(values["pad_token_id"])
    if not is_main():
        _write_weights(model, folder, info, max_shard_bytes)  # takes part; process 0 writes
        barrier("exported")
        return
    with whole_folder(folder) as partial:
        write_object(partial / CONFIG, values)
        if generation is not None:
            write_object(partial / GENERATION, generation)
        write_object(partial / "gram_config.json", gram_config)
        (partial / "README.md").write_text(card, encoding="utf-8")
        tokenizer.save(partial)
        _write_weights(model, partial, info, max_shard_bytes)
    barrier("exported")


def check_unused(folder: Path) -> None:
    """Raises UserError unless a folder can be written here."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists and is not an empty folder; export to a new one")


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into, beside ``folder`` and renamed at the end: it appears whole or not."""
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.replace(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _export_configs(
    config: ModelConfig, info: HfInfo, tokenizer: Tokenizer
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """config.json and generation_config.json: what was there, completed by what was not.

    A classifier has no generation_config.json.
    """
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
    if not config.has_unembedding:
        if not is_classifier(info.config):
            # Servers and pipelines then give the number itself, not its sigmoid.
            values["problem_type"] = "regression"
        return values, None
    if info.generation_config is not None:
        return values, info.generation_config
    ids = {name: values[name] for name in special if values[name] is not None}
    return values, {"_from_model_config": True, **ids}


def _padding(values: dict[str, Any], tokenizer: Tokenizer, ends_in_eos: bool) -> int:
    """The id that a classifier's batches are padded with.

    transformers reads a classifier at the last token whose id is not that of padding, so padding is
    a token that ends no sequence: the folder's own or the tokenizer's, unless that ends responses;
    else BOS; else the first special token that the chat template does not write.

    Raises:
      UserError: the tokenizer has no such token.
    """
    written = tokenizer.chat_template or ""
    others = [i for i in tokenizer.special_ids if tokenizer.decode([i]) not in written]
    for token in (values["pad_token_id"], tokenizer.pad_id, tokenizer.bos_id, *others):
        ends = ends_in_eos and token == tokenizer.eos_id
        if token is not None and 0 <= token < values["vocab_size"] and not ends:
            return int(token)
    raise UserError(
        "a classifier needs a padding token that ends no response, and every special token of the"
        " tokenizer may; add one (`pad_token` in tokenizer_config.json, with an id of its own)"
    )


@dataclasses.dataclass(frozen=True, slots=True)
class _Entry:
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]
    code: str  # safetensors' name of its dtype
    read: Callable[[], np.ndarray]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * int(DTYPES[self.code][1].itemsize)


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
    write_object(folder / INDEX, {"metadata": metadata, "weight_map": weight_map})


def _entries(model: Decoder, info: HfInfo) -> Iterator[_Entry]:
    """The tensors of a model, each with a function that brings it to the host in its dtype."""
    config = model.config
    shapes, codes = tensor_shapes(config), {torch: code for code, (torch, _) in DTYPES.items()}
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
    dtypes = dict(info.exceptions)
    if not is_classifier(info.config):
        # A head that no file had before is not rounded: D numbers take no room.
        dtypes[tensor_name("head")] = "float32"
    for name, shape in shapes.items():
        code = codes[dtypes.get(name, info.dtype)]

        def read(name: str = name, code: str = code) -> np.ndarray:
            weight, array, place = sources[name]
            return _cast(name, to_tensor(weight, _on_host(array, place), config), code)

        yield _Entry(name, shape, code, read)


def _cast(name: str, tensor: np.ndarray, code: str) -> np.ndarray:
    torch_name, dtype = DTYPES[code]
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
    entries = sorted(entries, key=lambda entry: -DTYPES[entry.code][1].itemsize)
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


def write_object(path: Path, values: dict[str, Any]) -> None:
    """A JSON file, as all that transformers reads here: indented, its names in order."""
    text = json.dumps(values, indent=2, ensure_ascii=False, sort_keys=True)
    path.write_text(text + "\n", encoding="utf-8")
