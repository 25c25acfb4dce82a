"""The web console in a real browser, before real workers: a chat, what it cost, and why each worker was chosen."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
from collections.abc import Iterator
from typing import Literal

import pytest

from tests.support.stack import Stack

pytestmark = pytest.mark.e2e

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MISSING = CHROMIUM is None or importlib.util.find_spec("playwright") is None
DEADLINE_MS = 60_000

if MISSING and os.environ.get("CI") != "true":
    pytest.skip("chromium and playwright are not installed", allow_module_level=True)

from playwright.sync_api import Page, Route, expect, sync_playwright  # noqa: E402


@pytest.fixture(scope="module")
def page(disaggregated: Stack) -> Iterator[Page]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(DEADLINE_MS)
        problems: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.goto(disaggregated.url)
        expect(page.locator("#state")).to_contain_text("is ready", timeout=DEADLINE_MS)
        yield page
        browser.close()
    assert problems == []


def answer(page: Page, number: int) -> str:
    """The text of an answer, once it has ended."""
    item = page.locator("#messages li.assistant").nth(number)
    expect(item.locator("small")).to_contain_text("tokens", timeout=DEADLINE_MS)
    return item.inner_text()


def test_chat_streams_and_says_what_it_cost(page: Page) -> None:
    page.locator("#prompt").fill("What is gravity?")
    page.locator("#prompt").press("Enter")
    first = answer(page, 0)
    assert "physics" in first
    assert "first token" in first
    page.locator("#prompt").fill("Who described it first?")
    page.locator("#send").click()
    assert "from device" in answer(page, 1), "the conversation so far is cached"


def test_record_explains_each_choice(page: Page) -> None:
    record = page.locator("#record")
    expect(record).to_contain_text("compute", timeout=DEADLINE_MS)
    expect(record).to_contain_text("transfer")
    expect(record).to_contain_text("prompt: prefill-0, by policy cost")
    expect(record).to_contain_text("decode: decode-0, by policy cost")
    expect(page.locator("#requests tbody tr").first).to_contain_text("prefill-0 → decode-0")
    expect(page.locator("#links")).to_contain_text("posix/memory")


def test_the_cluster_view_shows_pools_tiers_goodput_and_queue(page: Page) -> None:
    expect(page.locator("#workers .pool-bar")).to_have_count(2, timeout=DEADLINE_MS)
    expect(page.locator("#workers")).to_contain_text("cached")
    expect(page.locator("#tiers")).to_contain_text("device")
    expect(page.locator("#classes tbody tr").filter(has_text="standard")).to_contain_text(re.compile(r"\d+ of \d+"))
    expect(page.locator("#admission")).to_contain_text("Admission: shadow.")
    expect(page.locator("#links")).to_contain_text("GB/s")


def test_an_operator_drains_a_worker_by_keyboard_and_uses_it_again(page: Page) -> None:
    """No key is configured, and the browser is on this machine."""
    page.get_by_role("button", name="Drain decode-0").focus()
    page.keyboard.press("Enter")
    again = page.get_by_role("button", name="Use again decode-0")
    expect(again).to_be_visible(timeout=DEADLINE_MS)
    expect(page.locator("#operator")).to_contain_text("decode-0 gets nothing new")
    again.click()
    expect(page.get_by_role("button", name="Drain decode-0")).to_be_visible(timeout=DEADLINE_MS)
    expect(page.locator("#state")).to_contain_text("is ready")


def test_without_trust_there_is_nothing_to_press_until_the_key_is_given(page: Page) -> None:
    """As a router with a key answers; the real check is in tests/router/http/test_operations.py."""

    def answer_admin(route: Route) -> None:
        route.fulfill(json={"trusted": route.request.headers.get("x-pdserve-admin-key") == "secret"})

    page.route("**/admin", answer_admin)
    expect(page.get_by_role("button", name="Drain")).to_have_count(0, timeout=DEADLINE_MS)
    page.locator("#key-box summary").click()
    page.locator("#key").fill("secret")
    page.locator("#key").press("Enter")
    expect(page.get_by_role("button", name="Drain")).to_have_count(2, timeout=DEADLINE_MS)
    page.unroute("**/admin")


def test_what_a_client_says_is_text_and_never_markup(page: Page) -> None:
    page.locator("#prompt").fill("<img src=x onerror=alert(1)><b>bold</b>")
    page.locator("#prompt").press("Enter")
    answer(page, 2)
    assert page.locator("#messages img, #messages b").count() == 0
    expect(page.locator("#messages li.user").nth(2)).to_have_text("<img src=x onerror=alert(1)><b>bold</b>")


def test_stop_ends_an_answer(page: Page) -> None:
    page.locator("#ask details summary").click()
    page.locator("#max-tokens").fill("2000")
    page.locator("#temperature").fill("1")
    page.locator("#prompt").fill("Tell a very long story.")
    page.locator("#prompt").press("Enter")
    item = page.locator("#messages li.assistant").nth(3)
    expect(item).not_to_have_text("")
    page.locator("#stop").click()
    expect(item.locator("small")).to_have_text("stopped")


def test_phone_width_needs_no_sideways_scrolling(page: Page) -> None:
    page.set_viewport_size({"width": 390, "height": 844})
    for path in ("", "/docs"):
        page.goto(page.url.rstrip("/") + path)
        expect(page.locator("#state, #operations details").first).to_be_visible()
        for box in page.locator("#operations details").all():
            box.evaluate("each => { each.open = true; }")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, path


@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_text_stands_out_in_both_schemes(page: Page, scheme: Literal["dark", "light"]) -> None:
    page.emulate_media(color_scheme=scheme)
    ink, paper = page.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    )
    assert contrast(ink, paper) > 7, "WCAG's AAA"


def contrast(*colours: str) -> float:
    def luminance(colour: str) -> float:
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    darker, lighter = sorted(luminance(colour) for colour in colours)
    return (lighter + 0.05) / (darker + 0.05)
