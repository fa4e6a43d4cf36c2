"""The site of docs/ builds without a warning, and fetches nothing when it is read."""

import html.parser
import json
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlparse

import pytest
import yaml

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built as `make docs` does."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


class Fetched(html.parser.HTMLParser):
    """What a browser fetches for a page: not the links that people follow."""

    def __init__(self):
        super().__init__()
        self.addresses = []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag in ("script", "img", "iframe", "source", "video", "audio"):
            self.addresses.append(attributes.get("src"))
        elif tag == "link" and attributes.get("rel") not in ("canonical", "next", "prev"):
            self.addresses.append(attributes.get("href"))


def pages(entries):
    for entry in entries:
        for value in entry.values() if isinstance(entry, dict) else [entry]:
            yield from pages(value) if isinstance(value, list) else [value]


def test_every_page_is_there_and_fetches_only_what_lies_beside_it(site):
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))["nav"]
    named = [site / page.replace(".md", ".html") for page in pages(nav)]
    assert len(named) > 30
    for path in named:
        fetched = Fetched()
        fetched.feed(path.read_text("utf-8"))
        addresses = [address for address in fetched.addresses if address]
        assert addresses
        for address in addresses:
            assert not urlparse(address).netloc, f"{path.name} fetches {address}"
            if not address.startswith("data:"):
                place = path.parent / urlparse(address).path
                assert place.resolve().is_file(), f"{path.name} needs {address}"


def test_the_search_index_holds_pages_settings_and_functions(site):
    index = json.loads((site / "search" / "search_index.json").read_text("utf-8"))
    text = "\n".join(f"{entry['title']} {entry['text']}" for entry in index["docs"])
    for word in ("label_smoothing", "round_robin", "smoothing_floor", "quarantine.jsonl"):
        assert word in text


def test_file_names_in_the_text_are_links_on_the_site(site):
    method = (site / "method.html").read_text("utf-8")
    assert '<a href="ranking.html">Ranking responses</a>' in method
    attention = (site / "attention.html").read_text("utf-8")
    assert 'href="api/training.html#gram_jax.rows"' in attention


def test_the_api_shows_sections_of_docstrings_as_tables_or_lists(site):
    page = (site / "api" / "reward_models.html").read_text("utf-8")
    assert 'id="gram_jax.scorer.Scorer.score"' in page
    for raw in ("Args:\n", "Raises:\n", "Attributes:\n", ":class:", ":func:"):
        assert raw not in page


def test_names_that_share_a_meaning_have_a_line_each_with_their_types(site):
    page = (site / "api" / "data.html").read_text("utf-8")
    entry = page.partition('id="gram_jax.data.shapes.detect_format"')[2]
    rows = [re.sub(r"<[^>]+>", " ", row).split() for row in entry.split("</tr>")[:5]]
    meaning = ["where", "it", "stands,", "for", "messages.", "required"]
    assert ["file", "str", "|", "Path", *meaning] in rows
    assert ["line", "int", "|", "None", *meaning] in rows


def test_the_notebook_is_a_page_with_its_outputs(site):
    page = (site / "notebooks" / "first_reward_model.html").read_text("utf-8")
    assert page.count('src="first_reward_model_') == 4
    assert "finetune: accuracy" in page
    assert (site / "notebooks" / "first_reward_model.ipynb").is_file()
