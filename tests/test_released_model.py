"""A language model that was released and people use: what we say of it is what transformers says.

SmolLM2-135M-Instruct, from the Python package index (experiments/smollm2.py).
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from experiments.smollm2_file import gguf_file
from gram_jax.checkpoints import load_model
from gram_jax.config import ComputeConfig
from gram_jax.data.judge import JudgeTemplate
from gram_jax.errors import UserError
from gram_jax.scorer import Question, RewardSettings, Scorer

pytestmark = pytest.mark.timeout(600)
ROOT = Path(__file__).parents[1]
FACTS = [
    (
        "What is the capital of France?",
        "The capital of France is Paris.",
        "The capital of France is Berlin.",
    ),
    ("What is 2 + 2?", "2 + 2 is 4.", "2 + 2 is 7."),
    ("Name a primary colour.", "Red is a primary colour.", "Brown is a primary colour."),
    ("Say hello in Spanish.", "Hola!", "Guten Tag!"),
]
TEMPLATE = """Which answer is better?

[Question]
{question}

[Answer A]
{response_a}

[Answer B]
{response_b}

Write A or B."""


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """The folder, our model, and transformers' model and tokenizer."""
    try:
        gguf_file()
    except UserError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("released") / "smollm2"
    done = subprocess.run(
        [sys.executable, "-m", "experiments.smollm2", f"--output={folder}"],
        cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True,
        timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "134,515,008 parameters" in done.stdout
    torch.set_num_threads(1)  # more of them wait for each other where cores are shared
    peer = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return load_model(folder, ComputeConfig(dtype="float32", unroll=1)), peer, tokenizer


def next_token_logprobs(peer, ids):
    with torch.no_grad():
        return peer(torch.tensor([ids])).logits[0].double().log_softmax(-1)


def test_log_probs_are_those_of_transformers_and_prefer_what_is_true(released):
    model, peer, tokenizer = released
    scorer = Scorer(model, RewardSettings(reading="likelihood", average="sum", row_length=128))
    questions = [
        Question([{"role": "user", "content": prompt}], (right, wrong), ((0, 1),))
        for prompt, right, wrong in FACTS
    ]
    for verdict, (prompt, *responses) in zip(scorer.score(questions), FACTS, strict=True):
        expected = []
        for response in responses:
            turns = [{"role": "user", "content": prompt}]
            before = tokenizer.apply_chat_template(
                turns, add_generation_prompt=True, tokenize=False
            )
            first = tokenizer(before).input_ids
            ids = tokenizer(response + "<|im_end|>").input_ids
            said = next_token_logprobs(peer, first + ids)[len(first) - 1 : -1]
            expected.append(said[range(len(ids)), ids].sum().item())
        np.testing.assert_allclose(verdict.rewards, expected, rtol=2e-5)
        assert verdict.rewards[0] > verdict.rewards[1]


def test_a_judge_reads_what_transformers_reads(released):
    model, peer, tokenizer = released
    template = JudgeTemplate(labels=("A", "B"), prompt=TEMPLATE)
    scorer = Scorer(model, RewardSettings(reading="judge", row_length=128, template=template))
    question, right, wrong = FACTS[0]
    (verdict,) = scorer.score([Question(question, (right, wrong), ((0, 1),))])
    assert verdict.forward is not None and verdict.backward is not None
    shown = ((right, wrong, verdict.forward[0]), (wrong, right, verdict.backward[0]))
    for first, second, found in shown:
        asked = TEMPLATE.format(question=question, response_a=first, response_b=second)
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": asked}], add_generation_prompt=True, tokenize=False
        )
        last = next_token_logprobs(peer, tokenizer(text).input_ids)[-1]
        a, b = (last[tokenizer(label).input_ids[0]].item() for label in ("A", "B"))
        np.testing.assert_allclose(found, a - b, atol=1e-4)
