"""The site in a real browser: no page asks another host, formulas are drawn, nothing is wider than a phone."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = shutil.which("chromium")


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")
def test_pages_ask_no_other_host_and_draw_their_formulas(tmp_path):
    playwright = pytest.importorskip("playwright.sync_api")
    build = [sys.executable, "-m", "mkdocs", "build", "-q", "--strict", "--site-dir", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    with playwright.sync_playwright() as p:
        page = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"]).new_page(
            viewport={"width": 390, "height": 800}
        )
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        for name in sorted(path.stem for path in (ROOT / "docs").glob("*.md")):
            page.goto((tmp_path / f"{name}.html").as_uri(), wait_until="load")
            assert page.evaluate("document.documentElement.scrollWidth") <= 390, name
            assert page.locator(".arithmatex").count() == 0, name
            if name == "kl":
                assert page.locator("math").count() > 50
                assert page.locator("math").first.bounding_box()["height"] > 5
    assert len(asked) > 20
    assert not [url for url in asked if not url.startswith(("file:", "data:", "blob:"))]
