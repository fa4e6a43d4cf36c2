"""Hugging Face folders, in: config.json and safetensors of a language model or a classifier.

float32 weights stream from the files straight into their shards; each device's share is read on its
own, so a host never holds more than one weight's share and one tensor beside it. With several
processes each reads the shares of its own devices. A sequence classifier with one label comes in as
a decoder with a reward head and without an unembedding. The way out is gram_jax/hf_export.py.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, Sharding, SingleDeviceSharding
from safetensors import SafetensorError, safe_open

from gram_jax.config import ComputeConfig, ModelConfig
from gram_jax.data.tokenizer import Tokenizer
from gram_jax.errors import UserError
from gram_jax.mesh import check_divides
from gram_jax.models import families
from gram_jax.models.adapters import Adapters, attach
from gram_jax.models.decoder import (
    MODEL_DIMS,
    Decoder,
    abstract_decoder,
    shardings,
    weight_name,
)
from gram_jax.models.families import model_config, tensor_name, tensor_part, tensor_shapes

CONFIG, GENERATION = "config.json", "generation_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES: dict[str, tuple[str, Any]] = {
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
        """The inverse of `to_json`."""
        return cls(**values)


def is_hf_folder(path: str | Path) -> bool:
    """Whether this is meant as a Hugging Face folder; `load` says whether it is whole."""
    return (Path(path) / CONFIG).is_file()


def is_classifier(path: str | Path) -> bool:
    """Whether config.json names a sequence classifier."""
    return families.is_classifier(_read_object(Path(path) / CONFIG))


def pads_with_end(path: str | Path) -> bool:
    """Whether transformers would take the end token of a sequence for padding."""
    values = _read_object(Path(path) / CONFIG)
    pad = values.get("pad_token_id")
    return pad is not None and pad == Tokenizer.load(path).eos_id


def read_config(folder: str | Path) -> tuple[ModelConfig, HfInfo]:
    """The model's shape, and what an export must give back. Reads headers, not weights.

    Raises:
      UserError: the folder does not hold a causal language model, or a classifier with one label,
        of a known family, or its files are damaged, or its tensors are not those of its config.
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
      UserError: as `read_config`; or the mesh does not divide the model.
    """
    folder = Path(folder)
    config, info = read_config(folder)
    abstract = abstract_decoder(config, compute)
    abstract = attach(abstract, Adapters(head=not config.has_unembedding), seed=0)
    if mesh is None:
        one = SingleDeviceSharding(jax.devices()[0])
        targets = jax.tree.map(lambda _: one, abstract)
    else:
        check_divides(mesh, config)
        targets = shardings(abstract, mesh)
    with ExitStack() as stack:
        tensors = _Tensors(folder, stack)

        def create(path: tuple[Any, ...], leaf: Any, sharding: Sharding) -> jax.Array:
            read = _reader(tensors, weight_name(path), config)
            return jax.make_array_from_callback(leaf.shape, sharding, read)

        model = jax.tree_util.tree_map_with_path(create, abstract, targets)
    return cast(Decoder, model), info


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
        return DTYPES[self._slice(name).get_dtype()][0]

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
            if dtype not in DTYPES:
                raise UserError(
                    f"{self.files[name]}: tensor {name} has dtype {dtype};"
                    f" known: {', '.join(DTYPES)}"
                )
        unembedding = tensor_name("unembedding")
        extra = [n for n in self.files if n not in wanted and not n.endswith("rotary_emb.inv_freq")]
        if config.tie_embeddings and unembedding in extra and self._is_tied():
            extra.remove(unembedding)
        if "score.bias" in extra:
            raise UserError(
                f"{self.files['score.bias']}: tensor score.bias: transformers' classifiers have no"
                " bias, and added to every reward it changes no comparison; remove this tensor"
            )
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
