"""The documentation site in a real browser: nothing is asked of another host, formulas are drawn, phones can read."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PAGES = sorted(path.stem for path in (ROOT / "docs").glob("*.md"))
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium on PATH")

LOOK = """() => {
    const article = document.querySelector("article");
    const box = element => element.getBoundingClientRect();
    const shade = color => color.match(/[0-9.]+/g).slice(0, 3).reduce((sum, part) => sum + Number(part), 0) / 765;
    const text = article.cloneNode(true);
    text.querySelectorAll("code, pre, math").forEach(element => element.remove());
    return {
        title: article.querySelector("h1")?.innerText ?? "",
        scrolls: document.documentElement.scrollWidth - document.documentElement.clientWidth,
        formulas: [...article.querySelectorAll("math")].map(m => Math.min(box(m).width, box(m).height)),
        raw: text.innerText.match(/\\\\[([]|\\$[^$]+\\$/g) ?? [],
        broken: [...article.querySelectorAll("img")].filter(i => !i.naturalWidth).map(i => i.src),
        ground: shade(getComputedStyle(document.body).backgroundColor),
        ink: shade(getComputedStyle(article).color),
    };
}"""


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    pytest.importorskip("mkdocs")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator:
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1400, "light")])
def test_every_page_reads_by_itself(site, browser, width, scheme):
    """No request leaves, no formula is raw or empty, no figure is missing, no page scrolls sideways, dark is dark."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    asked: list[str] = []
    context.on("request", lambda request: asked.append(request.url))
    context.route(lambda url: not url.startswith("file:"), lambda route: route.abort())
    page = context.new_page()
    formulas = 0
    for name in PAGES:
        page.goto((site / f"{name}.html").as_uri())
        seen = page.evaluate(LOOK)
        assert seen["title"], name
        assert seen["scrolls"] <= 0, f"{name} is {seen['scrolls']} px wider than a window of {width}"
        assert not seen["raw"], name
        assert not seen["broken"], name
        assert all(size > 2 for size in seen["formulas"]), name
        light = seen["ground"] if scheme == "light" else seen["ink"]
        dark = seen["ink"] if scheme == "light" else seen["ground"]
        assert light - dark > 0.4, f"{name}, {scheme}: ground {seen['ground']:.2f}, ink {seen['ink']:.2f}"
        formulas += len(seen["formulas"])
    context.close()
    assert formulas > 20
    assert len(asked) > len(PAGES)
    assert not [url for url in asked if not url.startswith(("file:", "data:", "blob:"))]


def test_search_works_from_the_file_system(site, browser):
    """A word of one page is typed into the search box. The first result leads to that page, without a request."""
    context = browser.new_context(viewport={"width": 1400, "height": 900})
    page, asked = context.new_page(), []
    page.on("request", lambda request: asked.append(request.url))
    page.goto((site / "index.html").as_uri())
    page.locator(".md-search__input").click()
    page.keyboard.type("Sinkhorn", delay=50)
    result = page.locator(".md-search-result__item a").first
    result.wait_for(timeout=20_000)
    result.click()
    page.wait_for_url("**/optimal-transport.html*")
    context.close()
    assert all(url.startswith("file:") for url in asked), asked
