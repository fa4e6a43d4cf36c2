"""Run with Apache Beam by other tests: makes the rows of each case on one machine and by Beam.

Argument: a folder with cases.json, a list of {"name", "spec", "config", "reading", "use"}, and a
tokenizer. For each case NAME the rows of both ways are in NAME/here and NAME/beam; what is wrong
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

folder = Path(sys.argv[1])
tokenizer = Tokenizer.load(folder / "tokenizer")
faults = {}
for case in json.loads((folder / "cases.json").read_text()):
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in case["config"].items()}
    config = DataConfig(row_length=128, workers=1, **values)
    said = []
    for way, beam in (("here", None), ("beam", prepare.Beam("DirectRunner"))):
        try:
            prepare.prepare_rows(
                case["spec"], config, tokenizer,
                located(case.get("output", folder / case["name"])) / way if beam
                else folder / case["name"] / way,
                layout=Layout(case["reading"], True), replace=False, meter=Meter(quiet=True),
                use=case.get("use", "train"), beam=beam,
            )  # fmt: skip
        except DataError as error:
            said.append(str(error))
    if said:
        faults[case["name"]] = said
print(json.dumps(faults))
