"""The playground page in Debian's Chromium, against a server of the demo model."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Error, Page, Route, expect, sync_playwright

from .server_process import ServerProcess, run_server

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="chromium is not installed; apt-get install chromium")
SECONDS = 1000


MARKUP = "<img src=x onerror=\"document.title='ran'\"><script>document.title='ran'</script>"
REPORT_VIOLATIONS = (
    "addEventListener('securitypolicyviolation', (event) => console.error(event.violatedDirective))"
)


@contextmanager
def open_page(server: ServerProcess) -> Iterator[Page]:
    """Open a server's page; fails on script errors, policy violations and requests to other hosts."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1180, "height": 1000})
        errors: list[str] = []
        page.add_init_script(REPORT_VIOLATIONS)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on(
            "request",
            lambda request: None if request.url.startswith(server.url) else errors.append(request.url),
        )
        page.goto(server.url)
        expect(page.locator("#method option")).not_to_have_count(0)
        yield page
        browser.close()
        assert errors == []


@pytest.fixture
def page(demo_server: ServerProcess) -> Iterator[Page]:
    with open_page(demo_server) as page:
        yield page


def num_chart_points(page: Page) -> int:
    """Number of tokens in the chart."""
    return int(page.locator("#chart path.weight").first.get_attribute("data-points") or 0)


def test_both_answers_stream_and_the_call_can_be_copied(page: Page) -> None:
    row = page.locator(".objective").first
    row.locator("input[type=range]").press("ArrowRight")
    expect(row.locator("input[type=number]")).to_have_value("0.75")
    page.fill("#max-tokens", "24")
    page.click("#run")
    expect(page.locator("#plain")).not_to_be_empty(timeout=20 * SECONDS)
    expect(page.locator("#steered .token")).not_to_have_count(0, timeout=20 * SECONDS)
    early = num_chart_points(page)
    expect(page.locator("#steered-status")).to_contain_text("finish", timeout=60 * SECONDS)
    expect(page.locator("#plain-status")).to_contain_text("finish", timeout=60 * SECONDS)
    assert 0 < early < num_chart_points(page) <= 24
    expect(page.locator("#chart path.weight")).to_have_count(2)
    plain, steered = (page.locator(side).text_content() for side in ("#plain", "#steered"))
    assert plain
    assert steered
    assert plain != steered
    page.locator("#steered .token").nth(2).hover()
    expect(page.locator("#detail tbody tr")).to_have_count(3)
    expect(page.locator("#detail")).to_contain_text("Token 3 of")
    page.focus("#steered")
    page.keyboard.press("End")
    expect(page.locator("#detail")).to_contain_text(f"Token {num_chart_points(page)} of")
    for button, run in (("#copy-curl", ["bash", "-c"]), ("#copy-python", [sys.executable, "-c"])):
        page.click(button)
        call = page.locator("#copied").text_content()
        assert call
        ended = subprocess.run([*run, call], capture_output=True, text=True, check=True, timeout=60)
        is_curl = button == "#copy-curl"
        copied_answer = (
            json.loads(ended.stdout)["choices"][0]["message"]["content"] if is_curl else ended.stdout[:-1]
        )
        assert copied_answer == steered


def test_the_stop_button_ends_the_requests_on_the_server(page: Page, demo_server: ServerProcess) -> None:
    page.fill("#max-tokens", "2000")
    page.fill("#temperature", "1")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#steered .token")).not_to_have_count(0, timeout=20 * SECONDS)
    page.click("#stop")
    expect(page.locator("#steered-status")).to_contain_text("stopped")
    page.wait_for_timeout(SECONDS)
    assert demo_server.metric("num_requests_running") == 0


def test_objectives_can_be_added_and_removed_and_errors_are_shown_in_place(page: Page) -> None:
    page.click("#add")
    expect(page.locator(".objective")).to_have_count(3)
    for _ in range(3):
        page.locator(".objective .remove").first.click()
    page.fill("#max-tokens", "3")
    page.click("#run")
    expect(page.locator("#steered-error")).to_contain_text("needs an objective")
    expect(page.locator("#plain-status")).to_contain_text("finish", timeout=30 * SECONDS)


def test_the_page_fits_a_phone_in_light_and_dark(page: Page) -> None:
    page.set_viewport_size({"width": 360, "height": 740})
    colours = set()
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
        colours.add(page.evaluate("getComputedStyle(document.body).color"))
        assert page.evaluate("document.documentElement.scrollWidth") == 360
    assert len(colours) == 2
    unlabelled = "[...document.querySelectorAll('input, select, textarea')].filter(e => !e.labels.length)"
    assert page.evaluate(f"{unlabelled}.filter(e => !e.ariaLabel).length") == 0


def test_generated_text_is_never_rendered_as_markup(tiny_folder: Path) -> None:
    """The model name, answers, objectives and errors are shown literally."""

    def with_markup(route: Route) -> None:
        """Fulfil the call with the server's answer, each token replaced by markup."""
        lines = route.fetch().text().split("\n\n")
        chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        for choice in (choice for chunk in chunks for choice in chunk["choices"]):
            for trace in filter(None, [choice.get("trace")]):
                trace["tokens"] = [MARKUP for _ in trace["tokens"]]
            if choice["delta"].get("content"):
                choice["delta"]["content"] = MARKUP
        sent = [*(f"data: {json.dumps(chunk)}" for chunk in chunks), "data: [DONE]", ""]
        route.fulfill(body="\n\n".join(sent), content_type="text/event-stream")

    with (
        run_server("--model", str(tiny_folder), "--served-model-name", MARKUP) as server,
        open_page(server) as page,
    ):
        expect(page.locator("#model")).to_have_text(f"The model is {MARKUP}.")
        page.locator(".objective input[type=text]").first.fill(MARKUP)
        page.fill("#max-tokens", "3")
        page.route("**/v1/chat/completions", with_markup)
        page.click("#run")
        expect(page.locator("#steered-status")).to_contain_text("finish", timeout=60 * SECONDS)
        expect(page.locator("#plain-status")).to_contain_text("finish", timeout=60 * SECONDS)
        page.locator("#steered .token").first.hover()
        for selector in ("#plain", "#steered", "#legend", "#detail"):
            expect(page.locator(selector)).to_contain_text(MARKUP)
        page.unroute("**/v1/chat/completions")
        error = f"data: {json.dumps({'error': {'message': MARKUP}})}\n\n"
        page.route("**/v1/chat/completions", lambda route: route.fulfill(body=error))
        page.click("#run")
        expect(page.locator("#steered-error")).to_have_text(MARKUP)
        page.wait_for_timeout(SECONDS / 5)
        assert page.title() == "trimtab playground"
        assert page.locator("img, script:not([src='page.js'])").count() == 0


def test_the_content_security_policy_blocks_injected_code(demo_server: ServerProcess) -> None:
    """The browser refuses strings as HTML or script, other hosts, images and inline styles."""
    fails = "addEventListener('securitypolicyviolation', (event) => no(Error(event.violatedDirective)))"
    slips = {
        "document.body.innerHTML = '<b>x</b>'": "TrustedHTML",
        "document.createElement('script').text = '1'": "TrustedScript",
        f"new Promise((_, no) => {{ {fails}; fetch('http://127.0.0.1:9/').catch(() => 0); }})": "connect-src",
        f"new Promise((_, no) => {{ {fails}; new Image().src = '/x'; }})": "img-src",
        f"new Promise((_, no) => {{ {fails}; document.body.setAttribute('style', 'top: 0'); }})": "style-src",
    }
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        for slip, reason in slips.items():
            page.goto(demo_server.url)
            with pytest.raises(Error, match=reason):
                page.evaluate(f"() => {slip}")
        browser.close()
