"""The comparison: a table of methods, and what each gains for its size."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from reconmtl.comparing import Comparison, Row, Spread
from reconmtl.reporting import proposals
from reconmtl.reporting.axes import steps, ticks_of
from reconmtl.reporting.markup import Html, join, tag
from reconmtl.reporting.material import Material
from reconmtl.reporting.words import Section, minus, percent, plural, signed

FEW = 3
"""Metrics that stand in the same table as what sums them up."""


def best_rows(comparison: Comparison) -> dict[int, set[int]]:
    """Rows with the best mean, per column of `Comparison.header()` that holds a metric or delta-m."""
    out: dict[int, set[int]] = {}
    columns: list[tuple[str, list[Spread | None]]] = [
        (comparison.directions[t][m], [r.metrics[t, m] for r in comparison.rows]) for t, m in comparison.rows[0].metrics
    ]
    columns.append(("max", [r.delta_m for r in comparison.rows]))
    for i, (best, spreads) in enumerate(columns, start=1):
        means = {k: s.mean for k, s in enumerate(spreads) if s is not None and math.isfinite(s.mean)}
        if len(means) > 1:
            wanted = (max if best == "max" else min)(means.values())
            out[i] = {k for k, v in means.items() if v == wanted}
    return out


def table(comparison: Comparison) -> Html:
    """The rows of a comparison; the best of each column stands out. Many metrics stand in a table of their own."""
    best, titles, cells = best_rows(comparison), comparison.header(), comparison.cells()
    metrics = len(comparison.rows[0].metrics)
    if metrics <= FEW:
        return _grid(titles, cells, best)
    kept = [0, *range(metrics + 1, len(titles))]
    short = _grid(
        [titles[i] for i in kept],
        [[line[i] for i in kept] for line in cells],
        {place: best[i] for place, i in enumerate(kept) if i in best},
    )
    turned = [[titles[i], *(line[i] for line in cells)] for i in range(1, metrics + 1)]
    marked = {k + 1: {i - 1 for i in range(1, metrics + 1) if k in best.get(i, set())} for k in range(len(cells))}
    full = _grid(["metric", *(line[0] for line in cells)], turned, marked)
    return join(short, tag("details", tag("summary", f"All {plural(metrics, 'metric')}"), full, cls="all"))


def _grid(titles: Sequence[str], cells: Sequence[Sequence[str]], marked: Mapping[int, set[int]]) -> Html:
    """A table whose first column names the rows; `marked` holds the rows that stand out per column."""
    top = tag("tr", [tag("th", minus(t), scope="col") for t in titles])
    body = []
    for k, line in enumerate(cells):
        values = [
            tag("td", minus(cell), cls="best" if k in marked.get(i, set()) else None)
            for i, cell in enumerate(line[1:], start=1)
        ]
        body.append(tag("tr", tag("th", line[0], scope="row"), values))
    return tag("div", tag("table", tag("thead", top), tag("tbody", body)), cls="scroll table", tabindex=0)


def gains(comparison: Comparison) -> Html | None:
    """Delta-m of each method as a dot with its spread; None without a baseline."""
    rows = [r for r in comparison.rows if r.delta_m is not None and math.isfinite(r.delta_m.mean)]
    if len(rows) < 2:
        return None
    spans = [_span(r.delta_m) for r in rows if r.delta_m is not None]
    values = steps(min(0.0, *(a for a, _ in spans)), max(0.0, *(b for _, b in spans)), about=5)
    low, high = values[0], values[-1]

    def at(value: float) -> str:
        return f"{2 + 96 * (value - low) / (high - low):.4g}%"

    ticks = [tag("span", t, style=f"left:{at(v)}") for v, t in zip(values, ticks_of(values), strict=True)]
    lines = [tag("div", tag("span"), tag("div", ticks, cls="xticks top"), tag("b", "size"), cls="gain header")]
    for row in rows:
        assert row.delta_m is not None
        a, b = _span(row.delta_m)
        zero = at(0.0)
        kind = "less" if row.delta_m.mean < 0 else "more"
        picture = tag(
            "svg",
            tag("line", x1=zero, x2=zero, y1=0, y2=28, cls="cut"),
            tag("line", x1=at(a), x2=at(b), y1=14, y2=14, cls=f"range {kind}"),
            tag("circle", cx=at(row.delta_m.mean), cy=14, r=5, cls=kind),
            height=28,
            aria_hidden="true",
        )
        seeds = plural(row.delta_m.n, "seed")
        tip = f"{row.label}\nΔm {row.delta_m.show(2, sign=True)} % over {seeds}\n{row.megabytes:,.3f} MB"
        lines.append(
            tag(
                "div",
                tag("div", row.label, cls="name"),
                picture,
                tag("b", f"{row.megabytes:,.2f} MB"),
                cls="gain",
                data_tip=minus(tip),
            )
        )
    title = tag("h3", "Δm", tag("span", f"% better than {comparison.baseline}, mean ± sd over seeds"))
    return tag("div", title, lines, cls="gains")


def _span(spread: Spread) -> tuple[float, float]:
    sd = spread.sd if math.isfinite(spread.sd) else 0.0
    return spread.mean - sd, spread.mean + sd


def conclusion(comparison: Comparison) -> str:
    """Which method is best, against joint training where there is one, and by how much more than the seeds spread."""
    ranked = [r for r in comparison.rows if r.delta_m is not None and math.isfinite(r.delta_m.mean)]
    if len(ranked) < 2:
        names = plural(len(comparison.rows), "method")
        return f"{names} stand side by side; without a single-task baseline there is no Δm to order them by."
    several = [r for r in ranked if r.label != comparison.baseline] or ranked
    best = max(several, key=lambda r: r.delta_m.mean if r.delta_m is not None else -math.inf)
    joint = next((r for r in ranked if r.label == "joint"), None)
    against = f"The largest gain is that of {best.label}: Δm {_shown(best)} relative to {comparison.baseline}"
    if joint is None or joint is best:
        return f"{against}; it has {_size(best, ranked, comparison.baseline)}."
    assert best.delta_m is not None
    assert joint.delta_m is not None
    gap = best.delta_m.mean - joint.delta_m.mean
    spread = math.hypot(*(s for s in (best.delta_m.sd, joint.delta_m.sd) if math.isfinite(s)))
    if min(best.delta_m.n, joint.delta_m.n) < 2:
        sure = "one seed says nothing about the spread"
    else:
        sure = f"{'more' if gap > spread else 'less'} than their spread over seeds (±{spread:.2f})"
    return (
        f"{against}, {gap:.2f} points above joint training ({_shown(joint)}), {sure}; it has "
        f"{_size(best, ranked, 'joint')}."
    )


def _shown(row: Row) -> str:
    assert row.delta_m is not None
    sd = f"\u00a0±\u00a0{row.delta_m.sd:.2f}" if math.isfinite(row.delta_m.sd) else ""
    return f"{signed(row.delta_m.mean)}{sd}\u00a0%"


def _size(row: Row, rows: list[Row], other: str | None) -> str:
    base = next((r for r in rows if r.label == other), None)
    if base is None or not base.megabytes:
        return f"{row.megabytes:,.2f} MB of parameters"
    change = row.megabytes / base.megabytes - 1
    return f"{percent(abs(change))} {'more' if change >= 0 else 'fewer'} parameters than {other}"


def section(material: Material) -> Section:
    """The comparison's part of the page."""
    found = material.comparison
    return Section(
        key="comparison",
        short="Methods",
        title="Methods side by side",
        body=None
        if found is None
        else join(gains(found), table(found), [tag("p", minus(note), cls="note") for note in found.notes()]),
        conclusion=f"There is no comparison. {material.refused}" if found is None else conclusion(found),
        command=proposals.control(material),
        purpose="Compare with splits of the same size at other layers",
        reading=(
            "Arrows say which direction is better; values are mean ± standard deviation over n seeds, the best of a "
            "column stands out. Δm is the average relative change of the metrics against the baseline, in percent, and "
            "positive is better. #P is the size of the trained parameters. The column cos counts the gradient pairs in "
            "conflict while training."
        ),
    )
