"""Apache Beam makes the rows that one machine makes, to the byte."""

import gzip
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import peer_models
import pytest

BEAM = Path(sys.prefix) / "peers" / "beam-2.77"
PYTHONPATH = os.pathsep.join([str(Path(__file__).parents[2]), str(BEAM)])


def sentence(rng, low, high):
    return " ".join(f"w{rng.randrange(3, 96)}" for _ in range(rng.randint(low, high)))


def texts(count, seed=0):
    rng = random.Random(seed)
    return [{"text": sentence(rng, 1, 120)} for _ in range(count)]


def responses(count):
    rng = random.Random(1)
    return [
        {"prompt": sentence(rng, 1, 20), "responses": [sentence(rng, 1, 40) for _ in range(2)]}
        for _ in range(count)
    ]


def pairs(count):
    rng = random.Random(2)
    prompts = [sentence(rng, 1, 20) for _ in range(50)]
    return [
        {
            "prompt": rng.choice(prompts),
            "chosen": sentence(rng, 1, 30),
            "rejected": sentence(rng, 31, 60),
        }
        for _ in range(count)
    ]


def write(path, rows):
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return str(path)


def with_repeats(rows, field):
    """Rows of which some come again with a word more, some far away."""
    again = [row | {field: f"{row[field]} w7"} for row in rows if len(row[field].split()) > 40]
    return [*rows, *again, *rows[:7]]


def cases(folder):
    """Of each: what differs from a plain preparation of text."""
    unlabelled, labelled = texts(160), pairs(160)
    text = write(folder / "text.jsonl", with_repeats(unlabelled, "text"))
    more = write(folder / "more.jsonl.gz", texts(60, seed=5))
    answers = write(folder / "responses.jsonl", responses(160))
    preferences = write(folder / "pairs.jsonl", labelled)
    eval_text = write(folder / "eval_text.jsonl", unlabelled[40:60])
    eval_pairs = write(folder / "eval_pairs.jsonl", labelled[:9])
    lines = Path(text).read_text().split("\n")
    broken = folder / "broken.jsonl"
    broken.write_text("\n".join([*lines[:90], "{", *lines[90:120], '{"text": 7}', ""]))
    cut = folder / "cut.jsonl.gz"
    cut.write_bytes(Path(more).read_bytes()[:-200])
    likelihood = {"reading": "likelihood"}
    few = {"max_pairs": 40, "holdout": 0.3, "exclude": [eval_pairs]}
    alike = {"near_duplicates": 0.8, "exclude": [eval_text], "exclude_ngrams": 13}
    found = [
        {"name": "text", "spec": f"{text},{more}", "output": "memory://rows"},
        {"name": "responses", "spec": answers},
        {"name": "preferences", "spec": preferences, **likelihood},
        {"name": "few", "spec": preferences, "config": few, **likelihood},
        {"name": "alike", "spec": f"{text},{more}", "config": alike},
        {"name": "aside", "spec": str(broken), "config": {"on_bad_row": "quarantine"}},
        {"name": "bad row", "spec": str(broken)},
        {"name": "cut off", "spec": f"{text},{cut}"},
        {"name": "too few", "spec": preferences, "config": {"max_pairs": 9999}, **likelihood},
    ]
    return [{"reading": "text", "config": {}} | case for case in found]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder with the rows of all cases, and what was said of their data."""
    environment = os.environ | {"PYTHONPATH": PYTHONPATH}
    asked = [sys.executable, "-c", "import apache_beam"]
    if subprocess.run(asked, env=environment, capture_output=True).returncode:
        pytest.skip("Apache Beam is not installed; make test does that")
    folder = tmp_path_factory.mktemp("beam")
    (folder / "cases.json").write_text(json.dumps(cases(folder)))
    peer_models.tokenizer().save(folder / "tokenizer")
    script = Path(__file__).parents[1] / "beam_rows.py"
    done = subprocess.run(
        [sys.executable, str(script), str(folder)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout)


def content(folder):
    """Every file of a folder of rows, to the byte; of the manifest, all but its seconds."""
    names = ("*.array_record", "*.json*")
    files = {path.name: path.read_bytes() for name in names for path in folder.glob(name)}
    manifest = files.pop("manifest.json")
    values = json.loads(manifest)
    head, _, tail = manifest.partition(f'"seconds": {values["seconds"]!r}'.encode())
    return files | {"manifest.json": head + tail}


CASES = ("text", "responses", "preferences", "few", "alike", "aside")


@pytest.mark.parametrize("name", CASES)
def test_beam_makes_the_same_files(made, name):
    folder, faults = made
    assert name not in faults
    here, beam = (content(folder / name / way) for way in ("here", "beam"))
    assert here == beam
    assert len(here) > 3 or name == "few"  # 40 pairs are one shard


def test_all_cases_did_what_they_are_for(made):
    folder, _ = made
    read = {
        name: json.loads((folder / name / "beam" / "manifest.json").read_text())["read"]
        for name in CASES
    }
    assert read["few"]["undrawn_pairs"] and read["few"]["overlapping_rows"]
    assert read["few"]["other_part"]
    assert read["alike"]["near_duplicates"] > 20 and read["alike"]["overlapping_texts"]
    assert read["aside"]["bad_rows"] == 2
    assert (folder / "aside" / "beam" / "quarantine.jsonl").is_file()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bad row", "broken.jsonl:91: not JSON"),
        ("cut off", "cut.jsonl.gz:"),
        ("too few", "fewer than config.data.max_pairs=9999"),
    ],
)
def test_what_is_wrong_with_the_data_is_said_in_the_same_words(made, name, message):
    _, faults = made
    here, beam = faults[name]
    assert message in here
    assert here == beam
