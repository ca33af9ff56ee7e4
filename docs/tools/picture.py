"""The README's picture of a report: its results, its charts and a sample, beside each other.

fastmem fit-predict --config demo,all-methods --run_dir runs/picture
fastmem report runs/picture --title "FastMem demo"
python docs/tools/picture.py runs/picture/report.html docs/assets/report.png
"""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

# Of each picture beside the other, in pixels of the page.
SIZE = (1120, 980)
BETWEEN, SHOWN_WIDTH = 24, 1680


def shot(page: Page, selector: str) -> Image.Image:
    """What a reader sees who has scrolled to an element."""
    page.locator(selector).first.evaluate("element => element.scrollIntoView({block: 'start'})")
    page.wait_for_timeout(300)
    return Image.open(io.BytesIO(page.screenshot()))


def main(report: Path, target: Path) -> None:
    """Write the picture."""
    browser_path = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        size = {"width": SIZE[0], "height": SIZE[1]}
        page = browser.new_page(viewport=size, reduced_motion="reduce")
        page.goto(report.resolve().as_uri())
        parts = [shot(page, selector) for selector in ("body", "#charts", "#samples")]
        browser.close()
    whole = Image.new("RGB", (len(parts) * (SIZE[0] + BETWEEN) - BETWEEN, SIZE[1]), "#c8ccd0")
    for place, part in enumerate(parts):
        whole.paste(part, (place * (SIZE[0] + BETWEEN), 0))
    height = round(whole.height * SHOWN_WIDTH / whole.width)
    whole.resize((SHOWN_WIDTH, height), Image.Resampling.LANCZOS).save(target, optimize=True)
    print(f"{target}: {target.stat().st_size / 1000:.0f} KB")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
