"""Reports in a real browser: they open fast and quietly, show exact numbers under the pointer, and fit every screen.

Needs playwright (`pip install playwright`) and a Chromium of the system's:
`python -m pytest -m slow tests/e2e/test_browser.py`.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from reconmtl.conflicts import ConflictLog
from reconmtl.reporting import report
from reconmtl.reporting.windows import Windows
from studies import network_names, write_study

api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
QUIET += ["--disable-background-networking", "--disable-component-update"]

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")]


@dataclass
class Shown:
    """A page in a browser, and what it complained about."""

    page: Any
    complaints: list[str] = field(default_factory=list)

    def tip(self) -> str:
        return str(self.page.locator("#tip").inner_text()).replace("\u00a0", " ")

    def text(self, selector: str) -> str:
        return str(self.page.locator(selector).inner_text()).replace("\u00a0", " ")

    def point(self, selector: str, column: float, row: float, *, click: bool = False) -> None:
        """Move to a place in an element, in shares of its size."""
        element = self.page.locator(selector)
        element.scroll_into_view_if_needed()
        self.page.wait_for_timeout(50)
        box = element.bounding_box()
        x, y = box["x"] + box["width"] * column, box["y"] + box["height"] * row
        self.page.mouse.move(x, y)
        if click:
            self.page.mouse.click(x, y)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


def show(chromium: Any, path: Path, *, dark: bool = False, width: int = 1200, touch: bool = False) -> Shown:
    context = chromium.new_context(
        color_scheme="dark" if dark else "light", viewport={"width": width, "height": 900}, has_touch=touch
    )
    shown = Shown(context.new_page())
    shown.page.on("console", lambda m: shown.complaints.append(m.text) if m.type in ("error", "warning") else None)
    shown.page.on("pageerror", lambda e: shown.complaints.append(str(e)))
    shown.page.on("dialog", lambda d: shown.complaints.append(f"dialog {d.message}"))
    shown.page.on("request", lambda r: shown.complaints.append(r.url) if not r.url.startswith("file:") else None)
    shown.page.goto(path.as_uri())
    return shown


def fits(page: Any) -> bool:
    """Whether nothing sticks out, with everything unfolded and nothing cut off at the sides."""
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    page.add_style_tag(content="html, body, main, section { overflow-x: visible !important }")
    return bool(page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth"))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real study of two tasks, by the command line."""
    folder = tmp_path_factory.mktemp("two")
    command = (
        "run multifashion --epochs 2 --width 4 --batch-size 256 --seeds 0 --methods single joint recon --out study"
    )
    done = subprocess.run(
        [sys.executable, "-m", "reconmtl", *command.split()], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder / "study"


@pytest.fixture(scope="module")
def forty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tasks = [f"attribute_{i:02d}" for i in range(40)]
    return write_study(tmp_path_factory.mktemp("forty"), tasks=tasks, layers=network_names(40), steps=320)


@pytest.mark.parametrize("tasks", [2, 40])
@pytest.mark.parametrize(("dark", "width"), [(False, 1200), (True, 1200), (False, 390), (True, 390)])
def test_it_opens_fast_and_quietly_on_every_screen(
    chromium: Any, tasks: int, dark: bool, width: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    study = request.getfixturevalue("two" if tasks == 2 else "forty")
    path = report(study, to=tmp_path / "r.html")
    assert path.stat().st_size <= 3 * 2**20
    shown = show(chromium, path, dark=dark, width=width, touch=width < 800)
    entry = "performance.getEntriesByType('navigation')[0]"
    shown.page.wait_for_function(f"{entry}.loadEventEnd > 0")
    assert shown.page.evaluate(f"{entry}.loadEventEnd") <= 2000
    assert shown.page.evaluate("document.documentElement.scrollWidth") <= width  # nothing sticks out
    for key in (
        "comparison",
        "plan",
        "conflicts",
        "scores",
        "cosines",
        "training",
        "chance",
        "stability",
        "reading",
        "reproduce",
    ):
        assert shown.page.locator(f"section#{key}").count() == 1, key
    assert shown.page.locator("section .conclusion").count() == 8
    for key in ("plan", "conflicts", "scores", "cosines", "training", "chance", "stability"):
        assert shown.page.locator(f"#{key} svg").count() >= 1, key
    ink, paper = (
        shown.page.evaluate(f"getComputedStyle(document.body).{name}") for name in ("color", "backgroundColor")
    )
    light = [sum(int(v) for v in c.strip("rgba()").split(",")[:3]) for c in (ink, paper)]
    assert (light[0] > light[1]) is dark and abs(light[0] - light[1]) > 400
    for kind in (".area .end", ".area .xt", ".cells .xticks span", ".gain .xticks span"):
        assert not overlapping(shown, kind), kind
    assert shown.complaints == []


def overlapping(shown: Shown, selector: str) -> list[str]:
    """Texts of one plot that lie upon one another."""
    found: list[str] = shown.page.evaluate(
        """(selector) => {
            const out = [];
            for (const parent of new Set([...document.querySelectorAll(selector)].map((e) => e.parentElement))) {
                const boxes = [...parent.querySelectorAll(':scope > ' + selector.split(' ').pop())].map((e) => [
                    e.getBoundingClientRect(), e.textContent]);
                for (let i = 0; i < boxes.length; i++) for (let j = i + 1; j < boxes.length; j++) {
                    const [a, b] = [boxes[i][0], boxes[j][0]];
                    if (a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 1 && b.top < a.bottom - 1)
                        out.push(boxes[i][1] + ' / ' + boxes[j][1]);
                }
            }
            return out;
        }""",
        selector,
    )
    return found


def test_the_pointer_shows_exact_numbers_of_two_tasks(chromium: Any, two: Path, tmp_path: Path) -> None:
    shown = show(chromium, report(two, to=tmp_path / "r.html"))
    log = ConflictLog.load(two / "log")
    windows = Windows.of(log, severity=-0.1)
    columns, rows = len(windows.below), len(log.layers)
    for layer, time in ((0, 0), (3, columns // 2), (rows - 1, columns - 1)):
        shown.point("#heat-cells", (time + 0.5) / columns, (layer + 0.5) / rows)
        start, stop = windows.borders[time], windows.borders[time + 1]
        cosines = log.cosines()[start:stop, layer]
        found, there = int((cosines < -0.1).sum()), int((~cosines.isnan()).sum())
        assert shown.tip() == (
            f"{log.layers[layer]}\nsteps {start + 1:,} to {stop:,}, digit \u00d7 fashion\n"
            f"{found} conflicts in {there} pairs: {100 * found / there:.2f} %"
        )
    shown.point("#heat-cells", 0.5 / columns, 0.5 / rows, click=True)
    assert f"{log.layers[0].capitalize()}, steps 1 to" in shown.text("#heat-said")
    shown.page.locator("#heat-cells").press("ArrowDown")
    assert f"{log.layers[1].capitalize()}, steps 1 to" in shown.text("#heat-said")
    shown.page.locator("#heat-all").click()
    total = int(windows.below.sum())
    assert f"All layers, all steps, digit \u00d7 fashion: {total:,} conflicts" in shown.text("#heat-said")
    for selector in (
        "#plan .layer[data-tip]",
        "#cosines rect.catch",
        "#training path.target",
        "#chance .rank[data-tip]",
        "#stability .rank[data-tip]",
    ):
        marked = shown.page.locator(selector).nth(2)
        marked.scroll_into_view_if_needed()
        marked.hover(force=True)
        assert shown.tip() == marked.get_attribute("data-tip").replace("\u00a0", " "), selector
    assert shown.complaints == []


def test_forty_tasks_can_be_explored_pair_by_pair(chromium: Any, forty: Path, tmp_path: Path) -> None:
    shown = show(chromium, report(forty, to=tmp_path / "r.html"))
    log = ConflictLog.load(forty / "log")
    windows = Windows.of(log, severity=-0.1).at_pairs()
    names = [str(t) for t in shown.page.locator("#conflicts .pairs > .names > div").all_inner_texts()]
    assert sorted(names) == sorted(log.tasks)
    first, second = names[4], names[30]
    pair = log.pairs.index((first, second) if (first, second) in log.pairs else (second, first))

    layer, time = 7, len(windows.below) - 1
    shown.point("#heat-cells", (time + 0.5) / len(windows.below), (layer + 0.5) / 40, click=True)
    assert shown.text("#pair-which").startswith(log.layers[layer])
    shown.point("#pair-cells", 30.5 / 40, 4.5 / 40)
    found, there = (int(of[time, layer, pair]) for of in (windows.pair_below, windows.pair_measured))
    assert f"{first} \u00d7 {second}\n" in shown.tip()
    assert shown.tip().endswith(f"{found} conflicts in {there} pairs: {100 * found / there:.2f} %")

    shown.point("#pair-cells", 30.5 / 40, 4.5 / 40, click=True)  # the other map shows this pair
    assert shown.text("#heat-which") == f"{first} \u00d7 {second}"
    shown.point("#heat-cells", 0.5 / len(windows.below), 12.5 / 40)
    found, there = (int(of[0, 12, pair]) for of in (windows.pair_below, windows.pair_measured))
    assert shown.tip().endswith(f"{found} conflicts in {there} pairs: {100 * found / there:.2f} %")

    shown.page.locator("#heat-names > div").nth(3).click()  # one layer, all steps
    assert shown.text("#pair-which") == f"{log.layers[3]}, all steps"
    shown.page.locator("#heat-all").click()
    scores = log.pair_scores(severity=-0.1).sum(0)
    shown.point("#pair-cells", 30.5 / 40, 4.5 / 40)
    assert f"{int(scores[pair]):,} conflicts in {320 * 40:,} pairs" in shown.tip()
    shades = shown.page.evaluate("[...document.querySelectorAll('#pair-cells rect')].map((r) => r.className.baseVal)")
    assert len(shades) == 40 * 39 + 1 and len(set(shades)) > 2
    painted = shown.page.evaluate("[...document.querySelectorAll('#heat-cells rect')].map((r) => r.className.baseVal)")
    shown.page.reload()
    assert painted == shown.page.evaluate(  # what the program paints is what was there before it ran
        "[...document.querySelectorAll('#heat-cells rect')].map((r) => r.className.baseVal)"
    )
    assert shown.complaints == []


def test_counted_logs_keep_time_and_pairs_apart(chromium: Any, tmp_path: Path) -> None:
    write_study(tmp_path / "s", tasks=["a", "b", "c"], layers=network_names(6), counted=True)
    shown = show(chromium, report(tmp_path / "s", to=tmp_path / "r.html"))
    shown.point("#heat-cells", 0.05, 0.05, click=True)
    shown.point("#pair-cells", 0.9, 0.1, click=True)
    log = ConflictLog.load(tmp_path / "s" / "log")
    found = int(log.pair_scores(severity=-0.1)[0, 1])
    assert shown.text("#heat-which") == "all pairs of tasks"
    said = shown.text("#heat-said")
    assert "all steps (pairs are not kept per window), a \u00d7 c" in said and f"{found} conflicts in 64 pairs" in said
    assert shown.complaints == []


def test_the_theme_can_be_changed_and_paper_is_always_light(chromium: Any, forty: Path, tmp_path: Path) -> None:
    shown = show(chromium, report(forty, to=tmp_path / "r.html"), dark=True)
    colour = "getComputedStyle(document.body).backgroundColor"
    dark = shown.page.evaluate(colour)
    assert shown.text("#theme") == "Light"
    shown.page.locator("#theme").click()
    assert shown.page.evaluate(colour) != dark and shown.text("#theme") == "Dark"
    shown.page.locator("#theme").click()
    assert shown.page.evaluate(colour) == dark
    shown.page.emulate_media(media="print")
    assert shown.page.evaluate(colour) == "rgb(255, 255, 255)"
    assert not shown.page.locator("nav").is_visible() and not shown.page.locator("#theme").is_visible()
    printed = tmp_path / "r.pdf"
    shown.page.pdf(path=str(printed), format="A4", print_background=True)
    assert printed.stat().st_size > 50_000
    assert shown.complaints == []


def test_hostile_names_are_shown_as_text(chromium: Any, tmp_path: Path) -> None:
    layers = ["</script><script>alert(1)</script>", "<img src=x onerror=alert(2)>", '" onmouseover="alert(3)', "d"]
    tasks = ["<svg onload=alert(4)>", "'><b>", "c"]
    write_study(tmp_path / "s", tasks=tasks, layers=layers, steps=16)
    shown = show(chromium, report(tmp_path / "s", to=tmp_path / "r.html"))
    shown.point("#heat-cells", 0.01, 0.1)
    assert shown.tip().startswith(layers[0])
    shown.point("#pair-cells", 0.5, 0.1)
    assert shown.tip().startswith(f"{tasks[0]} \u00d7 {tasks[1]}")
    assert shown.page.evaluate("document.querySelectorAll('img, b > b').length") == 0
    assert shown.page.evaluate("document.scripts.length") == 2
    assert shown.complaints == []


def test_long_names_fit_a_phone(chromium: Any, tmp_path: Path) -> None:
    layers = [f"vision_model.encoder.layers.{i}.self_attention.output_projection" for i in range(12)]
    tasks = ["semantic segmentation of indoor scenes", "depth" * 12]
    write_study(tmp_path / "s", tasks=tasks, layers=layers, steps=40)
    path = report(tmp_path / "s", to=tmp_path / "r.html")
    for width in (360, 390, 800):
        shown = show(chromium, path, width=width)
        seen = shown.page.locator("#plan .layer .name:visible").all_inner_texts()
        assert len(set(seen)) == 12 + 1  # shortened names still differ; the last line is the heads'
        assert shown.complaints == []
        assert fits(shown.page)


@pytest.mark.parametrize("width", [320, 360, 390])
def test_nothing_sticks_out_of_a_phone(chromium: Any, width: int, two: Path, forty: Path, tmp_path: Path) -> None:
    for study in (two, forty):
        page = show(chromium, report(study, to=tmp_path / "r.html"), width=width, touch=True).page
        assert fits(page)
    page.evaluate("document.querySelector('#plan').append(Object.assign(document.createElement('i'), {id: 'wide'}))")
    page.add_style_tag(content=f"#wide {{ display: block; width: {width + 24}px; height: 5px }}")
    assert not fits(page)  # it would be seen
