"""Writes the same rows in every format that `open_source` reads; a package, as TFDS wants it."""

import gzip
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter


def jsonl(rows):
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def zstd(data):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def write_jsonl(path, rows):
    """Compressed as the extension says, in two gzip members or zstd frames."""
    pack = {".gz": gzip.compress, ".zst": zstd}.get(path.suffix, bytes)
    half = len(rows) // 2
    path.write_bytes(pack(jsonl(rows[:half])) + pack(jsonl(rows[half:])))
    return path


def write_parquet(path, rows, **options):
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


def write_arrow(path, rows, new=pa.ipc.new_stream, batch=1000):
    table = pa.Table.from_pylist(rows)
    with new(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=batch)
    return path


def write_array_record(path, raw, group_size=1):
    writer = ArrayRecordWriter(str(path), f"group_size:{group_size}")
    for record in raw:
        writer.write(record)
    writer.close()
    return path


def write_hf(folder, rows, shards=2):
    """The files that `datasets.Dataset.save_to_disk` (5.2) writes; features are not described."""
    folder.mkdir(parents=True)
    cuts = [len(rows) * shard // shards for shard in range(shards + 1)]
    names = [f"data-{shard:05d}-of-{shards:05d}.arrow" for shard in range(shards)]
    for shard, name in enumerate(names):
        write_arrow(folder / name, rows[cuts[shard] : cuts[shard + 1]])
    state = {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": "4b6e67b63ab1e4de",
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    (folder / "state.json").write_text(json.dumps(state, indent=2))
    info = {"citation": "", "description": "", "features": {}, "homepage": "", "license": ""}
    (folder / "dataset_info.json").write_text(json.dumps(info, indent=2))
    return folder


def write_hf_dict(folder, **splits):
    folder.mkdir(parents=True)
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": list(splits)}))
    for name, rows in splits.items():
        write_hf(folder / name, rows, shards=1)
    return folder


def write_tfds(folder, **splits):
    """Chat preferences as a TFDS dataset; returns the folder of its version."""
    tfds.disable_progress_bar()
    ChatDataset.ROWS = splits
    builder = ChatDataset(data_dir=str(folder), file_format="array_record")
    builder.download_and_prepare()
    return folder / "chat_dataset" / "1.0.0"


class ChatDataset(tfds.core.GeneratorBasedBuilder):
    """The rows of `ROWS` by split, with every kind of feature that text data has."""

    VERSION = tfds.core.Version("1.0.0")
    ROWS = {}  # noqa: RUF012

    def _info(self):
        f = tfds.features
        features = {
            "prompt": f.Sequence({"role": f.Text(), "content": f.Text()}),
            "chosen": f.Text(),
            "rejected": f.Text(),
            "score": np.float32,
            "vector": f.Tensor(shape=(2,), dtype=np.int32),
            "tags": f.Sequence(f.Text()),
            "meta": {"label": f.ClassLabel(names=["bad", "good"]), "ok": np.bool_},
            "turns": f.Dataset({"speaker": f.Text()}),
        }
        return self.dataset_info_from_configs(features=f.FeaturesDict(features))

    def _split_generators(self, _):
        return {name: enumerate(rows) for name, rows in self.ROWS.items()}

    def _generate_examples(self):
        raise NotImplementedError
