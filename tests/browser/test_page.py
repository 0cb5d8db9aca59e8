"""The page at `/` in a real browser: typed, ranked, shown; `make test-browser`, with a Chromium that is installed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from bench.serving import serving
from lastrerank import Reranker
from lastrerank.cli import default_model

playwright = pytest.importorskip("playwright.sync_api")

BROWSER = os.environ.get("BROWSER_PATH") or next(
    filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None
)
SCREENSHOT = Path(__file__).parent.parent.parent / "bench" / "results" / "page.png"


@pytest.fixture(scope="module")
def address():
    with serving() as (address, _):
        yield f"{address}/"


@pytest.fixture(scope="module")
def page(address):
    if BROWSER is None:
        pytest.skip("no Chromium here: install one, or name it in BROWSER_PATH")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 900, "height": 900})
        page.requests = []
        page.on("request", lambda request: page.requests.append(request.url))
        page.goto(address)
        yield page
        browser.close()


def test_a_person_ranks_documents(page, address):
    documents = ["To print, press Ctrl+P.", "Cells hold numbers.", "<b>bold</b> & \"quoted\"\nover two lines"]
    page.fill("#query", "how do I print")
    page.fill("#documents", "\n\n".join(documents))
    page.click("#go")
    page.wait_for_selector("#results li")
    shown = page.eval_on_selector_all("#results li", "items => items.map(i => i.firstChild.textContent)")
    scores = [float(text) for text in page.eval_on_selector_all(".score", "items => items.map(i => i.textContent)")]
    expected = Reranker.from_pretrained(default_model()).rerank("how do I print", documents)
    assert shown == [r["document"] for r in expected]  # text stays text
    assert scores == pytest.approx([r["relevance_score"] for r in expected], abs=1e-4)
    widths = page.eval_on_selector_all(".bar > div", "items => items.map(i => parseFloat(i.style.width))")
    assert widths == pytest.approx([50 * (1 + s) for s in scores], abs=0.01)
    assert "inference" in page.inner_text("#status") and "tokens" in page.inner_text("#status")
    assert all(url.startswith(address) for url in page.requests), page.requests  # nothing from elsewhere
    page.screenshot(path=SCREENSHOT)


def test_an_error_is_shown(page):
    page.fill("#documents", "x")
    page.evaluate("document.getElementById('query').removeAttribute('required')")
    page.fill("#query", "")
    page.click("#go")
    page.wait_for_selector("#status.error")
    assert "query" in page.inner_text("#status") and page.is_enabled("#go")
