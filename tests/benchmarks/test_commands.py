"""Benchmarks from end to end on a tiny model: they run, and both sides compute the same."""

import gzip
import json
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from benchmarks import workloads
from benchmarks.corpus import corpus_tokenizer, preference_rows
from benchmarks.harness import BFLOAT16, ROOT, Worker, compare, has_bfloat16
from benchmarks.models import SHAPES, write_model
from benchmarks.results import Result
from benchmarks.workloads import padded_places
from gram_jax.encoding import Encoder
from gram_jax.errors import UserError

# Eight commands of several processes each.
pytestmark = pytest.mark.timeout(900)

SIDES = {
    "scoring": ["gram_jax", "plain", "careful"],
    "shared_prefix": ["gram_jax", "plain", "careful"],
    "judge": ["gram_jax", "careful", "plain"],
    "pretraining": ["gram_jax", "peer"],
    "finetuning": ["gram_jax", "peer"],
    "preferences": [],
    "input": [],
    "parts": [],
}


def write(path, rows):
    path.parent.mkdir(exist_ok=True)
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder as --data names it: words from a small vocabulary, three pairs a prompt."""
    folder, rng = tmp_path_factory.mktemp("data"), random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 6))) for _ in range(80)]

    def text(count):
        return " ".join(rng.choices(words, k=count))

    write(folder / "text" / "train.jsonl.gz", [{"text": text(400)} for _ in range(12)])
    prompts = [text(rng.randint(3, 20)) for _ in range(10)]
    pairs = [
        {"prompt": prompt, "chosen": text(rng.randint(3, 40)), "rejected": text(20)}
        for prompt in prompts
        for _ in range(3)
    ]
    write(folder / "preferences" / "train.jsonl.gz", pairs)
    return folder


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def results(data, tmp_path_factory):
    """The result of every benchmark by name; two run at a time, as most of it is imports."""
    folder = tmp_path_factory.mktemp("results")
    corpus_tokenizer(data, 512)  # now, as both would train it

    with ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda name: run(name, data, folder), SIDES)
        return dict(zip(SIDES, found, strict=True))


def run(name, data, folder):
    command = [sys.executable, "-m", f"benchmarks.{name}", "--small", f"--data={data}"]
    command.append(f"--output={folder / name}.json")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{name}: python -m benchmarks.{name}" in done.stdout
    return Result.read(folder / f"{name}.json")


@pytest.mark.parametrize("name", [name for name, sides in SIDES.items() if sides])
def test_both_sides_of_a_benchmark_agree(name, results):
    (case,) = results[name].cases
    sides = [timing.side for timing in case.timings]
    # Where the processor has instructions for it.
    shown = name != "finetuning" and has_bfloat16(results[name].peak)
    half = [BFLOAT16] if shown else []
    assert sides == SIDES[name] + half
    assert all(timing.share > 0 for timing in case.timings)
    assert 0 < case.difference < 1e-4
    assert all(timing.work > 0 and timing.median > 0 for timing in case.timings)
    assert results[name].peak["XLA"] > 0 and results[name].peak["PyTorch"] > 0
    assert {"torch", "transformers", "jax"} <= results[name].versions.keys()


def test_a_preference_file_is_counted_in_both_orders(results):
    cases = results["preferences"].cases
    assert [case.name for case in cases] == ["by prompts", "in the file's order"]
    for case in cases:
        assert "30 pairs of 10 prompts" in case.what and case.targets[0].at_most


def test_the_input_is_measured_beside_the_step_it_feeds(results):
    cases = results["input"].cases
    assert [case.name for case in cases] == ["training", "scoring", "judging"]
    for case in cases:
        source, step = case.timings
        assert [source.side, step.side] == ["input", "step"]
        assert source.facts["measured_rows"] > 0 and step.facts["measured_rows"] > 0
        (target,) = case.targets
        assert target.reached == pytest.approx(source.rate / step.rate)


def test_the_parts_of_a_step_and_the_rest_are_the_step(results):
    (case,) = results["parts"].cases
    step, *parts = case.timings
    assert [part.side for part in parts[-2:]] == ["clipping and AdamW", "the rest of the layers"]
    assert sum(part.seconds[0] for part in parts) == pytest.approx(step.seconds[0])
    assert sum(part.flops for part in parts) == pytest.approx(step.flops)


def test_a_start_is_cut_into_its_parts(data, tmp_path):
    (case,) = run("loading", data, tmp_path).cases
    first, again, peer = case.timings
    assert [first.side, again.side, peer.side] == ["gram_jax", "gram_jax again", "transformers"]
    assert 0 < case.difference < 1e-4
    for timing in case.timings:
        parts = timing.facts["parts"]
        assert sum(parts.values()) == pytest.approx(timing.median)
        assert all(parts[name] > 0 for name in ("imports", "weights", "batch", "rest"))


def test_served_scores_are_those_of_a_batch(data, tmp_path):
    (case,) = run("serving", data, tmp_path).cases
    batch, served = case.timings
    assert [batch.side, served.side] == ["batch", "served"]
    assert case.difference < 1e-5
    assert served.facts["batches"] >= 1 and 0 < served.facts["padding"] < 1


def test_a_soak_finds_nothing_wrong_and_nothing_lost(data):
    command = [sys.executable, "-m", "benchmarks.soak", "--small", "--minutes=0.1"]
    done = subprocess.run(
        [*command, f"--data={data}", "--clients=12"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode in (0, 1), done.stderr[-3000:]  # 1: so short a run may grow
    for line in ("wrong answers 0", "lost requests 0"):
        assert line in " ".join(done.stdout.split()), done.stdout + done.stderr[-3000:]
    for line in ("answered 0", "refused with their field 0", "went away 0"):
        assert f"{line} " not in " ".join(done.stdout.split()), done.stdout


def test_padded_places_are_counted_as_the_peer_pads():
    # Sorted: (7, 5) -> 14 places, as a third would make 21; (3, 2, 2) -> 9.
    assert padded_places([2, 7, 3, 5, 2], 14) == 14 + 9
    assert padded_places([30], 14) == 30


def test_text_of_a_workload_has_the_ids_it_says(data):
    tokenizer = corpus_tokenizer(data, 512)
    encoder = Encoder(tokenizer=tokenizer, reading="likelihood", max_length=512)
    (asked,) = workloads.best_of(data, encoder, 1, prompt=32, responses=2, response=16)
    prompt, response = asked.sequences[1]
    assert prompt == tokenizer.encode_prompt(asked.prompt) and abs(len(prompt) - 32) <= 2
    assert response == tokenizer.encode_response(asked.responses[1])
    assert workloads.num_tokens([asked]) == sum(len(a) + len(b) for a, b in asked.sequences)


def test_separate_pairs_have_no_prompt_twice(data):
    encoder = Encoder(tokenizer=corpus_tokenizer(data, 512), reading="likelihood", max_length=512)
    asked = workloads.separate_pairs(data, encoder, 10_000)
    assert len({one.prompt for one in asked}) == len(asked) == 10
    assert len(list(preference_rows(data))) == 30


def test_another_models_numbers_are_refused(data, tmp_path):
    tokenizer = corpus_tokenizer(data, 512)
    encoder = Encoder(tokenizer=tokenizer, reading="likelihood", max_length=512)
    workloads.save(tmp_path / "q.json", workloads.separate_pairs(data, encoder, 300))
    for name in ("one", "other"):
        write_model(tmp_path / name, SHAPES["tiny"], tokenizer)
    weights = load_file(tmp_path / "other" / "model.safetensors")
    weights["model.layers.1.self_attn.v_proj.weight"] *= np.float32(1.01)
    save_file(weights, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    questions = str(tmp_path / "q.json")
    with (
        Worker(
            "ours:Scoring", model=str(tmp_path / "one"), questions=questions, reading="likelihood"
        ) as ours,
        Worker(
            "peer:Scoring",
            model=str(tmp_path / "other"),
            questions=questions,
            labels=[],
            half="plain",
        ) as peer,
        pytest.raises(UserError, match="gram_jax and plain did not compute the same"),
    ):
        compare(
            ours, {"plain": (peer, "plain")}, repetitions=1, work=1, unit="tokens",
            flops={"gram_jax": 1.0, "plain": 1.0}, peak={"XLA": 1.0, "PyTorch": 1.0},
        )  # fmt: skip


def test_a_worker_says_what_a_user_can_do(tmp_path):
    missing = str(tmp_path / "no")
    with (
        Worker("ours:Scoring", model=missing, questions="", reading="likelihood") as worker,
        pytest.raises(UserError, match=r"there is no such folder"),
    ):
        worker.ready()
