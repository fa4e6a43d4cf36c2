"""lm-evaluation-harness with our model: the numbers of its own Hugging Face backend."""

import json
import math
from pathlib import Path

import environments
import numpy as np
import pytest
import reward_models
import torch
import transformers

from gram_jax.model_card import export_checkpoint

pytestmark = pytest.mark.timeout(environments.TIMEOUT)

POSITIONS = 96
"""So few that some contexts are cut, and some texts are read in several windows."""
TASKS = {
    "choices": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
""",
    "words": """
output_type: loglikelihood
doc_to_text: "{{context}}"
doc_to_target: "{{word}}"
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
  - {metric: acc, aggregation: mean, higher_is_better: true}
""",
    "texts": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: word_perplexity, higher_is_better: false}
  - {metric: bits_per_byte, higher_is_better: false}
""",
}


def greedy_words(folder):
    """Contexts with what the model writes next, where that is one token for a tokenizer too."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    found = []
    for text in reward_models.TEXTS:
        context = text[:50].rstrip()
        ids = tokenizer(context).input_ids
        with torch.inference_mode():
            token = model(torch.tensor([ids])).logits[0, -1].argmax().item()
        word = tokenizer.decode([token])
        if word.strip() and tokenizer(context + word).input_ids == [*ids, token]:
            found.append({"context": context, "word": word})
    return found


def rows(folder):
    texts = reward_models.TEXTS
    choices = [
        {
            "question": texts[i][:cut],
            "choices": [f" {texts[j][k : k + 20 + 9 * i]}" for j, k in ((i, cut), (i + 1, 3))],
            "answer": i % 2,
        }
        for i, cut in enumerate((30, 44, 61, 85, 300, 340, 120, 33))
    ]
    choices.append({"question": "No blank between", "choices": ["ing", " them", "s"], "answer": 1})
    blanks = [text.rindex(" ", 0, 70) for text in texts[:6]]
    words = [
        {"context": text[:at], "word": text[at : at + 12]}
        for text, at in zip(texts, blanks, strict=False)
    ]
    words.append({"context": "", "word": "A text without a context"})
    return {
        "choices": choices,
        "words": words + greedy_words(folder)[:4],
        "texts": [{"text": text[: 20 * (i + 1) ** 2]} for i, text in enumerate(texts[:6])],
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What the harness's command writes, of our model and of its own backend."""
    python = environments.program("huggingface")
    folder = tmp_path_factory.mktemp("lm_eval")
    model = reward_models.make(folder / "model", max_position_embeddings=POSITIONS)
    export_checkpoint(str(model), str(folder / "exported"))
    (folder / "tasks").mkdir()
    for name, lines in rows(model).items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in lines))
        source = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\n"
        head = f"task: {name}\ntest_split: test\n{source}"
        (folder / "tasks" / f"{name}.yaml").write_text(head + TASKS[name])
    ours = [python, "-m", "gram_jax.clients.harness", "run", "--model=gram_jax"]
    theirs = [environments.program("huggingface", "lm_eval"), "run", "--model=hf", "--device=cpu"]
    for command, given, output in (
        (ours, f"checkpoint={model}", "ours"),
        (theirs, f"pretrained={folder / 'exported'},dtype=float32", "theirs"),
    ):
        arguments = [
            f"--model_args={given}", f"--tasks={','.join(TASKS)}", "--log_samples",
            f"--include_path={folder / 'tasks'}", f"--output_path={folder / output}",
        ]  # fmt: skip
        environments.run([*command, *arguments], folder)
    return {name: read(folder / name) for name in ("ours", "theirs")}


def read(output):
    """The results of each task, and what the model said to each request, by document."""
    (file,) = Path(output).rglob("results_*.json")
    samples = {}
    for task in TASKS:
        (path,) = Path(output).rglob(f"samples_{task}_*.jsonl")
        lines = [json.loads(line) for line in path.open()]
        samples[task] = {line["doc_id"]: line["resps"] for line in lines}
    return json.loads(file.read_text())["results"], samples


def numbers(responses):
    """Log-probs of the requests of a document, and whether each was the likeliest text."""
    flat = [one[0] if isinstance(one[0], list) else one for one in responses]
    return [float(one[0]) for one in flat], [one[1] in (True, "True") for one in flat if one[1:]]


@pytest.mark.parametrize("task", TASKS)
def test_each_answer_is_that_of_the_hugging_face_backend(results, task):
    ours, theirs = (results[side][1][task] for side in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    all_greedy = []
    for document, responses in theirs.items():
        wanted, greedy = numbers(responses)
        found, found_greedy = numbers(ours[document])
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
        assert found_greedy == greedy
        all_greedy += greedy
    if task == "words":
        assert 3 <= sum(all_greedy) < len(all_greedy)


@pytest.mark.parametrize("task", TASKS)
def test_the_metrics_are_those_of_the_hugging_face_backend(results, task):
    ours, theirs = (results[side][0][task] for side in ("ours", "theirs"))
    metrics = [name for name in theirs if name.endswith(",none") and "stderr" not in name]
    assert len(metrics) == 2
    for name in metrics:
        assert math.isclose(ours[name], theirs[name], rel_tol=1e-5), name


def test_a_task_that_generates_is_refused_in_one_line(tmp_path):
    python = environments.program("huggingface")
    reward_models.make(tmp_path / "model", max_position_embeddings=POSITIONS)
    (tmp_path / "data.jsonl").write_text('{"question": "Who?", "answer": "Me"}\n')
    (tmp_path / "writes.yaml").write_text(
        "task: writes\ndataset_path: json\ntest_split: test\noutput_type: generate_until\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path}/data.jsonl}}}}\n"
        'doc_to_text: "{{question}}"\ndoc_to_target: "{{answer}}"\n'
        "metric_list: [{metric: exact_match}]\n"
    )
    arguments = [
        "run", "--model=gram_jax", f"--model_args=checkpoint={tmp_path}/model", "--tasks=writes",
        f"--include_path={tmp_path}",
    ]  # fmt: skip
    with pytest.raises(AssertionError) as failed:
        environments.run([python, "-m", "gram_jax.clients.harness", *arguments], tmp_path)
    said = str(failed.value)
    assert "error: gram_jax gives log-probs and does not generate" in said
    assert "Traceback" not in said
