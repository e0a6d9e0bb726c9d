"""The plan drawn on the network: a line per task runs through the layers, bundled where tasks share, else apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from reconmtl.plan import Partition
from reconmtl.reporting import proposals
from reconmtl.reporting.axes import TASK_COLOURS
from reconmtl.reporting.markup import Html, join, tag
from reconmtl.reporting.material import Material
from reconmtl.reporting.words import Section, common, fitting, listed, percent, plural

WIDTH, HEIGHT = 84, 26
"""Of one layer's piece of the drawing, pixels."""

FAN = 7
"""Lines that stand for more tasks than have colours."""


@dataclass(frozen=True)
class Row:
    """One layer of the drawing; what is not known is None."""

    name: str
    type: str
    parameters: int | None
    conflicts: int | None
    measured: int | None
    rank: int | None
    groups: Partition | None
    noise: bool = False

    @property
    def rate(self) -> float:
        """Share of conflicts among the measured pairs."""
        return self.conflicts / self.measured if self.conflicts is not None and self.measured else math.nan


@dataclass(frozen=True)
class Drawing:
    """The layers in network order, with what the plan does to each."""

    tasks: tuple[str, ...]
    rows: tuple[Row, ...]
    by: str
    severity: float
    planned: bool

    @classmethod
    def of(cls, material: Material) -> Drawing | None:
        """None if neither layers nor a plan are known."""
        plan, log = material.plan, material.log
        if plan is None and log is None:
            return None
        groups: dict[str, Partition] = {} if plan is None else plan.layers
        rows = []
        if log is not None:
            ranking = log.rank(severity=material.severity)
            place = {n: i for i, n in enumerate(ranking.layers)}
            for name in log.layers:
                i = place[name]
                found, measured = ranking.scores[i], ranking.measured[i]
                noise = name in ranking.noise
                rows.append(
                    Row(name, log.types[name], log.sizes[name], found, measured, i + 1, groups.get(name), noise)
                )
        known = {r.name for r in rows}
        scores = {} if plan is None else plan.chosen.get("scores")
        for name, partition in groups.items():
            if name not in known:
                score = scores.get(name) if isinstance(scores, dict) else None
                counted = score if isinstance(score, int) and not isinstance(score, bool) else None
                rows.append(Row(name, "", None, counted, None, None, partition))
        by = "" if plan is None else str(plan.chosen.get("by", "by name"))
        return cls(material.tasks, tuple(rows), by, material.severity, plan is not None)

    @property
    def split(self) -> list[Row]:
        """Layers of which there is more than one copy."""
        return [r for r in self.rows if r.groups is not None and len(r.groups) > 1]

    def conclusion(self) -> str:
        """What the plan does, with the share of conflicts and of parameters that it takes."""
        split, total = self.split, len(self.rows)
        if not self.planned:
            return f"No plan was found, so {plural(total, 'shared layer')} of the network stand undivided."
        if not split:
            return "The plan splits no layer."
        verb = "is" if len(split) == 1 else "are"
        if any(r.parameters is None for r in self.rows):
            known = " No log was found, so the undivided layers are not drawn." if total == len(split) else ""
            return f"{plural(len(split), 'layer')} {verb} split: {listed([r.name for r in split], most=4)}.{known}"
        own, all_ = (sum(r.parameters or 0 for r in rows) for rows in (split, self.rows))
        extra = sum((r.parameters or 0) * (len(r.groups or ()) - 1) for r in split)
        found, conflicts = (sum(r.conflicts or 0 for r in rows) for rows in (split, self.rows))
        holds = f", which hold {percent(found / conflicts)} of all conflicts" if conflicts else ""
        part = percent(own / all_ if all_ else math.nan)
        return (
            f"{len(split)} of {plural(total, 'shared layer')} {verb} split{holds} and {part} of the shared parameters; "
            f"the copies add {plural(extra, 'parameter')} ({extra * 4 / 2**20:,.3f} MB)."
        )

    def html(self) -> Html:
        """Rows of lines, name, conflicts, size and copies."""
        worst = max((r.rate for r in self.rows if not math.isnan(r.rate)), default=0.0)
        lanes = Lanes(self.tasks)
        before: Partition | None = None
        lines = []
        names = [r.name for r in self.rows]
        for i, (row, name) in enumerate(zip(self.rows, fitting(names), strict=True)):
            lines.append(self._row(row, name, lanes.piece(before if i else None, row.groups, node=True), worst))
            before = row.groups
        heads = tuple((t,) for t in self.tasks)
        end = [
            tag("span", t, cls=f"key c{i}") if len(self.tasks) <= TASK_COLOURS else None
            for i, t in enumerate(self.tasks)
        ]
        ended = end if len(self.tasks) <= TASK_COLOURS else plural(len(self.tasks), "task")
        last = tag(
            "div",
            lanes.piece(before, heads, node=False),
            tag("div", tag("b", "heads"), " of ", ended, cls="name"),
            cls="layer ends",
        )
        titles = ("", "layer", "conflicts", "parameters", "copies")
        header = tag("div", [tag("span", t) for t in titles], cls="layer header")
        kind = "network" + (" long" if len(self.rows) > 64 else "")
        start = common(names)
        note = tag(
            "p", "Names stand without their common beginning ", tag("code", start.removesuffix(".")), ".", cls="note"
        )
        return join(tag("div", header, lines, last, cls=kind), note if start else None)

    def _row(self, row: Row, name: Html, piece: Html, worst: float) -> Html:
        score = "" if row.conflicts is None else f"{row.conflicts:,}"
        told = [f"{row.name} ({row.type})" if row.type else row.name]
        if row.conflicts is not None and row.measured:
            told.append(
                f"{row.conflicts:,} conflicts in {row.measured:,} pairs (cos < {self.severity:g}): "
                f"{percent(row.rate, digits=2)}"
            )
        if row.rank is not None:
            told.append(f"rank {row.rank} of {len(self.rows)}")
        if row.parameters is not None:
            told.append(plural(row.parameters, "parameter"))
        if row.noise:
            told.append("its gradients are rounding noise")
        copies = self._copies(row.groups)
        told.append(f"copies: {copies}" if copies else "shared by all tasks")
        bar = 0.0 if math.isnan(row.rate) or not worst else 100 * row.rate / worst
        measured = "" if math.isnan(row.rate) else percent(row.rate)
        return tag(
            "div",
            piece,
            tag(
                "div",
                tag("span", name),
                tag("small", row.type, " (rounding noise)" if row.noise else None),
                cls="name",
            ),
            tag(
                "div",
                tag("i", style=f"width:{bar:.1f}%"),
                tag("b", score),
                tag("small", measured),
                cls="score",
            ),
            tag("div", "" if row.parameters is None else f"{row.parameters:,}", cls="size"),
            tag("div", copies, cls="copies"),
            cls="layer is-split" if copies else "layer",
            data_tip="\n".join(told),
        )

    def _copies(self, groups: Partition | None) -> str:
        if groups is None or len(groups) < 2:
            return ""
        names = [" + ".join(g) if len(g) <= 3 else f"{g[0]} + {len(g) - 1} more" for g in groups]
        return f"\u00d7{len(groups)}: {listed(names, most=4)}" if len(groups) < 9 else f"\u00d7{len(groups)}"


class Lanes:
    """Where the tasks' lines run."""

    def __init__(self, tasks: Sequence[str]) -> None:
        self.tasks = tuple(tasks)
        self.coloured = len(tasks) <= TASK_COLOURS
        self.lines = len(tasks) if self.coloured else FAN

    def piece(self, before: Partition | None, here: Partition | None, *, node: bool) -> Html:
        """One layer's piece: lines come from where they were, bend, and pass a mark per copy."""
        old, new = self.places(before), self.places(here)
        paths = [
            tag("path", d=f"M{a:g} 0C{a:g} 7 {b:g} 4 {b:g} 12V{HEIGHT}", cls=f"c{i}" if self.coloured else "many")
            for i, (a, b) in enumerate(zip(old, new, strict=True))
        ]
        marks = []
        for members in self.bundles(here):
            at = [new[i] for i in members]
            left, right = min(at) - 4, max(at) + 4
            marks.append(tag("rect", x=left, y=13.0, width=right - left, height=8, rx=4))
        kind = "whole" if here is None or len(here) < 2 else "apart"
        return tag(
            "svg",
            paths,
            tag("g", marks if node else None, cls=kind),
            viewBox=f"0 0 {WIDTH} {HEIGHT}",
            width=WIDTH,
            height=HEIGHT,
            aria_hidden="true",
        )

    def bundles(self, groups: Partition | None) -> list[list[int]]:
        """Lines that run together, as positions."""
        if groups is None or len(groups) < 2:
            return [list(range(self.lines))]
        if self.coloured:
            return [[self.tasks.index(t) for t in g if t in self.tasks] for g in groups]
        n = min(len(groups), self.lines)  # too many to draw each: lines are dealt out to as many bundles
        return [[i for i in range(self.lines) if i * n // self.lines == k] for k in range(n)]

    def places(self, groups: Partition | None) -> list[float]:
        """Where each line runs, pixels."""
        middle, tight = WIDTH / 2, 3.4 if self.coloured else 1.6
        out = [0.0] * self.lines
        bundles = self.bundles(groups)
        wide = [(len(members) - 1) * tight + 8 for members in bundles]
        gap = (WIDTH - 6 - sum(wide)) / max(1, len(bundles) - 1)
        left = 3.0
        for members, width in zip(bundles, wide, strict=True):
            centre = middle if len(bundles) == 1 else left + width / 2
            left += width + gap
            for k, i in enumerate(members):
                out[i] = round(centre + (k - (len(members) - 1) / 2) * tight, 2)
        return out


def section(material: Material) -> Section:
    """The plan's part of the page."""
    drawing = Drawing.of(material)
    drawn = drawing is not None and drawing.rows
    return Section(
        key="plan",
        short="Plan",
        title="The plan on the network",
        body=drawing.html() if drawing is not None and drawn else None,
        conclusion=drawing.conclusion()
        if drawing is not None and drawn
        else "There is neither a plan nor a log, so there is no network to draw.",
        command=proposals.other_k(material),
        purpose="Split fewer layers and see whether the gain stays",
        reading=(
            "Layers stand in the order in which the network defines them, from input to output. Each task is a line. "
            "Lines that run together share a layer's weights; where they part, each has its own copy. The bar is the "
            "share of gradient pairs that conflict at the layer, and the number beside it how many did."
        ),
    )
