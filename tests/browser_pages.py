"""Pages in a headless browser that remember what they asked for and what went wrong, and questions to ask them."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def opened(browser: Any, place: Path | str, width: int = 1280, scheme: str = "light") -> Any:
    """A page at a file or an address, with `troubles` and `requests`. At 390 it is a phone with a touch screen."""
    phone = width < 600
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme, has_touch=phone, is_mobile=phone
    )
    page = context.new_page()
    page.troubles, page.requests = [], []
    page.on("pageerror", lambda error: page.troubles.append(str(error)))
    page.on("console", lambda message: page.troubles.append(message.text) if message.type == "error" else None)
    page.on("dialog", lambda dialog: (page.troubles.append(f"a dialog: {dialog.message}"), dialog.dismiss()))
    page.on("request", lambda request: page.requests.append(request.url))
    page.goto(place.as_uri() if isinstance(place, Path) else place)
    return page


def shades(page: Any) -> tuple[float, float]:
    """Brightness of the ground and of the ink, 0 (black) to 1 (white)."""
    return tuple(page.evaluate(
        """() => ["backgroundColor", "color"].map((key) => getComputedStyle(document.body)[key]
            .match(/[0-9.]+/g).slice(0, 3).reduce((sum, part) => sum + Number(part), 0) / 765)"""))  # fmt: skip


def covered(page: Any, selector: str) -> list[str]:
    """Texts of the elements that something else lies on, or that reach out of the window sideways."""
    return page.evaluate(
        """(selector) => [...document.querySelectorAll(selector)].filter((found) => {
            found.scrollIntoView({ block: "center" });
            const box = found.getBoundingClientRect();
            if (box.left < -1 || box.right > document.documentElement.clientWidth + 1) return true;
            const at = document.elementFromPoint(box.left + Math.min(box.width / 2, 30), box.top + box.height / 2);
            return at && !found.contains(at) && !at.contains(found);
        }).map((found) => found.textContent)""",
        selector,
    )  # fmt: skip
