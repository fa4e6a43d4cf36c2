"""Experiments that start from a language model: its folder, chat prompts, and what it says."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from experiments.factor_table import levels_of
from experiments.results import path_of, read_left_out, read_sets, write_sets
from experiments.scoring import margins, reward_settings
from experiments.settings import FACTORS
from experiments.tasks import SCALES, make_task, messages
from experiments.training import train
from gram_jax.data.builtin import reference_topics
from gram_jax.errors import UserError
from tests import peer_models, peer_tokenizers

pytestmark = pytest.mark.timeout(600)
SCALE = SCALES["preferences"]["pretrained"]
LEVELS = FACTORS["pretrained"].levels


@pytest.fixture(scope="module")
def texts():
    return [topic.text for topic in reference_topics()[:80]]


@pytest.fixture(scope="module")
def made(texts, tmp_path_factory):
    """The task, and transformers' model that it starts from."""
    root = tmp_path_factory.mktemp("pretrained")
    tokenizer = peer_tokenizers.make("llama3", texts)
    sizes = {"vocab_size": tokenizer.vocab_size, "max_position_embeddings": 1024}
    model = peer_models.build("Llama", sizes, seed=5)
    model.save_pretrained(root / "model")
    tokenizer.save(root / "model")

    def rows(start, subset):
        for i in range(10):
            chosen, rejected = texts[start + i][:120], texts[start + i + 1][: 60 + 10 * i]
            prompt = texts[start + 11][:100]
            if i == 1:
                prompt = f"\n\nHuman: {prompt}\n\nAssistant: Why?\n\nHuman: So.\n\nAssistant:"
            yield {"prompt": prompt, "chosen": chosen, "rejected": rejected, "subset": subset}
        yield {"prompt": "long", "chosen": "x" * 800, "rejected": "y" * 700, "subset": subset}

    pairs = list(rows(0, "a"))
    files = {
        "text/train": [{"text": text} for text in texts[:20]],
        "responses/train": [
            {"prompt": one["prompt"], "responses": [one["chosen"], one["rejected"]]}
            for one in pairs
        ],
        "preferences/train": pairs,
        "preferences/validation": list(rows(15, "b")),
        "eval/llmbar": list(rows(30, "c")),
        "eval/hhh": list(rows(45, "d")),
        "eval/hh_harmless": list(rows(60, "e")),
    }
    for name, contents in files.items():
        path = root / "data" / f"{name}.jsonl.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        with gzip.open(path, "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in contents)
    arguments = ("preferences", SCALE, root / "work", str(root / "data"))
    return arguments, make_task(*arguments, str(root / "model")), model


def test_prompts_become_the_turns_that_they_spell():
    assert messages("Hello") == [{"role": "user", "content": "Hello"}]
    turns = [
        {"role": "user", "content": "A\n\nb"},
        {"role": "assistant", "content": "C"},
        {"role": "user", "content": "D"},
    ]
    assert messages("\n\nHuman: A\n\nb\n\nAssistant: C\n\nHuman: D\n\nAssistant:") == turns


def test_what_is_too_long_is_left_out_and_counted(made, tmp_path):
    _, task, _ = made
    assert task.left_out == dict.fromkeys(
        ("responses", "pairs", "validation", "llmbar", "hhh", "hh_harmless"), 1
    )
    assert len(task.pairs.read_text().splitlines()) == 10
    write_sets(task, tmp_path)
    assert read_left_out(tmp_path) == task.left_out
    assert read_sets(tmp_path)["llmbar"].prompts == [0, 1, *[0] * 8]
    assert read_sets(tmp_path)["llmbar"].subsets == ["c"] * 10
    assert len(task.digests["pretrained"]) == 64


def test_without_labels_it_says_what_transformers_says(made):
    _, task, model = made
    setting = LEVELS["likelihood, mean, no labels"]
    trained = train(task, setting, 0, task.text.parent)
    found = margins(trained.model, reward_settings(task, setting), task.sets["validation"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(task.pretrained)

    def mean(prompt, response):
        before = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        first = tokenizer(before, add_special_tokens=False).input_ids
        ids = tokenizer(response.strip() + "<|eot_id|>", add_special_tokens=False).input_ids
        with torch.no_grad():
            logits = model(torch.tensor([first + ids])).logits[0, len(first) - 1 : -1]
        return logits.log_softmax(-1)[range(len(ids)), ids].mean().item()

    rows = [json.loads(line) for line in task.sets["validation"].read_text().splitlines()]
    expected = [mean(r["prompt"], r["chosen"]) - mean(r["prompt"], r["rejected"]) for r in rows]
    np.testing.assert_allclose(found.margin, expected, atol=1e-4)
    assert found.truncated == 0


def test_each_reward_is_made_of_it(made, tmp_path):
    _, task, model = made
    data = task.pretrained.parent / "data"
    labels = ["judge, no labels", "judge, after pairs", "Bradley-Terry"]
    done = subprocess.run(
        [sys.executable, "-m", "experiments.generalisation", "--task=preferences",
         "--scale=pretrained", "--seeds=3", "--workers=1", f"--work={tmp_path}",
         f"--results={tmp_path}/results", f"--data={data}", f"--pretrained={task.pretrained}",
         *(f"--level={label}" for label in labels)],
        cwd=Path(__file__).parents[2], env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
        capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "4 settings x 1 seeds, 4 runs to do" in done.stdout
    kept = tmp_path / "results" / "preferences-pretrained"
    stages = [[], ["stage 1, pairs", "stage 2"], ["stage 2"]]
    for label, expected in zip(labels, stages, strict=True):
        record = json.loads(path_of(kept, LEVELS[label], 3).read_text())
        assert list(record["training"]) == expected
        assert record["parameters"] == model.num_parameters()
        assert next(iter(record["configs"].values()))["init_from"] == "model"
        for one in record["sets"].values():
            assert len(one["outcomes"]) == 10 and one["margin_std"] > 0
    found = levels_of(kept, FACTORS["pretrained"])
    assert [one.label for one in found if one.is_base] == ["likelihood, mean, no labels"]
    assert len(found) == 4


def test_a_folder_that_is_not_there_is_said(made):
    with pytest.raises(UserError, match="--pretrained='nowhere' is no folder with model"):
        make_task(*made[0], "nowhere")
