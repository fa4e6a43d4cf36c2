"""Run with Apache Beam by other tests: makes the rows of each case on one machine and by Beam.

Argument: a folder with cases.json, a list of {"name", "spec", "config", "reading"[, "output"]}, and
a tokenizer. For each case NAME the rows of both ways are in NAME/here and NAME/beam, where Beam's
are copied from "output" if the case names one; what is wrong
with a case's data is printed as JSON: {name: [message here, message by Beam]}.
"""

import json
import sys
from pathlib import Path

from gram_jax.config import DataConfig
from gram_jax.data import prepare
from gram_jax.data.examples import Layout
from gram_jax.data.meter import Meter
from gram_jax.data.tokenizer import Tokenizer
from gram_jax.errors import DataError
from gram_jax.storage import located

# So small that a little data makes many chunks and shards.
prepare.CHUNK_BYTES, prepare._ROWS_PER_SHARD = 2000, 16

QUIET = Meter(quiet=True)
folder = Path(sys.argv[1])
tokenizer = Tokenizer.load(folder / "tokenizer")
faults = {}
for case in json.loads((folder / "cases.json").read_text()):
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in case["config"].items()}
    config = DataConfig(row_length=128, workers=1, **values)
    own = folder / case["name"]
    store = located(case["output"]) if "output" in case else None
    said = []
    for place, beam in (
        (own / "here", None),
        (store or own / "beam", prepare.Beam("DirectRunner")),
    ):
        try:
            prepare.prepare_rows(
                case["spec"], config, tokenizer, place,
                layout=Layout(case["reading"], True), replace=False, meter=QUIET, beam=beam,
            )  # fmt: skip
        except DataError as error:
            said.append(str(error))
    if said:
        faults[case["name"]] = said
    if store is not None:
        (own / "beam").mkdir()
        for file in store.files():
            with file.open() as stream:
                (own / "beam" / file.name).write_bytes(stream.read())
print(json.dumps(faults))
