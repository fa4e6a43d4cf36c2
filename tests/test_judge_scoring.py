"""The judge, end to end: released families, scored in both orders as transformers does."""

import io
import json

import numpy as np
import peer_models
import peer_tokenizers
import pytest
import torch
import transformers

from gram_jax.checkpoints import load_model
from gram_jax.config import ComputeConfig
from gram_jax.data.builtin import reference_topics
from gram_jax.data.judge import JudgeTemplate, label_ids
from gram_jax.data.judge_prompts import encode_comparisons
from gram_jax.errors import DataError, UserError
from gram_jax.scorer import Question, RewardSettings, Scorer, judge_probability
from gram_jax.scoring_job import ScoringJob, run_job

TEMPLATE = """
labels = ["A", "B"]
prompt = '''
Which answer is better? Write A or B.

[User Question]
{question}

[The Start of Assistant A's Answer]
{response_a}
[The End of Assistant A's Answer]

[The Start of Assistant B's Answer]
{response_b}
[The End of Assistant B's Answer]

#Preferred: '''
[chat_template_kwargs]
enable_thinking = false
"""
COMPUTE = ComputeConfig(dtype="float32", unroll=1)


@pytest.fixture(scope="module")
def texts():
    return [topic.text for topic in reference_topics()[:80]]


@pytest.fixture(scope="module", params=["qwen3", "llama3"])
def judge(request, texts, tmp_path_factory):
    """A random small model with the tokenizer of its family: (folder, transformers' model)."""
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = peer_tokenizers.make(request.param, texts)
    family = {"qwen3": "Qwen3", "llama3": "Llama"}[request.param]
    sizes = {"vocab_size": tokenizer.vocab_size, "max_position_embeddings": 1024}
    model = peer_models.build(family, {**sizes, "tie_word_embeddings": False}, seed=5)
    model.save_pretrained(folder)
    tokenizer.save(folder)
    (folder / "template.toml").write_text(TEMPLATE)
    return folder, model


@pytest.fixture(scope="module")
def pairs(texts):
    """Questions, some of them asked twice, with responses of unlike lengths."""
    rows = []
    for i in range(12):
        chosen, rejected = texts[2 * i][:150], texts[2 * i + 1][: 20 + 15 * i]
        prompt = texts[40 + i // 3][:300]
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return rows


@pytest.fixture(scope="module")
def peers(judge, pairs):
    """(p(A), p(A)) of each pair in both orders, as a user of transformers would compute them."""
    folder, model = judge
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    prompt = JudgeTemplate.load(folder / "template.toml").prompt
    ids = [tokenizer.encode(label, add_special_tokens=False)[0] for label in "AB"]
    found = []
    for row in pairs:
        for a, b in ((row["chosen"], row["rejected"]), (row["rejected"], row["chosen"])):
            content = prompt.replace("{question}", row["prompt"])
            content = content.replace("{response_a}", a).replace("{response_b}", b)
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": content}],
                add_generation_prompt=True, enable_thinking=False, tokenize=False,
            )  # fmt: skip
            tokens = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
            with torch.inference_mode():
                logits = model(tokens).logits[0, -1, ids]
            found.append(torch.softmax(logits, 0)[0].item())
    return np.array(found).reshape(-1, 2)


def score(folder, rows, name, **settings):
    path, output = folder / f"{name}.jsonl", folder / f"{name}_out.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    template = JudgeTemplate.load(folder / "template.toml")
    reward = RewardSettings(reading="judge", template=template, **settings)
    job = ScoringJob(input=str(path), output=str(output), reward=reward)
    result = run_job(job, lambda: load_model(folder, COMPUTE), stream=io.StringIO())
    return [json.loads(line) for line in output.open()], result.summary


def test_p_of_a_is_that_of_transformers_in_both_orders(judge, pairs, peers):
    rows, summary = score(judge[0], pairs, "parity", row_length=512, batch_rows=2)
    log_odds = np.array([row["log_odds"] for row in rows])
    assert np.abs(1 / (1 + np.exp(-log_odds)) - peers).max() <= 1e-5
    assert np.ptp(peers) > 0.1  # the model tells them apart
    rewards = np.array([row["reward"] for row in rows])
    assert np.abs(rewards[:, 0] - (peers[:, 0] + 1 - peers[:, 1]) / 2).max() <= 1e-5
    np.testing.assert_allclose(rewards.sum(axis=1), 1, atol=1e-6)
    assert (rewards[:, 0] > rewards[:, 1]).any() and (rewards[:, 0] < rewards[:, 1]).any()
    assert summary.pairs["n"] == len(pairs)


def test_comparisons_of_a_question_share_its_part_of_the_prompt(judge, pairs):
    """In one row: the shared beginning once, and its last token before each rest."""
    folder, _ = judge
    row, third = pairs[0], pairs[3]["chosen"]
    rows = [row, row | {"rejected": third}]
    _, summary = score(folder, rows, "shared", row_length=1024, batch_rows=1)
    found = encode_comparisons(
        JudgeTemplate.load(folder / "template.toml"),
        row["prompt"],
        [row["chosen"], row["rejected"], third],
        [(0, 1), (0, 2)],
        load_model(folder, COMPUTE).tokenizer,
        max_length=1024,
    )
    prefix = len(found[0].prefix)
    rests = [len(rest) for one in found for rest in (one.forward, one.backward)]
    assert prefix > 60 and prefix - 1 + sum(rests) + 4 <= 1024  # all four fit one row
    assert summary.tokens == 4 * prefix + sum(rests)
    assert summary.tokens_computed == prefix - 1 + sum(n + 1 for n in rests)


def test_swapping_the_responses_swaps_the_rewards(judge, pairs):
    swapped = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in pairs]
    rows, _ = score(judge[0], pairs, "one", row_length=512)
    others, _ = score(judge[0], swapped, "other", row_length=1024, batch_rows=1)
    for row, other in zip(rows, others, strict=True):
        assert row["reward"] == pytest.approx(other["reward"][::-1], abs=1e-6)
        assert row["log_odds"] == pytest.approx(other["log_odds"][::-1], abs=1e-5)


def test_a_response_against_a_reference_is_one_number(judge, pairs):
    single = [
        {"prompt": p["prompt"], "response": p["chosen"], "reference": p["rejected"]} for p in pairs
    ]
    rows, _ = score(judge[0], pairs, "pair", row_length=512)
    others, summary = score(judge[0], single, "single", row_length=512)
    assert [row["reward"][0] for row in rows] == [row["reward"] for row in others]
    assert [row["num_tokens"][0] for row in rows] == [row["num_tokens"] for row in others]
    assert summary.pairs is None


def test_a_judge_takes_two_responses(judge):
    row = {"prompt": "p", "responses": ["a", "b", "c"]}
    with pytest.raises(DataError, match="holds 3, and a judge compares two") as error:
        score(judge[0], [row], "three")
    assert error.value.field == "responses"
    with pytest.raises(DataError, match="is missing") as error:
        score(judge[0], [{"prompt": "p", "response": "a"}], "none")
    assert error.value.field == "reference"


def test_what_is_too_long_is_named_or_cut_and_the_frame_stays(judge, pairs):
    long = [pairs[0] | {"chosen": "a long answer " * 300}]
    with pytest.raises(DataError, match=r"too_long.jsonl:1: field 'chosen'.*max_length=512"):
        score(judge[0], long, "too_long", row_length=512)
    rows, summary = score(judge[0], long, "cut", row_length=512, too_long="truncate")
    assert rows[0]["truncated"]["response_tokens"][0] > 100
    assert rows[0]["truncated"]["response_tokens"][1] == 0
    assert summary.truncated_rows == 1
    assert all(np.isfinite(rows[0]["log_odds"]))


def test_probabilities_are_over_labels_not_over_orders():
    """A judge that always says A is undecided; a softmax over the orders would see a winner."""
    forward, backward = np.array([3.0, 3.0, -1.0]), np.array([3.0, 1.0, -4.0])
    p = judge_probability(forward, backward)
    assert p[0] == pytest.approx(0.5)
    sig = 1 / (1 + np.exp(-np.array([3.0, 1.0])))
    assert p[1] == pytest.approx((sig[0] + 1 - sig[1]) / 2)
    np.testing.assert_allclose(p + judge_probability(backward, forward), 1)


def test_the_scorer_answers_questions_as_they_come(judge, texts, peers, pairs):
    """Any comparisons among any number of responses, and questions without any."""
    folder, _ = judge
    loaded = load_model(folder, COMPUTE)
    template = JudgeTemplate.load(folder / "template.toml")
    settings = RewardSettings(reading="judge", template=template, row_length=512, batch_rows=2)
    scorer = Scorer(loaded, settings)
    assert scorer.readout.labels == label_ids(template, loaded.tokenizer)
    row = pairs[0]
    questions = [
        Question(row["prompt"], [row["chosen"], row["rejected"]], [(0, 1), (1, 0)]),
        Question("Nothing to compare", ["a", "b"]),
        Question(row["prompt"], [row["rejected"], texts[40][:90], row["chosen"]], [(2, 0), (1, 2)]),
    ]
    first, none, last = scorer.score(iter(questions))
    assert first.rewards is None and none.forward.size == 0
    np.testing.assert_allclose(first.forward, first.backward[::-1], rtol=1e-5)
    assert 1 / (1 + np.exp(-first.forward[0])) == pytest.approx(peers[0, 0], abs=1e-5)
    assert last.forward[0] == pytest.approx(first.forward[0], rel=1e-5)
    assert len(last.num_tokens) == 3


def test_a_model_without_a_head_says_so(judge):
    loaded = load_model(judge[0], COMPUTE)
    with pytest.raises(UserError, match="has no reward head"):
        Scorer(loaded, RewardSettings(reading="head"))
