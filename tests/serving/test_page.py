"""The page in a real browser, on a real server of a small model."""

import itertools
import json
import math
import re

import pytest
from live_server import live
from page_actions import answer, close, compare, expect, origin, values, write

pytestmark = pytest.mark.timeout(600)

KEY = "a kéy of the tests"
PROMPT = "How do I sort a list?"
FIRST = "Call list.sort(), which returns None.\nBoth take a key, and both are stable. Größe: ½ 😀"
SECOND = "Call list.sort(), which returns the list.\nBoth take a key; one is stable."
THIRD = "Use bubble sort."
HOSTILE = "<img src=x onerror=alert(1)> & <b>bold</b>"


@pytest.fixture(scope="module")
def server(make_scorer):
    with live(make_scorer("likelihood", beta=0.05, average="mean")) as found:
        yield found


@pytest.fixture(scope="module")
def locked_judge(make_scorer):
    with live(make_scorer("judge", max_length=256), keys=[KEY]) as found:
        yield found


def test_a_comparison_shows_the_numbers_of_the_server(server, open_page):
    page = open_page(server)
    write(page, PROMPT, FIRST, SECOND)
    compare(page)
    found = answer(server, "compare", prompt=PROMPT, a=FIRST, b=SECOND)
    scored = answer(server, "score", prompt=PROMPT, responses=[FIRST, SECOND])["results"][0]
    p = found["p_a_better"]
    assert values(page.locator(".odds")) == close([p, 1 - p])
    p = values(page.locator(".odds"))[0]
    better, worse = ("A", "B") if p > 0.5 else ("B", "A")
    headline = f"{better} is better than {worse} with probability {max(p, 1 - p):.3f}"
    assert page.locator("h2").inner_text() == headline
    for side, facts in enumerate(page.locator(".facts").all()):
        logprob, count = scored["logprobs"][side], scored["num_tokens"][side]
        assert values(facts) == close([scored["rewards"][side], logprob, count])
        assert f"\u2212{-values(facts)[1]:.2f}" in facts.inner_text()
    assert found["rewards"] == close(scored["rewards"])
    for fact in ("small", "likelihood, mean", "beta 0.05", "at most 160 tokens", "float32"):
        assert fact in page.locator("#model").inner_text()


def test_each_token_shows_its_logprob_on_hover_and_on_focus(server, open_page):
    page = open_page(server)
    write(page, PROMPT, FIRST, SECOND)
    compare(page)
    asked = {"prompt": PROMPT, "responses": [FIRST, SECOND], "tokens": True}
    tokens = answer(server, "score", **asked)["results"][0]["tokens"]
    for side, expected in enumerate(tokens):
        shown = page.locator(".tokens").nth(side).locator(".token")
        texts = shown.evaluate_all("all => all.map(e => e.textContent)")
        assert texts == [token["text"] for token in expected]
        assert "".join(texts[:-1]) == (FIRST, SECOND)[side]
        for place in (0, 3, len(expected) - 1):
            logprob = expected[place]["logprob"]
            page.mouse.move(0, 0)
            assert page.locator("#tip").is_hidden()
            shown.nth(place).hover()
            assert values(page.locator("#tip"))[:2] == close([logprob, math.exp(logprob)])
    first = page.locator(".tokens").nth(0).locator(".token")
    page.mouse.move(0, 0)
    first.nth(0).focus()
    for place, key in ((1, "ArrowRight"), (2, "ArrowDown"), (1, "ArrowLeft"), (0, "Home"),
                       (len(tokens[0]) - 1, "End")):  # fmt: skip
        page.keyboard.press(key)
        assert page.evaluate("Number(document.activeElement.dataset.place)") == place
        assert values(page.locator("#tip"))[0] == close(tokens[0][place]["logprob"])
    page.keyboard.press("Escape")
    assert page.locator("#tip").is_hidden()


def longest_common(a, b):
    lengths = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            above = max(lengths[i][j + 1], lengths[i + 1][j])
            lengths[i + 1][j + 1] = lengths[i][j] + 1 if x == y else above
    return lengths[-1][-1]


PARTS = """async ([a, b, average]) => {
  const { differences, largest } = await import("./page/align.js");
  const { parts } = differences(a, b, average);
  return [parts, largest(parts)];
}"""


@pytest.mark.parametrize("average", ["sum", "mean"])
def test_what_each_token_adds_sums_to_the_difference_of_rewards(server, open_page, average):
    page = open_page(server)
    asked = {"prompt": PROMPT, "responses": [FIRST, SECOND], "tokens": True}
    scored = answer(server, "score", **asked)["results"][0]
    a, b = scored["tokens"]
    parts, marked = page.evaluate(PARTS, [a, b, average])
    rewards = scored["logprobs" if average == "sum" else "rewards"]
    assert sum(part["value"] for part in parts) == pytest.approx(rewards[0] - rewards[1], rel=1e-5)
    aligned = [(part["a"], part["b"]) for part in parts if None not in (part["a"], part["b"])]
    texts = [[token["text"] for token in tokens] for tokens in (a, b)]
    assert len(aligned) == longest_common(*texts)
    assert all(texts[0][i] == texts[1][j] for i, j in aligned)
    assert aligned == sorted(aligned) and [j for _, j in aligned] == sorted(j for _, j in aligned)
    for side, all_of_side in (("a", a), ("b", b)):
        assert sorted(p[side] for p in parts if p[side] is not None) == [*range(len(all_of_side))]
    sizes = sorted((abs(part["value"]) for part in parts), reverse=True)
    assert [abs(part["value"]) for part in marked] == sizes[: len(marked)]
    assert 1 <= len(marked) <= 5


def test_where_the_two_differ_most_is_marked_and_listed(server, open_page):
    page = open_page(server)
    write(page, PROMPT, FIRST, SECOND)
    compare(page)
    rows = page.locator(".differences tbody tr")
    numbers = page.locator("[data-mark]").evaluate_all("all => all.map(e => e.dataset.mark)")
    assert {int(n) for n in numbers} == set(range(1, rows.count() + 1))
    rows.nth(0).locator("button").click()
    assert page.evaluate("document.activeElement.dataset.mark") == "1"
    part = values(rows.nth(0))[-1]
    assert values(page.locator("#tip"))[-1] == part
    assert rows.nth(0).locator("td").last.inner_text() == ("A" if part > 0 else "B")


def test_a_link_restores_the_comparison(server, open_page):
    page = open_page(server)
    write(page, PROMPT, FIRST, SECOND, HOSTILE)
    compare(page)
    page.locator("input[name=left]:not(:checked)").first.check()
    page.wait_for_selector("#result:not([aria-busy]) h2")
    page.click("#share")
    expect(page.locator("#link-text")).to_have_value(re.compile("#c=."))
    link = page.input_value("#link-text")
    other = open_page(server, link.removeprefix(origin(server)))
    other.wait_for_selector("#result:not([aria-busy]) h2")
    assert [area.input_value() for area in other.locator("textarea").all()] == [
        PROMPT, FIRST, SECOND, HOSTILE,
    ]  # fmt: skip
    names = "all => all.map(e => e.textContent)"
    assert other.locator("h3").evaluate_all(names) == page.locator("h3").evaluate_all(names)
    assert values(other.locator("#result")) == close(values(page.locator("#result")))
    assert other.locator("#result img, #result b").count() == 0


def test_a_damaged_link_says_so(server, open_page):
    for fragment in ("#c=AAAA", "#c=%%%"):
        page = open_page(server, fragment)
        page.wait_for_selector("#problem:visible")
        assert "damaged" in page.locator("#problem").inner_text()


def test_the_keyboard_alone_is_enough(server, open_page):
    page = open_page(server)
    order = []
    for _ in range(9):
        page.keyboard.press("Tab")
        order.append(page.evaluate("document.activeElement.id"))
    assert order == ["theme", "prompt-as", "prompt", "response-0", "response-1", "compare", "add",
                     "share", "example"]  # fmt: skip
    page.keyboard.press("Enter")
    assert page.input_value("#response-1")
    page.focus("#response-1")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#result:not([aria-busy]) h2")
    assert page.locator("h2").inner_text() in page.locator("#announced").inner_text()
    for _ in range(5):
        page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.matches('.token[data-side=\"0\"]')")
    assert page.locator("#tip").is_visible()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.matches('.token[data-side=\"1\"]')")


def test_an_error_stands_at_the_field_that_it_is_about(server, open_page):
    page = open_page(server)
    write(page, PROMPT, FIRST, "")
    page.click("#compare")
    page.wait_for_selector("#response-1-fault:visible")
    error = answer(server, "score", prompt=PROMPT, responses=[FIRST, ""])["error"]
    assert error["field"] == "responses[1]"
    assert page.locator("#response-1-fault").inner_text() == f"Response B {error['message']}"
    assert page.evaluate("document.activeElement.id") == "response-1"
    assert page.get_attribute("#response-1", "aria-describedby") == "response-1-fault"
    page.fill("#response-1", SECOND)
    compare(page)
    assert page.locator(".fault:visible").count() == 0

    page.fill("#response-0", "word " * 400)
    assert "have changed" in page.locator("#status").inner_text()
    page.click("#compare")
    page.wait_for_selector("#response-0-fault:visible")
    assert "max_length=160" in page.locator("#response-0-fault").inner_text()

    page.fill("#response-0", FIRST)
    page.select_option("#prompt-as", "messages")
    page.click("#compare")
    page.wait_for_selector("#prompt-fault:visible")
    assert "not JSON" in page.locator("#prompt-fault").inner_text()


def test_a_prompt_is_sent_as_text_or_as_messages(server, open_page):
    page = open_page(server)
    messages = [{"role": "user", "content": PROMPT}]
    system = [{"role": "system", "content": "Be short."}, *messages]
    found = set()
    for kind, written, sent in (
        ("text", PROMPT, PROMPT),
        ("chat", PROMPT, messages),
        ("messages", json.dumps(system), system),
    ):
        write(page, written, FIRST, SECOND)
        page.select_option("#prompt-as", kind)
        compare(page)
        p = answer(server, "compare", prompt=sent, a=FIRST, b=SECOND)["p_a_better"]
        expect(page.locator("#result")).not_to_have_class("stale")
        assert values(page.locator(".odds"))[0] == close(p)
        found.add(p)
    assert len(found) == 3


def test_what_takes_a_while_says_so_and_a_later_question_takes_its_place(server, open_page):
    page = open_page(server)
    write(page, PROMPT, FIRST, SECOND)
    compare(page)
    gate = server.service.engine.scorer.gate
    gate.clear()
    try:
        page.fill("#response-1", "This one is dropped.")
        page.click("#compare")
        expect(page.locator("#status")).to_have_text("Comparing …")
        expect(page.locator("#result")).to_have_attribute("aria-busy", "true")
        page.fill("#response-1", THIRD)
        page.click("#compare")
    finally:
        gate.set()
    expect(page.locator(".tokens").nth(1)).to_contain_text(THIRD)
    expect(page.locator("#status")).to_be_empty()
    p = answer(server, "compare", prompt=PROMPT, a=FIRST, b=THIRD)["p_a_better"]
    assert values(page.locator(".odds"))[0] == close(p)


def test_a_server_that_does_not_answer_is_named(server, open_page):
    page = open_page(server)
    write(page, PROMPT, FIRST, SECOND)
    page.context.set_offline(True)
    page.click("#compare")
    page.wait_for_selector("#problem:visible")
    assert "does not answer" in page.locator("#problem").inner_text()
    page.context.set_offline(False)
    compare(page)
    assert page.locator("#problem").is_hidden()


def test_more_than_two_are_ranked(server, open_page):
    page = open_page(server)
    responses = [FIRST, SECOND, THIRD]
    write(page, PROMPT, *responses)
    compare(page)
    ranked = answer(server, "rank", prompt=PROMPT, responses=responses)["results"]
    assert values(page.locator(".ranking")) == close([each["reward"] for each in ranked])
    names = page.locator(".ranking tbody th").all_inner_texts()
    assert names == ["ABC"[each["index"]] for each in ranked]
    best, second, worst = (each["index"] for each in ranked)
    assert page.locator("h3", has_text="Response ").all_inner_texts() == [
        f"Response {'ABC'[i]}" for i in (best, second)
    ]
    page.locator(f"input[name=right][value='{worst}']").check()
    expect(page.locator("h2")).to_contain_text("ABC"[worst])
    pair = {"a": responses[best], "b": responses[worst]}
    found = answer(server, "compare", prompt=PROMPT, **pair)
    assert values(page.locator(".odds"))[0] == close(found["p_a_better"])
    page.click("[data-remove='2']")
    assert page.locator("#responses textarea").count() == 2


def test_a_judge_asks_for_its_key_and_shows_both_orders(locked_judge, open_page):
    page = open_page(locked_judge)
    page.wait_for_selector("#key:visible")
    page.fill("#api-key", "wrong")
    page.keyboard.press("Enter")
    page.wait_for_selector("#key:visible")
    page.fill("#api-key", KEY)
    page.keyboard.press("Enter")
    expect(page.locator("#model")).to_contain_text("judge")
    assert page.locator("#problem").is_hidden()
    write(page, PROMPT, FIRST, SECOND)
    compare(page)
    found = answer(locked_judge, "compare", KEY, prompt=PROMPT, a=FIRST, b=SECOND)
    assert found["rewards"] is None
    names = ("forward", "p_forward", "backward", "p_backward", "p_a_better")
    assert values(page.locator(".orders")) == close([found[name] for name in names])
    agree = (found["p_forward"] - 0.5) * (found["p_backward"] - 0.5) > 0
    said = page.locator("section section", has=page.locator(".orders")).inner_text()
    assert ("Both orders prefer" if agree else "orders disagree") in said
    assert "no log-prob of each token" in said
    assert page.locator(".token").count() == 0
    assert KEY not in page.url and not page.evaluate("JSON.stringify(localStorage)").count(KEY)

    write(page, PROMPT, FIRST, SECOND, THIRD)
    compare(page)
    page.wait_for_selector(".ranking")
    ranked = answer(locked_judge, "rank", KEY, prompt=PROMPT, responses=[FIRST, SECOND, THIRD])
    rewards = [each["reward"] for each in ranked["results"]]
    assert values(page.locator(".ranking")) == close(rewards)


def test_a_head_has_a_reward_and_no_tokens(head, open_page):
    page = open_page(head)
    write(page, PROMPT, FIRST, SECOND)
    compare(page)
    found = answer(head, "compare", prompt=PROMPT, a=FIRST, b=SECOND)
    for side, facts in enumerate(page.locator(".facts").all()):
        assert values(facts) == close([found["rewards"][side], found["num_tokens"][side]])
    assert values(page.locator(".odds"))[0] == close(found["p_a_better"])
    assert page.locator(".token").count() == 0
    assert "A head gives a response one number" in page.locator("#result").inner_text()


CONTRASTS = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const over = (colours) => {
    canvas.clearRect(0, 0, 1, 1);
    for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const light = (rgb) => {
    const [r, g, b] = rgb.map((v) => v / 255)
      .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (e) => getComputedStyle(e).backgroundColor;
  const behind = (e) => (e ? [...behind(e.parentElement), ground(e)] : []);
  const found = [];
  for (const e of document.querySelectorAll("body *")) {
    const writes = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!(writes || e.value) || !e.checkVisibility() || e.disabled || e.type === "radio") continue;
    const grounds = behind(e);
    const [x, y] = [over(grounds), over([...grounds, getComputedStyle(e).color])].map(light);
    const contrast = (Math.max(x, y) + 0.05) / (Math.min(x, y) + 0.05);
    found.push([contrast, e.id || e.className || e.tagName]);
  }
  return found;
}"""


def test_both_themes_can_be_read(server, open_page):
    grounds = {}
    for system in ("light", "dark"):
        page = open_page(server, color_scheme=system)
        write(page, PROMPT, FIRST, SECOND, "")
        page.click("#compare")
        page.wait_for_selector(".fault:visible")
        assert [each for each in page.evaluate(CONTRASTS) if each[0] < 4.5] == []
        page.click("[data-remove='2']")
        write(page, PROMPT, FIRST, SECOND)
        compare(page)
        page.locator(".token").nth(2).focus()
        ground = "getComputedStyle(document.body).backgroundColor"
        seen = []
        for choice in ("auto", "light", "dark"):
            assert page.evaluate("document.documentElement.dataset.theme") == choice
            seen.append(page.evaluate(ground))
            contrasts = page.evaluate(CONTRASTS)
            assert len(contrasts) > 60
            assert [each for each in contrasts if each[0] < 4.5] == []
            page.click("#theme")
            page.locator(".token").nth(2).focus()
        assert seen[0] == seen[1 if system == "light" else 2] and seen[1] != seen[2]
        grounds[system] = seen
        page.click("#theme")
        page.reload()
        assert page.evaluate("document.documentElement.dataset.theme") == "light"
    assert grounds["light"][1:] == grounds["dark"][1:]


def test_shades_go_one_way_so_that_they_need_no_colour_vision(server, open_page):
    for system in ("light", "dark"):
        page = open_page(server, color_scheme=system)
        write(page, PROMPT, FIRST, SECOND)
        compare(page)
        colours = page.locator(".swatch").evaluate_all(
            "all => all.map(e => getComputedStyle(e).backgroundColor.match(/\\d+/g).map(Number))"
        )
        lights = [0.2126 * r + 0.7152 * g + 0.0722 * b for r, g, b in colours]
        steps = [b - a for a, b in itertools.pairwise(lights)]
        assert len(lights) == 7
        assert all(step < -3 for step in steps) or all(step > 3 for step in steps)


NAMELESS = """() => [...document.querySelectorAll(
    "button, input, textarea, select, [role], [tabindex]")]
  .filter((e) => e.checkVisibility() && !["status", "alert", "tooltip"].includes(e.role))
  .filter((e) => !(e.ariaLabel || e.textContent.trim() && e.tagName === "BUTTON"
                   || [...(e.labels ?? [])].some((l) => l.textContent.trim())))
  .map((e) => e.outerHTML)"""


def test_everything_has_a_name_and_fits_a_narrow_screen(server, open_page):
    page = open_page(server)
    page.set_viewport_size({"width": 340, "height": 640})
    write(page, PROMPT, FIRST, "word" * 30, THIRD)
    compare(page)
    assert page.evaluate(NAMELESS) == []
    ids = page.locator("[id]").evaluate_all("all => all.map(e => e.id)")
    assert len(ids) == len(set(ids))
    assert page.locator("h1").count() == page.locator("main").count() == 1
    assert page.get_attribute("html", "lang") == "en"
    assert page.evaluate("document.documentElement.scrollWidth") <= 340
    room = "e => e.parentElement.clientWidth - e.offsetWidth"
    assert page.locator(".ranking").evaluate(room) >= 0  # its buttons are all in sight
