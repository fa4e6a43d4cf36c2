"""The page in Firefox: what the other tests of it do in Chromium, in short."""

import shutil

import pytest
from firefox import firefox

PROGRAM = shutil.which("firefox-esr") or shutil.which("firefox")
pytestmark = [
    pytest.mark.skipif(PROGRAM is None, reason="no firefox: see CONTRIBUTING.md"),
    pytest.mark.timeout(600),
]

PROMPT = "How do I sort a list?"
RESPONSES = ["Call list.sort(), which returns None. Größe: ½ 😀", "Use list.sort().", "Bubble."]
WRITE = """
const [prompt, responses] = arguments;
document.getElementById("add").click();
const write = (id, text) => {
  const area = document.getElementById(id);
  area.value = text;
  area.dispatchEvent(new Event("input", { bubbles: true }));
};
write("prompt", prompt);
responses.forEach((text, place) => write(`response-${place}`, text));
document.getElementById("compare").click();
"""
DONE = "document.querySelector('#result:not([aria-busy]) h2')"
NUMBERS = "return [...document.querySelectorAll(arguments[0])].map((e) => Number(e.value))"
FAULTS = """return [...document.querySelectorAll(".fault, #problem")]
  .filter((e) => e.checkVisibility()).map((e) => e.textContent)"""
ADDRESSES = "return performance.getEntriesByType('resource').map((e) => e.name)"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with firefox(PROGRAM, tmp_path_factory.mktemp("firefox"), "--width=1100") as found:
        yield found


def test_a_comparison_its_tokens_and_its_link(likelihood, browser):
    home = f"http://127.0.0.1:{likelihood.port}/"
    browser.go(home)
    browser.wait("!document.querySelector('#model').textContent.includes('Asking')")
    browser.run(WRITE, PROMPT, RESPONSES)
    browser.wait(DONE)
    assert browser.run(FAULTS) == []
    ranked = likelihood.good("/gram/v1/rank", {"prompt": PROMPT, "responses": RESPONSES})["results"]
    shown = browser.run(NUMBERS, ".ranking data")
    assert shown == pytest.approx([each["reward"] for each in ranked], rel=1e-5)
    first, second = (RESPONSES[each["index"]] for each in ranked[:2])
    body = {"prompt": PROMPT, "a": first, "b": second, "tokens": True}
    found = likelihood.good("/gram/v1/compare", body)
    p = found["p_a_better"]
    assert browser.run(NUMBERS, ".odds data") == pytest.approx([p, 1 - p], rel=1e-4, abs=1e-6)
    texts = browser.run("return [...document.querySelectorAll('.token')].map((e) => e.textContent)")
    tokens = [token for side in found["tokens"] for token in side]
    assert texts == [token["text"] for token in tokens]
    browser.run("document.querySelector('.token').focus()")
    assert browser.run("return document.getElementById('tip').checkVisibility()")
    assert browser.run(NUMBERS, "#tip data")[0] == pytest.approx(tokens[0]["logprob"], rel=1e-5)

    everything = browser.run(NUMBERS, "#result data")
    link = browser.run("return location.href")
    assert link.startswith(home + "#c=")
    browser.go(link)
    browser.wait(DONE)
    assert browser.run(NUMBERS, "#result data") == pytest.approx(everything, rel=1e-5, abs=1e-6)
    addresses = browser.run(ADDRESSES)
    assert addresses and [url for url in addresses if not url.startswith(home)] == []


def test_an_error_stands_at_its_field(likelihood, browser):
    browser.go(f"http://127.0.0.1:{likelihood.port}/")
    browser.wait("!document.querySelector('#model').textContent.includes('Asking')")
    browser.run(WRITE, PROMPT, [*RESPONSES[:2], ""])
    browser.wait("document.querySelector('#response-2-fault').checkVisibility()")
    assert browser.run(FAULTS) == ["Response C is empty"]
    assert browser.run("return document.activeElement.id") == "response-2"
