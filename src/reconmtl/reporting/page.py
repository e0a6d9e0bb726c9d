"""One HTML page with everything that was found: it needs no network, and its program is the only one it lets run."""

from __future__ import annotations

import base64
import hashlib
import math
import re
import shlex
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from reconmtl.errors import RunError
from reconmtl.files import write_text
from reconmtl.reporting import chance, cosines, curves, heatmap, methods, network, stability
from reconmtl.reporting.markup import Html, join, tag
from reconmtl.reporting.material import Material, gather
from reconmtl.reporting.windows import Windows
from reconmtl.reporting.words import Section, listed, minus, percent, plural, signed
from reconmtl.runs import Run
from reconmtl.version import __version__

SHOWN = 20
"""Damaged runs and files that the page lists."""
GLOSSARY = (
    ("conflict", "Two tasks' gradients at a layer point in opposing directions: their cosine is below the severity S."),
    (
        "severity S",
        "How far apart they must point to be counted: 0 counts every opposition, \u22120.1 only clear ones.",
    ),
    ("score of a layer", "Conflicts over all measured steps and pairs of tasks. The plan splits the layers with most."),
    ("split", "Each task, or group of tasks, gets a copy of the layer's weights, so that nobody pulls at another's."),
    ("cosine of the whole", "The same over the gradients of all weights that are still shared, put together."),
    ("Δm", "Average relative change of all metrics against the baseline, in percent. Positive is better."),
    ("#P", "Trained parameters at four bytes each, in units of 2²⁰ bytes."),
    ("n, ±", "Number of seeds, and standard deviation over them. Differences within ± may be chance."),
)


def report(
    runs: Sequence[Run | str | Path] | Run | str | Path, *, to: str | Path, figures: str | Path | None = None
) -> Path:
    """Write one self-contained HTML page about runs: plan, conflicts, cosines, curves, stability, comparison.

    Args:
        runs: Runs, or folders: of a study, of a method with a `seed<k>` folder per seed, of one run, or of a log. What
            a folder lacks becomes a sentence on the page, and so does what is damaged: file and field are named, and
            the rest goes on without it.
        to: The HTML file; it is replaced if it exists.
        figures: Folder for the same plots as PDF and PNG; needs matplotlib.

    Returns:
        The path of the page.

    Raises:
        ReconError: If there is nothing to show, `to` cannot be written, or figures are asked for without matplotlib;
            before anything is written.

    Example:
        >>> report("runs/multifashion-demo", to="report.html")  # doctest: +SKIP
    """
    return write_report(runs, to=to, figures=figures)[0]


def write_report(
    runs: Sequence[Run | str | Path] | Run | str | Path, *, to: str | Path, figures: str | Path | None = None
) -> tuple[Path, Material]:
    """The same, which also returns what the page is about."""
    target = Path(to)
    if target.is_dir():
        raise RunError(f"{target} is a folder; give a file for the page, e.g. {target / 'report.html'}.")
    if figures is not None:
        from reconmtl.reporting.figures import check_matplotlib

        check_matplotlib()
    material = gather(runs)
    windows = None if material.log is None else Windows.of(material.log, severity=material.severity)
    text = page(material, windows, name=target.name)

    write_text(target, text)
    if figures is not None:
        from reconmtl.reporting.figures import save

        save(material, windows, Path(figures))
    return target, material


def sections(material: Material, windows: Windows | None) -> list[Section]:
    """The parts of the page, in order."""
    return [
        methods.section(material),
        network.section(material),
        heatmap.section(material, windows),
        curves.section_scores(material, windows),
        cosines.section(material),
        curves.section_learning(material),
        chance.section(material),
        stability.section(material, windows),
    ]


def page(material: Material, windows: Windows | None, *, name: str = "report.html") -> str:
    """The page as text."""
    parts = sections(material, windows)
    style, program = (
        resources.files("reconmtl.reporting").joinpath(file).read_text(encoding="utf-8")
        for file in ("page.css", "page.js")
    )
    allowed = base64.b64encode(hashlib.sha256(program.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'; img-src data:; base-uri 'none'"
    )
    title = f"{_problem(material)} · reconmtl report"
    head = join(
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="generator", content=f"reconmtl {__version__}"),
        tag("title", title),
        Html(f"<style>{style}</style>"),
    )
    links = [tag("a", s.short, href=f"#{s.key}") for s in parts]
    links += [tag("a", "Reading", href="#reading"), tag("a", "Reproduce", href="#reproduce")]
    body = join(
        _top(material, parts),
        tag("nav", tag("div", links), aria_label="Parts of this page"),
        tag("main", [_section(s) for s in parts], _reading(material), _reproduce(material, name)),
        tag("footer", tag("p", f"Made by reconmtl {__version__}. This file needs no network and sends nothing.")),
        tag("div", id="tip", role="tooltip", hidden=True),
        Html(f"<script>{program}</script>"),
    )
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>{body}</body></html>\n'


def _problem(material: Material) -> str:
    source = material.problem or "Runs"
    return source if len(source) <= 80 else source[:77] + "..."


def _top(material: Material, parts: Sequence[Section]) -> Html:
    tasks, seeds = material.tasks, sorted({r.seed for r in material.runs})
    about = [f"{plural(len(tasks), 'task')}: {listed(tasks, most=6)}"] if tasks else []
    if material.runs:
        about.append(f"{plural(len(material.labels), 'method')}, {plural(len(seeds), 'seed')}")
        epochs = {e for r in material.runs if isinstance(e := _recipe(r).get("epochs"), int)}
        about += [plural(epochs.pop(), "epoch")] if len(epochs) == 1 else []
    first = sorted((s for s in parts if s.body is not None), key=lambda s: s.key != "plan")
    lead = (first or parts)[0].conclusion  # the plan's, if there is one
    return tag(
        "header",
        tag("div", tag("b", "reconmtl report"), tag("button", "Dark", id="theme", type="button"), cls="eyebrow"),
        tag("h1", _problem(material)),
        tag("p", " · ".join(about), cls="about"),
        tag("p", minus(lead), cls="lead"),
        _damaged(material),
        tag("div", _tiles(material), cls="tiles"),
        cls="top",
    )


def _damaged(material: Material) -> Html | None:
    """What could not be read; where everybody sees it, for the numbers below are made without it."""
    lines = [f"{out.run}: {out.reason}" for out in material.left_out if out.damaged]
    if not lines:
        return None
    shown = [tag("li", line) for line in lines[:SHOWN]]
    more = tag("li", f"and {len(lines) - SHOWN:,} more") if len(lines) > SHOWN else None
    return tag("div", tag("b", f"Damaged and left out: {len(lines):,}"), tag("ul", shown, more), cls="damaged")


def _recipe(run: Run) -> dict[str, object]:
    recipe = run.config.get("recipe")
    return recipe if isinstance(recipe, dict) else {}


def _tiles(material: Material) -> list[Html]:
    """A few large numbers."""
    out = []

    def tile(number: str, said: str) -> None:
        out.append(tag("div", tag("b", number), tag("span", said), cls="tile"))

    if material.comparison is not None:
        ranked = [r for r in material.comparison.rows if r.delta_m is not None and math.isfinite(r.delta_m.mean)]
        for row in [r for r in ranked if any(run.plan is not None for run in r.runs)][:1]:
            assert row.delta_m is not None
            joint = next((r.delta_m for r in ranked if r.label == "joint" and r.delta_m is not None), None)
            before = "" if joint is None else f"; joint training {signed(joint.mean)} %"
            tile(f"{signed(row.delta_m.mean)} %", f"Δm of {row.label}{before}")
    drawing = network.Drawing.of(material)
    if drawing is not None and drawing.planned:
        tile(f"{len(drawing.split)} of {len(drawing.rows)}", "layers with a copy per task or group")
        known = [r for r in drawing.rows if r.parameters is not None]
        if known:
            extra = sum((r.parameters or 0) * (len(r.groups or ()) - 1) for r in drawing.split)
            added = extra / max(1, sum(r.parameters or 0 for r in known))
            tile(f"+{percent(added, digits=1 if added < 1 else 0)}", "shared parameters, for the copies")
    found = cosines.Distributions.of(material)
    if found is not None:
        first = found.rows[0]
        if found.after is None:
            tile(percent(first.below), f"of gradient pairs in conflict, {first.label}")
        else:
            tile(
                f"{100 * first.below:.1f} → {percent(found.rows[found.after].below)}",
                "of gradient pairs in conflict, before and after the split",
            )
    return out


def _section(part: Section) -> Html:
    return tag(
        "section",
        tag("h2", part.title),
        tag("details", tag("summary", "How to read this"), tag("p", part.reading)) if part.body is not None else None,
        part.body,
        tag("p", minus(part.conclusion), cls="conclusion"),
        tag("p", f"{part.purpose}:", tag("code", shell(part.command)), cls="next"),
        id=part.key,
    )


def shell(command: str) -> Html:
    """A command that breaks between its words only."""
    return join(tag("span", word) if i % 2 == 0 else word for i, word in enumerate(re.split(r"( )", command)))


def _reading(material: Material) -> Html:
    terms = [(tag("dt", term), tag("dd", meaning)) for term, meaning in GLOSSARY]
    source = (
        f"Conflicts are counted at S = {material.severity:g} in {material.log_source}."
        if material.log is not None
        else None
    )
    return tag(
        "section",
        tag("h2", "How to read it"),
        tag("dl", terms),
        tag("p", source, cls="note") if source else None,
        id="reading",
    )


def _reproduce(material: Material, name: str) -> Html:
    again = shlex.join(["reconmtl", "report", *material.given, "--to", name])
    packages = material.environment.get("packages")
    facts: list[tuple[str, str]] = []
    if isinstance(packages, dict):
        facts.append(("versions", ", ".join(f"{n} {v}" for n, v in packages.items())))
    for key, label in (
        ("python", "Python"),
        ("platform", "platform"),
        ("device", "device"),
        ("threads", "threads"),
        ("git", "git"),
    ):
        if material.environment.get(key):
            facts.append((label, str(material.environment[key])))
    made = material.command
    return tag(
        "section",
        tag("h2", "Reproduce"),
        tag("p", "The runs were made by" if made else "The runs hold no command line: they were made from Python."),
        tag("pre", shell(made)) if made else None,
        tag("p", "and this page by" if made else "This page was made by"),
        tag("pre", shell(again)),
        tag("dl", [(tag("dt", k), tag("dd", v)) for k, v in facts]) if facts else None,
        tag("p", f"Runs: {listed([str(r.path) for r in material.runs if r.path is not None], most=60)}.", cls="note")
        if any(r.path is not None for r in material.runs)
        else None,
        id="reproduce",
    )
