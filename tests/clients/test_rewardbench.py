"""The `rewardbench` command on an exported head: its accuracy and its scores are our own."""

import json
import sys

import environments
import numpy as np
import pytest
import reward_models

from gram_jax.model_card import export_checkpoint

pytestmark = pytest.mark.timeout(environments.TIMEOUT)


def rows():
    """Chats of one and of several turns, each with a response cut from another text."""
    texts = reward_models.TEXTS
    found = []
    for i in range(24):
        prompt = reward_models.messages(texts[i][:60])
        if i % 3 == 0:
            more = texts[i + 1][: 30 + i]
            prompt += reward_models.answer(texts[i][60:90]) + reward_models.messages(more)
        chosen, rejected = texts[i][90 : 120 + 2 * i], texts[i + 20][40 : 110 - 2 * i]
        answers = {"chosen": chosen, "rejected": rejected}
        found.append((prompt, {k: reward_models.answer(text) for k, text in answers.items()}))
    return found


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The folder of what the `rewardbench` command and `evaluate` wrote on the same rows."""
    python = environments.program("rewardbench")
    folder = tmp_path_factory.mktemp("rewardbench")
    head = reward_models.make(folder / "head", kind="SequenceClassification")
    export_checkpoint(head, folder / "exported")
    # RewardBench reads whole conversations, and takes the prompt from the chosen one.
    whole = [{name: prompt + said for name, said in answers.items()} for prompt, answers in rows()]
    write(folder / "whole.jsonl", whole)
    write(folder / "pairs.jsonl", [{"prompt": p, **answers} for p, answers in rows()])
    theirs = [
        "--model=exported", "--dataset=whole.jsonl", "--load_json", "--not_quantized",
        "--torch_dtype=float32", "--batch_size=5", "--max_length=2048", "--output_dir=results/",
    ]  # fmt: skip
    environments.run([python, environments.HERE / "rewardbench_on_cpu.py", *theirs], folder)
    ours = [f"--checkpoint={folder}/exported", "--data=pairs.jsonl", "--output=ours"]
    environments.run([sys.executable, "-m", "gram_jax.evaluate", *ours], folder)
    return folder


def test_the_accuracy_is_that_of_evaluate(results):
    theirs = json.loads((results / "results" / "exported.json").read_text())
    ours = json.loads((results / "ours" / "results.json").read_text())
    assert theirs["num_prompts"] == 24
    assert 0.2 < theirs["accuracy"] < 0.8
    assert ours["subsets"]["pairs"]["pairs"]["accuracy"]["value"] == theirs["accuracy"]


def test_each_score_is_that_of_evaluate(results):
    theirs = [json.loads(line) for line in (results / "results" / "exported_outputs.jsonl").open()]
    ours = [json.loads(line) for line in (results / "ours" / "results.jsonl").open()]
    np.testing.assert_allclose(
        [row["rewards"] for row in ours],
        [[row["scores_chosen"], row["scores_rejected"]] for row in theirs],
        rtol=1e-5,
        atol=1e-5,
    )
