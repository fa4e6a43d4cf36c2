"""What tests of the server's page do in a browser; without Playwright, they are left out."""

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright: see CONTRIBUTING.md")
expect = sync_api.expect
expect.set_options(timeout=600_000)  # pytest has a time-out, which knows how slow a machine may be


def origin(server):
    return f"http://127.0.0.1:{server.port}/"


def answer(server, route, key="", **body):
    """What the server says to another client; an error, too."""
    return server.post(f"/gram/v1/{route}", body, {"X-API-Key": key.encode()})[1]


def write(page, prompt, *responses):
    page.fill("#prompt", prompt)
    while page.locator("#responses textarea").count() < len(responses):
        page.click("#add")
    for place, text in enumerate(responses):
        page.fill(f"#response-{place}", text)


def compare(page):
    page.click("#compare")
    page.wait_for_selector("#result:not([aria-busy])")
    assert page.locator(".fault:visible, #problem:visible").all_inner_texts() == []


def values(locator):
    """The exact numbers behind those that are shown."""
    return locator.locator("data").evaluate_all("all => all.map(e => Number(e.value))")


def close(numbers):
    """Equal to float32 rounding, which is what may depend on other requests."""
    return pytest.approx(numbers, rel=1e-5, abs=1e-5)
