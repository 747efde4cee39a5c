"""The playground, in a real browser without a display."""

import os
import shutil

import pytest

pytest.importorskip("transformers", minversion="5.20")
for needed in ("fastapi", "uvicorn", "prometheus_client"):
    pytest.importorskip(needed)
playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")


@pytest.fixture(scope="module")
def browser():
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with playwright.sync_playwright() as running:
        try:
            launched = running.chromium.launch(executable_path=found, args=["--no-sandbox"] if os.getuid() == 0 else [])
        except playwright.Error as error:
            pytest.skip(f"no chromium: apt-get install chromium, or playwright install chromium ({str(error)[:60]})")
        yield launched
        launched.close()


@pytest.fixture
def page(browser):
    opened = browser.new_page()
    opened.complaints = []
    opened.on("pageerror", lambda error: opened.complaints.append(str(error)))
    yield opened
    assert not opened.complaints
    opened.close()


def ask(page, text, count):
    page.fill("#prompt", text)
    page.click("#send")
    page.wait_for_function(f"document.querySelectorAll('#chat p').length >= {count}", timeout=30_000)
    page.wait_for_selector("#send:not([disabled])", timeout=30_000)


def test_choose_mix_and_chat(page, serving):
    with serving(names=("fr", "de")) as served:
        page.goto(served.url)
        page.wait_for_selector("#adapters div")
        assert [text.strip() for text in page.locator("#adapters label").all_inner_texts()] == ["fr", "de"]
        assert page.inner_text("#model") == "base"
        page.fill("#tokens", "24")
        page.fill("#temperature", "0")
        page.check("#adapters div:nth-child(1) input[type=checkbox]")
        assert page.inner_text("#model") == "fr"
        ask(page, "Hello <b>there</b>", 2)
        assert page.inner_text("#chat p.user") == "Hello <b>there</b>"
        assert page.locator("#chat p.assistant").count() == 1
        assert "tokens/s" in page.inner_text("#speed")
        page.check("#adapters div:nth-child(2) input[type=checkbox]")
        page.locator("#adapters div:nth-child(2) input[type=range]").fill("0.4")
        assert page.inner_text("#model") == "fr*1+de*0.4"
        ask(page, "And again", 4)
        assert page.locator("#chat p.assistant").count() == 2 and not page.locator("#chat p.error").count()
        page.click("#clear")
        assert not page.locator("#chat p").count()


def test_stop_and_errors(page, serving):
    with serving(names=("fr",), api_key="secret") as served:
        page.goto(served.url)
        page.wait_for_selector("#chat p.error")
        page.fill("#key", "secret")
        page.dispatch_event("#key", "change")
        page.wait_for_selector("#adapters div")
        page.click("#clear")
        page.fill("#tokens", "100000")
        ask(page, "too much", 2)
        assert "100000" in page.inner_text("#chat p.error")
        page.click("#clear")
        page.fill("#tokens", "400")
        page.fill("#prompt", "go on")
        page.click("#send")
        page.wait_for_selector("#chat p.assistant")
        page.click("#stop")
        page.wait_for_selector("#send:not([disabled])")
        for _ in range(200):
            if served.engine.counts() == (0, 0):
                break
            page.wait_for_timeout(50)
        assert served.engine.counts() == (0, 0)
