"""The page where a server has no room, or texts do not fit."""

import json
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
from live_server import live
from page_actions import answer, close, compare, expect, values, write

pytestmark = pytest.mark.timeout(600)

PROMPT = "How do I sort a list?"
FIRST, SECOND, LONG = "Call list.sort().", "Use bubble sort.", "word " * 400


@pytest.fixture(scope="module")
def small(make_scorer):
    """A server that takes one request at once, and so less than the page asks."""
    with live(make_scorer("likelihood", batch_rows=1), waiting=1) as found:
        yield found


class Occupied:
    """A server whose one place is taken until the block ends."""

    def __init__(self, server):
        self._server, self._pool = server, ThreadPoolExecutor(1)
        self._gate = server.service.engine.scorer.gate

    def __enter__(self):
        self._gate.clear()
        ask = answer, self._server, "score"
        self._call = self._pool.submit(*ask, prompt=PROMPT, response=FIRST)
        while not self._server.service.engine.batcher._taken:
            assert not self._call.done(), self._call.result()
        return self

    def __exit__(self, *_):
        self._gate.set()
        assert "results" in self._call.result()
        self._pool.shutdown()


def test_a_full_server_is_asked_again_until_it_has_room(small, open_page):
    page = open_page(small)
    posted = []
    page.on("request", lambda r: r.method == "POST" and posted.append(json.loads(r.post_data)))
    with Occupied(small):
        write(page, PROMPT, FIRST, "This one is dropped.")
        page.click("#compare")
        waiting = re.compile(r"The server is busy\. Asking again in \d+ s …")
        expect(page.locator("#status")).to_have_text(waiting)
        expect(page.locator("#result")).to_have_attribute("aria-busy", "true")
        assert page.locator("#problem").is_hidden()
        write(page, PROMPT, FIRST, SECOND)
        page.click("#compare")
        before = len(posted)
        while len(posted) < before + 4:  # it asks two things at once: each of them once more
            page.wait_for_timeout(50)
        expect(page.locator("#status")).to_have_text(waiting)
    page.wait_for_selector("#result:not([aria-busy]) h2")
    assert page.locator(".fault:visible, #problem:visible").count() == 0
    assert page.locator("#status").inner_text() == ""
    found = answer(small, "compare", prompt=PROMPT, a=FIRST, b=SECOND)
    assert values(page.locator(".odds"))[0] == close(found["p_a_better"])
    assert not any("dropped" in json.dumps(body) for body in posted[before:])


def test_a_server_that_is_full_for_long_says_for_how_long(small, open_page):
    page = open_page(small)
    batcher = small.service.engine.batcher
    write(page, PROMPT, FIRST, SECOND)
    compare(page)  # so that it knows how fast it is
    with Occupied(small):
        usual = batcher.waiting_tokens
        batcher.waiting_tokens = 1000 * max(batcher._speed, 1)  # as of many requests before it
        try:
            page.click("#compare")
            page.wait_for_selector("#problem:visible")
        finally:
            batcher.waiting_tokens = usual
        said = page.locator("#problem").inner_text()
        assert re.fullmatch(r"1 requests are waiting already\. Try again in \d{3,} s\.", said)
        assert page.locator("#status").inner_text() == ""
        assert not page.get_attribute("#result", "aria-busy")
    compare(page)
    assert page.locator(".token").count() > 0


def test_a_fault_ends_what_else_was_asked_for_it(small, open_page):
    page = open_page(small)
    posted = []
    page.on("request", lambda r: r.method == "POST" and posted.append(r.url))
    write(page, PROMPT, FIRST, "")
    page.click("#compare")
    page.wait_for_selector("#response-1-fault:visible")
    before = len(posted)
    page.wait_for_timeout(2500)  # more than a refused one waits
    assert len(posted) == before


@pytest.mark.parametrize("reading", ["likelihood", "judge"])
def test_that_something_was_cut_to_fit_is_said(make_scorer, open_page, reading):
    with live(make_scorer(reading, batch_rows=1, too_long="truncate")) as cutting:
        page = open_page(cutting)
        notice = page.locator("#result .notice")
        write(page, PROMPT, FIRST, SECOND)
        compare(page)
        assert notice.count() == 0
        write(page, PROMPT, FIRST, SECOND, LONG)
        compare(page)
        said = "Something was cut to fit max_length=160"
        assert said in notice.inner_text()
        # Also where the two that are compared are whole: the ranking is not.
        page.check("input[name=left][value='0']")
        page.wait_for_selector("#result:not([aria-busy])")
        page.check("input[name=right][value='1']")
        page.wait_for_selector("#result:not([aria-busy])")
        found = answer(cutting, "compare", prompt=PROMPT, a=FIRST, b=SECOND)
        assert not found["truncated"]
        expect(page.locator("h3", has_text="Response ")).to_have_text(["Response A", "Response B"])
        assert values(page.locator(".odds"))[0] == close(found["p_a_better"])
        assert said in notice.inner_text()
        page.click("[data-remove='2']")
        compare(page)
        assert notice.count() == 0
