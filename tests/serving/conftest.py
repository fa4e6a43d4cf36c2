"""Small models of every reading, and rows to score with them."""

import os
import random
import shutil

import peer_models
import pytest
import torch
from live_server import Gated, live

from gram_jax.checkpoints import load_model
from gram_jax.config import ComputeConfig
from gram_jax.data.builtin import reference_topics
from gram_jax.data.judge import JudgeTemplate
from gram_jax.data.tokenizer import EOS, Tokenizer
from gram_jax.scorer import RewardSettings

SIZES = {
    "vocab_size": 400, "hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 256,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if m.role == 'assistant' %}"
    f"{EOS}{{% endif %}}{{{{ '\\n' }}}}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TEMPLATE = """
labels = ["A", "B"]
prompt = "{question} One: {response_a} Two: {response_b} Better:"
"""


@pytest.fixture(scope="session")
def english():
    return [" ".join(topic.text.split()) for topic in reference_topics()][:40]


@pytest.fixture(scope="session")
def folder(english, tmp_path_factory):
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("checkpoint") / "small"
    peer_models.build("Llama", SIZES, seed=3).save_pretrained(path)
    Tokenizer.train(english, 400, chat_template=CHAT).save(path)
    return path


@pytest.fixture(scope="session")
def head_folder(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("classifier") / "head"
    sizes = SIZES | {"num_labels": 1}
    peer_models.build("Llama", sizes, seed=4, kind="SequenceClassification").save_pretrained(path)
    Tokenizer.load(folder).save(path)
    return path


@pytest.fixture(scope="session")
def template_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("template") / "judge.toml"
    path.write_text(TEMPLATE)
    return path


@pytest.fixture(scope="session")
def make_scorer(folder, head_folder, template_file):
    """``make_scorer(reading, **settings)``: a scorer on rows so short that batches fill."""

    def make(reading="likelihood", **settings):
        template = JudgeTemplate.load(template_file) if reading == "judge" else None
        loaded = load_model(head_folder if reading == "head" else folder, ComputeConfig())
        chosen = {"row_length": 256, "batch_rows": 2, "max_length": 160, "template": template}
        return Gated(loaded, RewardSettings(reading=reading, **chosen | settings))

    return make


@pytest.fixture(scope="session")
def likelihood(make_scorer):
    with live(make_scorer("likelihood")) as found:
        yield found


@pytest.fixture(scope="session")
def judge(make_scorer):
    with live(make_scorer("judge")) as found:
        yield found


@pytest.fixture(scope="session")
def head(make_scorer):
    with live(make_scorer("head")) as found:
        yield found


@pytest.fixture(scope="session")
def rows(english):
    """(prompt, responses) of two to four responses; every fourth repeats a prompt."""
    dice, made = random.Random(0), []
    for i in range(48):
        text = english[i % len(english)]
        at = dice.randrange(10, 60)
        prompt = made[-1][0] if i % 4 == 3 else text[:at]
        others = [english[dice.randrange(40)][: dice.randrange(5, 60)] for _ in range(i % 3 + 1)]
        made.append((prompt, [text[at : at + 50], *others]))
    return made


@pytest.fixture(scope="session")
def browser():
    """Chromium; without it, or without Playwright, the test is left out."""
    reason = "see CONTRIBUTING.md"
    sync_api = pytest.importorskip("playwright.sync_api", reason=f"no playwright: {reason}")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip(f"no chromium: {reason}")
    with sync_api.sync_playwright() as playwright:
        options = ["--no-sandbox"] if os.geteuid() == 0 else []
        found = playwright.chromium.launch(executable_path=chromium, args=options)
        yield found
        found.close()


@pytest.fixture
def open_page(browser):
    """``open_page(server)``: a page of it; no request may leave the server, nothing may fail."""
    from page_actions import expect, origin

    contexts, asked, faults = [], [], []

    def open_(server, fragment="", **options):
        context = browser.new_context(viewport={"width": 1100, "height": 800}, **options)
        context.set_default_timeout(0)  # pytest has one, which knows how slow a machine may be
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: asked.append((request.url, origin(server))))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda said: _refused(said, faults))
        page.goto(origin(server) + fragment)
        expect(page.locator("#model")).not_to_contain_text("Asking")
        return page

    yield open_
    for context in contexts:
        context.close()
    assert asked
    assert [url for url, home in asked if not url.startswith(home)] == []
    assert faults == []


def _refused(said, faults):
    """Answers of 4xx are written to the console by the browser; all else there is a fault."""
    if said.type in ("error", "warning") and "Failed to load resource" not in said.text:
        faults.append(said.text)
