"""Take the picture of a report that stands in the README: its beginning in light, its heatmap in dark.

python docs/picture.py report.html docs/report.png    # needs playwright, pillow and a Chromium
"""

import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

WIDTH, HEIGHT = 1060, 1760


def main(page: Path, picture: Path) -> None:
    """Write the picture of a page."""
    halves = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for scheme, first in (("light", "header.top"), ("dark", "#conflicts")):
            view = browser.new_page(
                color_scheme=scheme, viewport={"width": WIDTH, "height": HEIGHT}, device_scale_factor=1.5
            )
            view.goto(page.resolve().as_uri())
            view.add_style_tag(content="html { scroll-behavior: auto !important } nav { position: static !important }")
            view.evaluate("(s) => scrollTo(0, document.querySelector(s).getBoundingClientRect().top - 14)", first)
            view.wait_for_timeout(200)
            halves.append(Image.open(io.BytesIO(view.screenshot())).convert("RGB"))
        browser.close()
    whole = Image.new("RGB", (sum(h.width for h in halves), halves[0].height))
    for i, half in enumerate(halves):
        whole.paste(half, (i * half.width, 0))
    small = whole.resize((1800, round(whole.height * 1800 / whole.width)), Image.Resampling.LANCZOS)
    small.quantize(160, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(picture, optimize=True)
    print(f"{picture}: {picture.stat().st_size / 1024:.0f} KB")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
